"""The plan as a value: fingerprints, equality, the parts of several specs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from nets import QV, Net, spec, tiny_bert

from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan

STRUCTURE = "sha256:3fefde8dfdc34e6f95021301046235ce8e97031571190d3d49ca1a73bbdd01cc"
FINGERPRINT = "sha256:78d1e3acdab264cb1ff3268034a2bf776cf816a336be6f39b217c4b41c98d005"


def test_meta_and_real_weights_of_any_dtype_give_the_same_plan() -> None:
    document = spec({"target": QV}, {"method": "adapter", "target": "bert.encoder.layer.*"})
    model = tiny_bert()
    real = plan(model, document)
    assert plan(copy.deepcopy(model).to("meta"), document).fingerprint == real.fingerprint
    assert plan(model.half(), document).fingerprint == real.fingerprint


def test_a_part_is_the_plan_of_its_spec_alone() -> None:
    one, two = (
        spec({"target": "head"}, seed=1),
        spec({"name": "b", "target": "spare"}, {"name": "c", "target": "**.up"}),
    )
    both = plan(Net(), one, two)
    assert [d.name for d in both.deltas] == ["d0", "b", "c"] and both["d0"].seed == 1 and both["c"].seed == 0
    assert both.parts() == (plan(Net(), one), plan(Net(), two))
    assert both.trainable == sum(part.trainable for part in both.parts())


def test_a_fingerprint_holds_what_decides_and_nothing_else() -> None:
    def print_of(*deltas: dict[str, Any], width: int = 8, **rest: Any) -> str:
        return plan(Net(width), spec(*deltas, **rest)).fingerprint

    up, head = {"target": "**.up"}, {"name": "h", "target": "head"}
    usual = print_of(up, head)
    assert usual == print_of(up | {"expect": {"sites": 2}}, head, expect={"untouched": ["spare"]})
    assert usual == print_of(up | {"target": {"regex": r"blocks\.\d\.up"}, "params": {"rank": 8}}, head)
    others = [
        print_of(head, up | {"name": "d0"}),
        print_of(up | {"attached": False}, head),
        print_of(up | {"params": {"dropout": 0.1}}, head),
        print_of(up | {"params": {"init": "normal"}}, head),
        print_of(up | {"name": "other"}, head),
        print_of(up, head, seed=1),
        print_of(up, head, width=16),
        print_of(up),
    ]
    assert len({usual, *others}) == 1 + len(others)


def test_a_fingerprint_is_the_same_everywhere() -> None:
    planned = plan(Net(), spec({"target": "**.up"}))
    assert planned.structure == STRUCTURE
    assert planned.fingerprint == FINGERPRINT


def test_plans_are_values() -> None:
    one, same, other = (plan(Net(), spec({"target": t})) for t in ("head", "head", "spare"))
    assert one == same and hash(one) == hash(same) and one != other and len({one, same, other}) == 2
    with pytest.raises(AttributeError):
        one.deltas = ()  # type: ignore[misc]
    with pytest.raises(KeyError, match="d0"):
        one["nothing"]
    assert isinstance(copy.deepcopy(one), Plan) and copy.deepcopy(one) == one
