"""A budget in place of a rank: the largest rank that fits; what the plan, the lock and the saved spec say of it."""

import json
from itertools import takewhile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES
from torch import nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods
from deltaspec.methods.shared.rank import MAX_RANK, Budget
from deltaspec.planning.budget import largest
from deltaspec.planning.lock import check_lock, lock, lock_data
from deltaspec.planning.resolve import plan
from deltaspec.planning.text import markdown


class Net(nn.Module):
    """Three linear layers: a rank of LoRA costs 12 + 12 + 20 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def spec(rank, method="lora", params=None, **entry):
    params = {"rank": rank, **(params or {})}
    return {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": params, "target": ["*"], **entry}]}


def findings(model, data):
    with pytest.raises(DeltaSpecError) as caught:
        plan(model, data)
    return caught.value.diagnostics


@pytest.mark.parametrize(
    ("budget", "rank"), [(44, 1), (87, 1), (88, 2), (1000, 22), ("100 %", 4), ("50%", 2), ("24%", 1)]
)
def test_the_largest_rank_that_fits(budget, rank):
    made = plan(Net(), spec({"budget": budget}))
    assert made.base_parameters == 184
    assert (made.deltas[0].params.rank, made.trainable) == (rank, 44 * rank)
    assert made == plan(Net(), spec(rank))
    assert made.fingerprint == plan(Net(), spec(rank)).fingerprint


def test_the_plan_prints_rank_and_budget():
    for budget, words in (({"budget": "50%"}, "rank=2 (budget 50 %)"), ({"budget": 4400}, "rank=100 (budget 4,400)")):
        made = plan(Net(), spec(budget))
        assert f"d: lora {words} alpha=16 dropout=0" in str(made)
        assert words in markdown(made)
    assert "budget" not in str(plan(Net(), spec(2)))


def test_an_override_keeps_its_rank_and_takes_its_part_of_the_budget():
    override = [{"match": "c", "params": {"rank": 3}}, {"match": "b", "params": {"alpha": 4}}]
    made = plan(Net(), spec({"budget": 110}, overrides=override))
    assert [(s.fqn, s.params.rank, s.params.alpha) for s in made.sites] == [("a", 2, 16), ("b", 2, 4), ("c", 3, 16)]
    assert made.trainable == 2 * 24 + 3 * 20
    [found] = findings(Net(), spec({"budget": 83}, overrides=override))
    assert (found.code, "rank 1 on 3 sites takes 84" in found.message) == ("DS408", True)


def test_too_small_a_budget_names_the_smallest_count():
    [found] = findings(Net(), spec({"budget": 43}))
    assert found.code == "DS408"
    assert "a budget of 43 trainable parameters is too small: rank 1 on 3 sites takes 44" in found.message
    assert found.suggestion == "write budget: 44 or more, or choose fewer sites"
    assert found.where == "deltas[0].params.rank.budget"
    [found] = findings(Net(), spec({"budget": "1%"}))
    assert "a budget of 1 trainable parameters (1 % of 184) is too small" in found.message
    [found] = findings(Net(), spec({"budget": 80}, params={"init": "orthogonal"}))
    assert "rank 2 on 3 sites takes 88" in found.message


def test_ranks_that_a_site_refuses_are_left_out():
    assert plan(Net(), spec({"budget": 44 * 3}, params={"init": "orthogonal"})).deltas[0].params.rank == 2
    assert plan(Net(), spec({"budget": 44 * 9}, params={"init": "pissa"})).deltas[0].params.rank == 4
    assert plan(Net(), spec({"budget": 10**6}, "hra", {"orthogonal": True})).deltas[0].params.rank == 4
    grouped = nn.Sequential(nn.Conv1d(6, 6, 1, groups=3))
    made = plan(grouped, spec({"budget": 50}), example_inputs=torch.zeros(1, 6, 4))
    assert (made.deltas[0].params.rank, made.trainable) == (12, 12 * 2 + 6 * 4)


def test_sites_that_refuse_every_rank_are_reported_as_such():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert [f.code for f in findings(model, spec({"budget": 100}))] == ["DS402"]


def test_where_more_rank_adds_nothing_the_smallest_such_rank_is_taken():
    made = plan(Net(), spec({"budget": 10**6}, "lokr"))
    rank = made.deltas[0].params.rank
    assert made.trainable == plan(Net(), spec(1000, "lokr")).trainable
    assert made.trainable != plan(Net(), spec(rank - 1, "lokr")).trainable


@pytest.mark.parametrize(
    "name", [n for n, m in methods().items() if "rank" in m.Params.model_fields and n != "adalora"]
)
def test_every_method_with_a_rank_takes_a_budget(name):
    model = ARCHITECTURES["bert"].model()
    extra = {"compacter": {"width": 8, "divisions": 2}, "low_rank_adapter": {"width": 8}}.get(name, {})
    entry = {"name": "d", "method": name, "params": {"rank": 3, **extra}}
    limit = plan(model, {"deltaspec": 1, "deltas": [entry]}).trainable + 1
    made = plan(model, {"deltaspec": 1, "deltas": [{**entry, "params": {"rank": {"budget": limit}, **extra}}]})
    assert (made.deltas[0].params.rank, made.trainable) == (3, limit - 1)


def test_adalora_spends_a_budget_on_the_rank_it_starts_with():
    made = plan(Net(), spec(2, "adalora", {"initial_rank": {"budget": 4 * 47 + 1}}))
    assert (made.deltas[0].params.rank, made.deltas[0].params.initial_rank, made.trainable) == (2, 4, 4 * 47)
    assert "initial_rank=4 (budget 189)" in str(made)


def test_default_targets_and_several_budgets_in_one_spec():
    model = ARCHITECTURES["bert"].model()
    deltas = [{"name": n, "method": "lora", "params": {"rank": {"budget": b}}} for n, b in (("x", 2000), ("y", 4000))]
    made = plan(model, {"deltaspec": 1, "deltas": deltas})
    assert [d.trainable <= b < d.trainable + d.trainable // d.params.rank
            for d, b in zip(made.deltas, (2000, 4000), strict=True)] == [True, True]  # fmt: skip
    assert [entry.params.rank for entry in made.specs[0].deltas] == [d.params.rank for d in made.deltas]


def test_the_lock_has_the_rank(tmp_path):
    made = plan(Net(), spec({"budget": "50%"}))
    assert lock_data(made)["deltas"]["d"]["params"]["rank"] == 2
    path = tmp_path / "d.lock.json"
    path.write_text(lock(made))
    assert check_lock(plan(Net(), spec({"budget": "50%"})), path) == []
    [found, *_] = check_lock(plan(Net(), spec({"budget": "80%"})), path)
    assert found.code == "DS514" and "params.rank is 3, was 2" in found.message


def test_the_saved_spec_has_the_rank_and_restores(tmp_path):
    model = Net().eval()
    compiled = deltaspec.compile(model, spec({"budget": 90}))
    with torch.no_grad():
        for parameter in compiled.trainable_parameters():
            parameter.normal_()
    compiled.save(tmp_path)
    [saved] = tmp_path.glob("d.*.deltaspec.json")
    assert json.loads(saved.read_text())["deltas"][0]["params"]["rank"] == 2
    again, x = deltaspec.restore(model, tmp_path), torch.randn(2, 8)
    assert torch.equal(again(x), compiled(x))
    assert again.plan.deltas[0].params.rank == 2


def test_a_spec_with_a_budget_goes_around():
    loaded = deltaspec.load(spec({"budget": "0.25%"}))
    assert loaded.to_data()["deltas"][0]["params"]["rank"] == {"budget": "0.25%"}
    assert deltaspec.load(loaded.to_data()) == loaded
    assert loaded.deltas[0].params.rank == Budget(budget="0.25%")


@pytest.mark.parametrize(
    ("rank", "code", "message", "hint"),
    [
        ("8", "DS203", 'rank must be an integer or a mapping with budget, not the text "8"', "write 8, without quotes"),
        ("2%", "DS203", 'a mapping with budget, not the text "2%"', 'write {budget: "2%"}'),
        ([8], "DS203", "rank must be an integer or a mapping with budget, not a list", None),
        (0, "DS204", "rank must be at least 1, not 0", None),
        ({}, "DS202", 'rank lacks the key "budget"', None),
        ({"budget": 0}, "DS204", "budget must be at least 1, not 0", None),
        ({"budget": True}, "DS203", "budget must be an integer or text, not true", 'per cent sign: "0.5%"'),
        ({"budget": "0,5%"}, "DS208", '"0,5%" is not a budget', "write a number of parameters"),
        ({"budget": "101%"}, "DS208", '"101%" is not a budget', "write a number of parameters"),
        ({"budget": 5, "max": 3}, "DS201", 'unknown key "max"', "known keys: budget"),
    ],
)
def test_wrong_values(rank, code, message, hint):
    [found] = deltaspec.validate(spec(rank))
    assert found.code == code and message in found.message
    assert hint is None or hint in found.suggestion


def test_a_budget_in_an_override_is_refused():
    override = [{"match": "a", "params": {"rank": {"budget": 30}}}]
    [found] = deltaspec.validate(spec(4, overrides=override))
    assert (found.code, found.where) == ("DS210", "deltas[0].overrides[0].params.rank")
    assert "the whole delta's" in found.message


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 7), st.integers(1, 5000), st.integers(0, 10**6))
def test_search_agrees_with_trying_every_rank(slope, start, step, most, limit):
    """Refused: all but multiples of `step`, and those above `most`; the total stays once it reaches rank 1000."""

    def total(rank):
        return None if rank % step or rank > most else start + slope * min(rank, 1000)

    accepted = [(r, total(r)) for r in range(step, min(most, MAX_RANK) + 1, step)]
    fitting = list(takewhile(lambda pair: pair[1] <= limit, accepted))
    if not accepted:
        assert largest(total, limit) is None
    elif not fitting:
        assert largest(total, limit) == accepted[0]
    else:
        assert largest(total, limit) == next(pair for pair in accepted if pair[1] == fitting[-1][1])


def test_a_fraction_for_a_budget_is_one_finding():
    for params in ({"rank": {"budget": 0.5}}, {"rank": 0.5}):
        [finding] = deltaspec.validate({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "params": params}]})
        assert finding.code == "DS203"
