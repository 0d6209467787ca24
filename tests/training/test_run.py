"""Many jobs in one pass: equal to each alone, and to themselves after an interruption; what ends one job only."""

import copy
import os
import signal

import pytest
import torch
from jobs import HINTS, alone, compiled, job, jobs, mse, pairs
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import deltaspec
from deltaspec.training import Job, Training


def tensors(c):
    return {(name, key): t.detach().clone() for name, delta in c.deltas.items() for key, t in delta.tensors()}


def run(c, own=None, **options):
    return Training(c, jobs(c) if own is None else own).run(progress=False, **options)


def hints_of(c, name):
    return {**HINTS, **c.plan[name].train.to_data()} if name != "ad" else c.plan[name].train.to_data()


def test_each_job_learns_what_it_learns_alone():
    c = compiled()
    results = run(c)
    assert [result.status for result in results] == ["finished"] * 5 and c.attached == () and not c.training
    for one in jobs(c):
        losses, expected = alone(one, hints_of(c, one.name))
        assert results.job(one.name).losses == pytest.approx(losses, rel=1e-12)
        for key, tensor in c.deltas[one.name].tensors():
            assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-12), (one.name, key)


def test_a_job_of_several_deltas_and_one_by_itself():
    c, other = compiled(), compiled()
    names = [*c.deltas]
    both = run(c, [job(names[0], 1), Job(*names[1:3], data=job(names[1], 2).data, loss=mse, steps=9, name="two")])
    one = run(other, [Job(*names[1:3], data=job(names[1], 2).data, loss=mse, steps=9)])
    assert both.job("two").losses == pytest.approx(one[0].losses, rel=1e-12) and both.job("two").steps == 9
    assert tensors(c)[names[4], "b.up"].any() == tensors(compiled())[names[4], "b.up"].any()  # in no job: not touched


@pytest.mark.parametrize("way", ["saved", "interrupted", "killed"])
def test_what_is_resumed_goes_on_to_the_bit(tmp_path, way, request):
    evaluation = {"evaluation": DataLoader(pairs(7, 9), batch_size=4), "loss": mse}
    c = compiled(dropout=0.3)
    torch.manual_seed(7)
    whole = run(c, jobs(c, **evaluation), evaluate_every=4)
    expected, drawn = tensors(c), torch.default_generator.get_state()

    c = compiled(dropout=0.3)
    torch.manual_seed(7)
    calls = []

    def broken(outputs, target):
        calls.append(1)
        if len(calls) == 43:  # in the middle of a step
            raise KeyboardInterrupt
        return mse(outputs, target)

    def press(training):
        if training.steps == 5:
            os.kill(os.getpid(), signal.SIGINT)

    worker = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of xdist ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, worker))
    before = signal.getsignal(signal.SIGINT)
    if way == "saved":
        training = Training(c, jobs(c, **evaluation))
        c.train()
        for _ in range(5):
            training.step()
            if training.steps == 4:
                training.evaluate()
        training.save(tmp_path)
    else:
        own = jobs(c, **{**evaluation, **({"loss": broken} if way == "interrupted" else {})})
        with pytest.raises(KeyboardInterrupt) as stop:
            run(c, own, checkpoint=tmp_path, evaluate_every=4, callback=press if way == "killed" else None)
        assert str(tmp_path) in stop.value.__notes__[0]
        assert signal.getsignal(signal.SIGINT) is before and not c.training
    torch.manual_seed(99)
    again = compiled(dropout=0.3)
    resumed = Training(again, jobs(again, **evaluation)).load(tmp_path)
    assert 0 < resumed.steps < 12
    results = resumed.run(progress=False, evaluate_every=4)
    assert [r.losses for r in results] == [r.losses for r in whole]
    assert [r.evaluations for r in results] == [r.evaluations for r in whole]
    found = tensors(again)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(torch.default_generator.get_state(), drawn)


def test_a_job_that_diverges_leaves_the_others_alone():
    c, others = compiled(), compiled()
    names = [*c.deltas]
    count = []

    def nan(outputs, target):
        count.append(1)
        return mse(outputs, target) * (float("nan") if len(count) == 4 else 1)

    results = run(c, [job(names[0], 0, loss=nan), *(job(name, n) for n, name in enumerate(names[1:], start=1))])
    expected = run(others, [job(name, n) for n, name in enumerate(names[1:], start=1)])
    assert results[0].status == "diverged" and results[0].step == 3
    assert results[0].reason == "its loss is nan at step 4; its deltas are as at step 0"
    for result, other in zip(results[1:], expected, strict=True):
        assert result.status == "finished" and result.losses == pytest.approx(other.losses, rel=1e-12)
    fresh = tensors(compiled())
    for (name, key), tensor in tensors(c).items():
        assert torch.isfinite(tensor).all()
        assert name != names[0] or torch.equal(tensor, fresh[name, key])


def test_a_gradient_that_is_not_finite_ends_a_job_before_its_step():
    c = compiled()
    names = [*c.deltas]

    def steep(outputs, target):
        return (outputs * 0).abs().sqrt().sum() + mse(outputs, target)  # the slope of a root at 0

    results = run(c, [job(names[0], 0), job(names[2], 1, loss=steep, evaluation=DataLoader(pairs(4), batch_size=2))])
    assert results[0].status == "finished" and results[1].status == "diverged" and results[1].step == 0
    assert "the norm of its gradient is" in results[1].reason


def test_rows_of_a_job_that_ended_leave_the_batch():
    c = compiled()
    names, sizes = [*c.deltas], []
    c.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(kwargs["deltas"])), with_kwargs=True)
    run(c, [job(names[0], 0, steps=2, accumulate=1), job(names[2], 2, steps=4, accumulate=1)])
    assert sizes == [8, 8, 5, 5] or (sizes[:2] == [8, 8] and max(sizes[2:]) <= 5)


def test_evaluations_draw_nothing_of_what_training_draws():
    seen = []
    for every in (1, 2, None):
        torch.manual_seed(7)
        c = compiled()
        loader = DataLoader(pairs(6, 3), batch_size=3, shuffle=True)  # it draws a seed when it is begun
        options = {} if every is None else {"evaluation": loader}
        run(c, [job(next(iter(c.deltas)), 0, **options)], **({} if every is None else {"evaluate_every": every}))
        seen.append(torch.get_rng_state())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_early_stop_keeps_the_best():
    c = compiled()
    names = [*c.deltas]
    evaluation = DataLoader(pairs(6, 3), batch_size=3)
    scores = iter([1.0, 3.0, 2.0, 2.5, 0.0, 0.0])
    seen = []

    def metrics(outputs, target):
        if not seen or seen[-1] != len(training.results[0].losses):
            seen.append(len(training.results[0].losses))
            metrics.score = next(scores)
        return {"score": metrics.score}

    own = job(names[0], 0, evaluation=evaluation, metrics=metrics, best="score", patience=2, max_norm=None)
    training = Training(c, [own, job(names[2], 1)])
    kept = {}

    def note(training):
        kept[training.steps] = tensors(c)

    results = training.run(progress=False, evaluate_every=2, callback=note)
    stopped = results[0]
    assert stopped.status == "stopped early" and stopped.reason == "2 evaluations without a better score"
    assert stopped.step == 8 and stopped.best_step == 4 and stopped.best["score"] == 3.0
    assert results[1].status == "finished" and results.best() is stopped
    found = tensors(c)
    assert all(torch.equal(found[key], kept[4][key]) for key in found if key[0] == names[0])
    expected = sum(float(mse(c(x, deltas=[names[0]] * len(x)), y)) * len(x) for x, y in evaluation) / 6
    assert stopped.best["loss"] == pytest.approx(expected, rel=1e-12)


class Classifier(nn.Module):
    """Tokens, a mask of them, and a head that jobs train copies of."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = torch.tanh(self.body(self.embedding(input_ids))) * mask[..., None]
        return {"logits": self.head(states.sum(1) / mask.sum(1, keepdim=True)), "states": states}


def tokens(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 2, (rows,), generator=generator)}


def test_lengths_losses_and_heads_of_their_own():
    body = {"name": "body", "method": "lora", "target": "body", "matrix": {"rank": [2, 3]}, "train": {"lr": 0.1}}
    head = {"name": "head", "method": "full", "target": "head", "matrix": "body", "train": {"lr": 0.05}}
    c = deltaspec.compile(Classifier().double(), {"deltaspec": 1, "deltas": [body, head]})
    twin = copy.deepcopy(c)

    def cross(outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["labels"])

    def squared(outputs, batch):
        return (outputs["logits"][:, 0] - batch["labels"]).square().mean()

    data = [[tokens(3, 5, 0), tokens(2, 9, 1)], [tokens(4, 7, 2), tokens(1, 2, 3), tokens(2, 11, 4)]]
    names = [("body[rank=2]", "head[rank=2]"), ("body[rank=3]", "head[rank=3]")]
    assert [one.deltas for one in Job.each(c, "body", "head", data=data[0])] == names
    own = [Job(*n, data=d, loss=loss, steps=5) for n, d, loss in zip(names, data, (cross, squared), strict=True)]
    results = run(c, own)
    for deltas, batches, loss, result in zip(names, data, (cross, squared), results, strict=True):
        twin.only(*deltas)
        optimizer = torch.optim.AdamW(twin.parameter_groups(*deltas))
        for number in range(5):
            batch = batches[number % len(batches)]
            value = loss(twin(input_ids=batch["input_ids"]), batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            assert result.losses[number] == pytest.approx(value.item(), rel=1e-12)
        for name in deltas:
            for key, tensor in twin.deltas[name].tensors():
                assert torch.allclose(c.deltas[name].tensor(key), tensor, rtol=0, atol=1e-12)


def test_jobs_that_cannot_be_trained():
    c = compiled()
    names = [*c.deltas]
    endless = (batch for batch in [])
    wrong = [job(names[0], 0), job(names[0], 0), Job(names[1], data=[], steps=1), Job(names[2], data=endless, loss=mse)]
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        Training(c, wrong)
    assert [d.code for d in caught.value.diagnostics] == ["DS382", "DS382", "DS384", "DS382"]
    with pytest.raises(deltaspec.DeltaSpecError, match="DS434"):
        Training(c, [job("nope", 0)])
    with pytest.raises(deltaspec.DeltaSpecError, match="DS382.*no job"):
        Training(c, [])
    with pytest.raises(deltaspec.DeltaSpecError, match="DS383.*has no batches"):
        run(c, [Job(names[0], data=[], loss=mse, steps=1)])
    with pytest.raises(deltaspec.DeltaSpecError, match="DS384.*not one number"):
        run(c, [Job(names[0], data=[(torch.zeros(2, 8).double(),) * 2], loss=lambda o, t: o, steps=1)])
    with pytest.raises(TypeError, match="a job takes no 'lr'"):
        Job("x", data=[], lr=1)
    with pytest.raises(ValueError, match="needs evaluation"):
        Job("x", data=[], patience=1)


def test_a_checkpoint_of_other_jobs(tmp_path):
    c = compiled()
    training = Training(c, jobs(c))
    training.save(tmp_path)
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        Training(
            c, [job(next(iter(c.deltas)), 0, steps=3), Job([*c.deltas][1], data=[], loss=mse, steps=1, name="other")]
        ).load(tmp_path)
    assert len(caught.value.diagnostics) == 6 and {d.code for d in caught.value.diagnostics} == {"DS385"}
    (tmp_path / "jobs.pt").write_bytes(b"no checkpoint")
    with pytest.raises(deltaspec.DeltaSpecError, match="this is no checkpoint of jobs"):
        training.load(tmp_path)
    with pytest.raises(deltaspec.DeltaSpecError, match="there is no checkpoint"):
        training.load(tmp_path / "nowhere")


def test_an_error_in_a_step_leaves_all_as_it_was_before_it():
    c, twin = compiled(), compiled()
    name, count = next(iter(c.deltas)), []

    def breaks(outputs, target):
        count.append(1)
        if len(count) == 5:  # in the middle of the second step
            raise RuntimeError("broken")
        return mse(outputs, target)

    training = Training(c, [job(name, 0, loss=breaks, accumulate=3, steps=3)])
    with pytest.raises(RuntimeError, match="broken"):
        training.run(progress=False)
    results = training.run(progress=False)
    assert results[0].losses == run(twin, [job(name, 0, accumulate=3, steps=3)])[0].losses
    assert all(map(torch.equal, c.deltas[name].parameters(), twin.deltas[name].parameters()))


def test_parts_keep_the_mode_that_their_user_put_them_in():
    c = compiled().train()
    c.backbone.a.eval()
    modes = {name: module.training for name, module in c.named_modules()}
    seen = []
    training = Training(c, jobs(c, evaluation=[(torch.ones(2, 8).double(), torch.ones(2, 8).double())], steps=2))
    training.evaluate()
    assert {name: module.training for name, module in c.named_modules()} == modes
    training.run(progress=False, callback=lambda _: seen.append(c.backbone.a.training))
    assert {name: module.training for name, module in c.named_modules()} == modes and seen == [True] * 2
