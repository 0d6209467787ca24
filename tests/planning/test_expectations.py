"""`expect`: what a spec's author counts on, compared with what the plan comes to."""

from __future__ import annotations

from typing import Any

import pytest
from nets import Net, codes, refused, spec

from deltaspec.planning.resolve import plan


@pytest.mark.parametrize(
    ("expect", "code"),
    [
        ({"sites": 2}, None),
        ({"sites": 3}, "DS501"),
        ({"sites": {"min": 3}}, "DS501"),
        ({"sites": {"max": 1}}, "DS501"),
        ({"sites": {"min": 1, "max": 2}, "trainable": 640}, None),
        ({"trainable": {"max": 639}}, "DS502"),
        ({"trainable": {"min": 641}}, "DS502"),
    ],
)
def test_expectations_of_a_delta(expect: dict[str, Any], code: str | None) -> None:
    document = spec({"target": "**.up", "expect": expect})  # 2 sites, each 8 * (8 + 32)
    if code is None:
        assert len(plan(Net(), document)["d0"].checks) == len(expect)
    else:
        (finding,) = refused(Net(), document)
        assert finding.code == code
        assert ("2 sites" if code == "DS501" else "640") in finding.message and finding.suggestion


def test_expectations_of_a_spec() -> None:
    model = Net()
    share = 640 / sum(p.numel() for p in model.parameters())
    up = {"target": "**.up"}
    assert plan(model, spec(up, expect={"trainable": {"max_fraction": share}})).checks
    assert codes(model, spec(up, expect={"trainable": {"max_fraction": share * 0.999}})) == ["DS503"]
    assert codes(model, spec(up, expect={"trainable": 641})) == ["DS503"]
    assert plan(model, spec(up, expect={"trainable": {"min": 640, "max": 640}})).checks
    assert plan(model, spec(up, expect={"untouched": ["head", "blocks.*.norm"]})).checks
    for untouched in ("blocks.1", "blocks", {"path": "blocks.0.up", "parameter": "weight"}):
        assert codes(model, spec(up, expect={"untouched": [untouched]})) == ["DS504"]


def test_untouched_parameters_of_a_module_that_is_touched_elsewhere() -> None:
    weight = {"method": "full", "target": {"path": "head", "parameter": "weight"}}
    for parameter, ok in (("bias", True), ("weight", False)):
        document = spec(weight, expect={"untouched": [{"path": "head", "parameter": parameter}]})
        assert bool(plan(Net(), document)) if ok else codes(Net(), document) == ["DS504"]
