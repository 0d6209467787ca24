"""A job whose numbers are none ends, and the others learn as if it had never been there."""

import pytest
import torch
from blends import Net
from jobs import compiled, job, mse

import deltaspec
from deltaspec.training import Training


def run(c, own):
    return Training(c, own).run(progress=False)


@pytest.mark.parametrize("method", ["oft", "lora", "dora"])
def test_a_job_whose_numbers_are_none_takes_no_other_with_it(method):
    params = {"oft": {"block_size": 2}, "lora": {"rank": 2}, "dora": {"rank": 2, "use_dora": True}}[method]
    bad = {"name": "bad", "method": method.replace("dora", "lora"), "target": "*", "params": params, "attached": False}
    spec = {
        "deltaspec": 1,
        "deltas": [bad, {**bad, "name": "alike"}, {"name": "other", "method": "lora", "target": "*"}],
    }
    c, twin = (deltaspec.compile(Net().double().eval(), spec) for _ in range(2))
    twin.load_state_dict(c.state_dict())
    with torch.no_grad():
        for parameter in c.deltas["bad"].parameters():
            parameter.fill_(torch.inf)
    results = run(c, [job(name, 1) for name in ("bad", "alike", "other")])
    assert [one.status for one in results] == ["diverged", "finished", "finished"]
    expected = run(twin, [job(name, 1) for name in ("alike", "other")])
    for result, other in zip(results[1:], expected, strict=True):
        assert result.losses == pytest.approx(other.losses, rel=1e-12)


def test_a_gradient_that_is_not_finite_leaves_the_others_alone():
    c, twin = compiled(), compiled()
    names = [*c.deltas]

    def steep(outputs, target):
        return (outputs * 0).abs().sqrt().sum() + mse(outputs, target)

    results = run(c, [job(names[0], 0), job(names[1], 1, loss=steep), job(names[4], 1)])
    expected = run(twin, [job(names[0], 0), job(names[4], 1)])
    assert [one.status for one in results] == ["finished", "diverged", "finished"]
    for result, other in zip((results[0], results[2]), expected, strict=True):
        assert result.losses == pytest.approx(other.losses, rel=1e-12)
