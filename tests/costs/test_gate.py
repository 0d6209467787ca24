"""`expect: memory`: a bound that the estimate keeps, or one finding that says where it stands and what to lower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nets import Net
from tiny_models import ARCHITECTURES

import deltaspec
from deltaspec.planning.lock import check_lock, lock_data, write_lock

DELTA = {"name": "d", "method": "lora", "params": {"rank": 4}}
SIZES = {"batch": 4, "length": 16, "optimizer": "adamw"}


def spec(memory: Any, **delta: Any) -> dict[str, Any]:
    return {"deltaspec": 1, "deltas": [DELTA | delta], "expect": {"memory": memory}}


def test_the_bound_is_that_of_the_total() -> None:
    model = ARCHITECTURES["bert"]()
    total = deltaspec.estimate(model, spec("1TB"), **SIZES).total
    plan = deltaspec.plan(model, spec({"max": f"{total}B", **SIZES}))
    assert plan.memory[0] is not None and plan.memory[0].bytes == total
    assert "batch 4, length 16, adamw" in plan.checks[0] and "✓ a step of training takes" in str(plan)
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        deltaspec.compile(model, spec({"max": f"{total - 1}B", **SIZES}))
    (finding,) = caught.value.diagnostics
    assert finding.code == "DS505" and finding.suggestion is not None
    assert "kept activations" in finding.suggestion and "a batch below 4" in finding.suggestion
    assert "bert.encoder.layer.*" in finding.suggestion


def test_the_finding_stands_where_the_expectation_does(tmp_path: Path) -> None:
    path = tmp_path / "d.deltaspec.yaml"
    path.write_text('deltaspec: 1\ndeltas: [{name: d, method: lora}]\nexpect:\n  memory: "≤ 1KiB"\n')
    with pytest.raises(deltaspec.DeltaSpecError, match=r"d\.deltaspec\.yaml:4:11: error\[DS505\]"):
        deltaspec.plan(ARCHITECTURES["bert"](), path)
    path.write_text("deltaspec: 1\ndeltas: [{name: d, method: lora}]\nexpect:\n  memory: {max: 1TB, length: 40}\n")
    with pytest.raises(deltaspec.DeltaSpecError, match=r"yaml:4:30: error\[DS506\] length 40 is more than the 32"):
        deltaspec.plan(ARCHITECTURES["bert"](), path)


def test_specs_are_bounded_each_alone_and_all_findings_come_at_once() -> None:
    model = ARCHITECTURES["bert"]()
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        deltaspec.plan(model, spec("1KB"), spec("2KB", name="e"))
    assert [finding.code for finding in caught.value.diagnostics] == ["DS505", "DS505"]
    both = deltaspec.plan(model, spec("1GB"), spec({"max": "2GB", "batch": 1}, name="e"))
    alone = deltaspec.plan(model, spec("1GB"))
    assert len(both.memory) == 2 and both.memory[0] == alone.memory[0]
    assert [part.memory for part in both.parts()] == [both.memory[:1], both.memory[1:]]


def test_what_cannot_be_known_is_a_finding() -> None:
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS507.*\n.*example_inputs"):
        deltaspec.plan(Net(), spec("1GB", target="**.up"))
    with pytest.raises(deltaspec.DeltaSpecError, match="DS505"):  # the parts that are known are too much already
        deltaspec.plan(Net(), spec("1KB", target="**.up"))


def test_a_spec_that_is_added_keeps_to_its_bound() -> None:
    c = deltaspec.compile(ARCHITECTURES["bert"](), spec("1GB"))
    with pytest.raises(deltaspec.DeltaSpecError, match="DS505"):
        c.add(spec("1KB", name="e"))
    assert [delta.name for delta in c.plan.deltas] == ["d"]
    c.add(spec("1GB", name="e"))
    assert len(c.plan.memory) == 2 and c.plan.memory[1] is not None


def test_locks_show_it(tmp_path: Path) -> None:
    model, path = ARCHITECTURES["bert"](), tmp_path / "d.lock.json"
    plan = deltaspec.plan(model, spec({"max": "1GB", **SIZES}))
    (use,) = lock_data(plan)["memory"]
    assert use["max"] == "1GB" and use["for"] == {**SIZES, "checkpointing": False, "labels": True}
    write_lock(plan, path)
    assert check_lock(plan, path) == []
    text = path.read_text()
    path.write_text(text.replace(f'"bytes": {use["bytes"]}', f'"bytes": {int(use["bytes"] * 1.04)}'))
    assert check_lock(plan, path) == []  # versions of libraries may move it a little
    path.write_text(text.replace(f'"bytes": {use["bytes"]}', f'"bytes": {int(use["bytes"] * 1.1)}'))
    (finding,) = check_lock(plan, path)
    assert finding.code == "DS508" and "takes" in finding.message
    path.write_text(text.replace('"max": "1GB"', '"max": 3'))
    assert [finding.code for finding in check_lock(plan, path)] == ["DS511"]


def test_plans_without_the_expectation_estimate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaspec.compiler.estimate.answer", None)
    document = {"deltaspec": 1, "deltas": [DELTA]}
    assert "memory" not in lock_data(deltaspec.plan(ARCHITECTURES["bert"](), document))
