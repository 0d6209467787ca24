"""Jobs on top of deltas that are frozen, derived, or trained by other jobs."""

import pytest
import torch
from blends import Net
from jobs import job, mse, own_batches

import deltaspec
from deltaspec.training import Job, Training


def frozen_below():
    """A trained delta below two others, and one that is derived from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Net().double().eval()
    base = {"name": "base", "method": "lora", "target": "*", "params": {"rank": 3, "dropout": 0.0}}
    new = {"name": "new", "method": "lora", "target": "*", "matrix": {"rank": [1, 4]}, "train": {"lr": 0.01, "seed": 5}}
    blend = {"name": "blend", "from": {"base": 0.5}, "combine": "linear", "attached": False}
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": [base, new, blend]})
    with torch.no_grad():
        for number, parameter in enumerate(c.deltas["base"].parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return c


@pytest.mark.parametrize("below", ["base", "blend"])
def test_jobs_on_top_of_a_frozen_delta(below):
    c, twin = frozen_below(), frozen_below()
    names = ["new[rank=1]", "new[rank=4]"]
    for each in (c, twin):
        each.deltas["base"].requires_grad_(False)
    before = [p.clone() for p in c.deltas["base"].parameters()]
    jobs = [job(name, 0, deltas=(below, name)) for name in names]
    assert [one.name for one in Training(c, jobs).results] == names
    results = Training(c, jobs).run(progress=False)
    assert all(map(torch.equal, before, c.deltas["base"].parameters()))
    for name, result in zip(names, results, strict=True):
        twin.only(below, name)
        optimizer = torch.optim.AdamW(twin.parameter_groups(name))
        batches = own_batches(job(name, 0), 5)
        for loss in result.losses:
            x, y = next(batches)
            optimizer.zero_grad()
            value = mse(twin(x), y)
            value.backward()
            optimizer.step()
            assert loss == pytest.approx(value.item(), rel=1e-12)
        for key, tensor in twin.deltas[name].tensors():
            assert torch.allclose(c.deltas[name].tensor(key), tensor, rtol=0, atol=1e-12)


def test_what_stands_on_a_delta_that_another_job_trains():
    c = frozen_below()
    first, second = "new[rank=1]", "new[rank=4]"
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        Training(c, [job("base", 0), job(first, 0, deltas=("base", first)), job(second, 0, deltas=("blend", second))])
    assert [d.code for d in caught.value.diagnostics] == ["DS382", "DS382", "DS382"]
    assert "called 'base'" in str(caught.value) and "derived from 'base'" in str(caught.value)
    c.deltas["base"].requires_grad_(False)
    with pytest.raises(deltaspec.DeltaSpecError, match="DS381.*'base'.*requires no gradients"):
        Training(c, [job("base", 0)])


def test_a_job_for_each_delta_of_a_matrix_on_top_of_one():
    c = frozen_below()
    with pytest.raises(ValueError, match="'base' and 'new' have different matrices"):
        Job.each(c, "base", "new", data=[])
    c.deltas["base"].requires_grad_(False)
    made = Job.each(c, "base", "new", data=[(torch.zeros(2, 8).double(),) * 2], loss=mse, steps=1)
    assert [one.deltas for one in made] == [("base", "new[rank=1]"), ("base", "new[rank=4]")]
    assert [one.name for one in Training(c, made).run(progress=False)] == ["new[rank=1]", "new[rank=4]"]
