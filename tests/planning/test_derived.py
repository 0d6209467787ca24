"""Derived deltas in the plan: what it and the lock say of them, their ranks, and what cannot be combined."""

import pytest
import torch
from blends import Net, X, spec
from torch import nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.planning.lock import check_lock, lock, lock_data
from deltaspec.planning.resolve import plan


def test_long_chains_and_many_ways_cost_no_more_than_their_length():
    deltas = spec(target="a")["deltas"][:2]
    names = ("french", "legal")
    for number in range(600):
        following = (f"x{number}", f"y{number}")
        deltas += [{"name": n, "from": dict.fromkeys(names, 0.5), "combine": "linear"} for n in following]
        names = following
    made = plan(Net(), {"deltaspec": 1, "deltas": deltas})
    assert len(made.deltas) == 1202
    compiled = deltaspec.compile(Net().eval(), {"deltaspec": 1, "deltas": deltas[:120]})
    compiled.only("x58")
    assert torch.isfinite(compiled(X)).all()


def test_the_plan_and_the_lock_say_what_it_is_built_from(tmp_path):
    made = plan(Net(), spec("ties", {"density": 0.5}, attached=False))
    text = "blend: derived from french × 0.7, legal × -0.3; combine=ties density=0.5 majority_sign=total"
    assert f"{text} (starts detached)" in " ".join(str(made).split())
    assert "2 sites, 0 trainable parameters" in str(made)
    assert "1 × down [3, 8] (buffer), up [6, 3] (buffer) = 0" in str(made)
    locked = lock_data(made)["deltas"]["blend"]
    params = {"density": 0.5, "majority_sign": "total"}
    assert locked["derived"] == {"from": {"french": 0.7, "legal": -0.3}, "combine": "ties", "params": params}
    path = tmp_path / "d.lock.json"
    path.write_text(lock(made), encoding="utf-8")
    assert check_lock(plan(Net(), spec("ties", {"density": 0.5}, attached=False)), path) == []
    other = plan(Net(), spec("ties", {"density": 0.6}, attached=False))
    assert other.fingerprint != made.fingerprint
    assert "DS514" in {found.code for found in check_lock(other, path)}


def test_it_says_so_where_it_would_add_to_its_sources():
    data = spec()
    assert plan(Net(), data).deltas[2].notes == ()
    data["deltas"][0]["attached"] = True
    assert "starts attached beside french, which it is built from" in str(plan(Net(), data))


def test_ranks_by_site():
    data = spec("cat", weights={"legal": 1, "french": 1})
    data["deltas"][0]["overrides"] = [{"match": "b", "params": {"rank": 1}}]
    assert [s.params.rank for s in plan(Net(), data).deltas[2].sites] == [6, 4]
    data["deltas"][2]["combine"] = "svd"
    assert [s.params.rank for s in plan(Net(), data).deltas[2].sites] == [3, 3]
    data["deltas"][2]["combine"] = "linear"
    with pytest.raises(DeltaSpecError, match=r"DS409.*linear needs sources of one rank, not 3, 1 \(b\)\n.*cat, or svd"):
        plan(Net(), data)


def test_budgets_of_sources_count_and_a_round_trip():
    data = spec("cat", source={"rank": {"budget": 60}})
    made = plan(Net(), data, example_inputs=X)
    assert [d.params.rank for d in made.deltas] == [2, 2, 4]
    loaded = deltaspec.load(data)
    assert deltaspec.load(loaded.to_data()) == loaded
    assert loaded.to_data()["deltas"][2] == {
        "name": "blend",
        "from": {"french": 0.7, "legal": -0.3},
        "combine": "cat",
        "attached": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[1].update(target="a"), r"french and legal have different sites; only french has \(b\)"),
        (lambda d: [e["params"].update(bias=True) for e in d[:2]], "a source changes the bias, too"),
        (lambda d: d[0]["params"].update(use_dora=True), "linear takes plain factors"),
        (lambda d: d[0]["params"].update(init="pissa"), "linear takes plain factors"),
        (lambda d: d[1]["params"].update(rank=2), "linear needs sources of one rank, not 3, 2"),
    ],
)
def test_what_the_plan_refuses(change, message):
    data = spec()
    for entry in data["deltas"][:2]:
        entry["params"] = dict(entry["params"])
    change(data["deltas"])
    with pytest.raises(DeltaSpecError, match=message) as caught:
        plan(Net(), data)
    assert {(f.code, f.where) for f in caught.value.diagnostics} == {("DS409", "deltas[2].from")}
    assert all(found.suggestion for found in caught.value.diagnostics)


def test_grouped_convolutions_and_norms_have_no_derived_form():
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(DeltaSpecError, match="DS409.*grouped convolution"):
        plan(grouped, spec(source={"rank": 2}), example_inputs=torch.zeros(1, 4, 3))
    with pytest.raises(DeltaSpecError, match="DS409.*low-rank update"):
        plan(nn.Sequential(nn.LayerNorm(4)), spec("svd", {"rank": 2}, method="ssf", source={}))
