"""Deltas that meet on one site: which come first, and which can only take turns."""

from __future__ import annotations

from nets import Net, codes, refused, spec

from deltaspec.planning.resolve import plan


def test_a_trained_copy_comes_first_on_its_site() -> None:
    lora, full = {"target": "head"}, {"method": "full", "target": "head"}
    assert len(plan(Net(), spec(full, lora)).sites) == 2
    (finding,) = refused(Net(), spec(lora, full))
    assert finding.code == "DS406" and "before 'd0'" in str(finding.suggestion)


def test_two_trained_copies_of_one_part_can_only_take_turns() -> None:
    full = {"method": "full", "target": "head"}
    assert codes(Net(), spec(full, full)) == ["DS406"]
    assert len(plan(Net(), spec(full, full | {"attached": False})).sites) == 2
    halves = [full | {"target": {"path": "head", "parameter": p}} for p in ("weight", "bias")]
    assert plan(Net(), spec(*halves)).trainable == 8 * 3 + 3
