from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.names.folding import unfold
from deltaspec.planning import lock as lock_module
from deltaspec.planning.lock import check_lock, lock, lock_path, write_lock
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Net(nn.Module):
    def __init__(self, width: int = 8, layers: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head, self.spare = nn.Linear(width, classes), nn.Linear(width, classes)


def document(**changes: Any) -> dict[str, Any]:
    delta = {"name": "ups", "method": "lora", "params": {"rank": 2}, "target": "**.up"} | changes
    return {"deltaspec": 1, "deltas": [delta, {"name": "head", "method": "full", "target": "head"}]}


def planned(model: nn.Module | None = None, spec: dict[str, Any] | None = None) -> Plan:
    return plan(model or Net(), spec or document())


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    path = tmp_path / "net.deltaspec.lock.json"
    write_lock(planned(), path)
    return path


def one(findings: list[Diagnostic]) -> Diagnostic:
    assert all(finding.code in CODES for finding in findings)
    (finding,) = findings
    return finding


def test_a_lock_lies_beside_its_spec() -> None:
    assert lock_path("specs/french.deltaspec.yaml") == Path("specs/french.deltaspec.lock.json")
    assert lock_path("french.deltaspec.json") == Path("french.deltaspec.lock.json")
    assert lock_path(Path("a/b.yml")) == Path("a/b.lock.json")


def test_the_text_is_stable_json_with_one_group_a_line() -> None:
    text = lock(planned())
    assert text == lock(planned()) and text.endswith("}\n")
    data = json.loads(text)
    assert data["deltas"]["ups"]["groups"] == [
        {
            "at": "blocks.{0..3}.up",
            "sites": 4,
            "tensors": {"down": [2, 8], "up": [32, 2]},
            "params": {},
            "bypassed": False,
        }
    ]
    assert data["trainable"] == 4 * 2 * (8 + 32) + 3 * 8 + 3
    assert sum('"at":' in line for line in text.splitlines()) == text.count('"at":') == 2


def test_what_was_locked_checks(locked: Path) -> None:
    assert check_lock(planned(), locked) == []
    assert check_lock(planned(Net().to("meta")), locked) == []
    assert check_lock(planned(Net().half()), locked) == []
    reformatted = json.dumps(json.loads(locked.read_text()))
    locked.write_text(reformatted)
    assert check_lock(planned(), locked) == []


def test_the_locked_sites_are_all_sites(locked: Path) -> None:
    data = json.loads(locked.read_text())
    for delta in planned().deltas:
        names = [name for group in data["deltas"][delta.name]["groups"] for name in unfold(group["at"])]
        assert sorted(names) == sorted(site.fqn for site in delta.sites)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"params": {"rank": 2, "alpha": 8.0}}, [("DS514", "params.alpha is 8.0, was 16.0")]),
        ({"attached": False}, [("DS514", "attached is false, was true")]),
        ({"dtype": "float64"}, [("DS514", 'dtype is "float64", was absent')]),
        (
            {"method": "bitfit", "params": {}},
            [("DS514", 'method is "bitfit", was "lora"'), ("DS516", ""), ("DS516", "")],
        ),
        (
            {"target": {"path": "**.up", "layers": {"from": 2}}},
            [("DS515", "2 sites gone: blocks.{0..1}.up"), ("DS516", "160 trainable parameters, was 320")],
        ),
        (
            {"target": ["**.up", "blocks.3.down"]},
            [("DS515", "1 site new: blocks.3.down"), ("DS516", "400 trainable parameters, was 320")],
        ),
        (
            {"overrides": [{"match": "blocks.1.up", "params": {"rank": 1}}]},
            [
                ("DS516", "tensors are down [1, 8], up [32, 1], was down [2, 8], up [32, 2] (1 site: blocks.1.up)"),
                ("DS516", "overridden are rank 1, was none (1 site: blocks.1.up)"),
                ("DS516", "280 trainable parameters, was 320"),
            ],
        ),
        ({"target": {"regex": ".*up"}}, [("DS517", "the plan is the same")]),
    ],
)
def test_each_change_is_named(locked: Path, changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    findings = check_lock(planned(spec=document(**changes)), locked)
    assert [finding.code for finding in findings] == [code for code, _ in expected]
    for finding, (_, text) in zip(findings, expected, strict=True):
        assert text in finding.message and "deltaspec lock" in str(finding.suggestion)


def test_deltas_that_come_go_and_move(locked: Path) -> None:
    spec = document()
    spec["deltas"].append({"name": "more", "method": "lora", "target": "spare"})
    assert "'more'" in one(check_lock(planned(spec=spec), locked)).message
    spec = document()
    del spec["deltas"][1]
    assert "'head' is in net.deltaspec.lock.json" in one(check_lock(planned(spec=spec), locked)).message
    spec = document()
    spec["deltas"].reverse()
    assert "another order" in one(check_lock(planned(spec=spec), locked)).message


def test_another_seed_is_a_change(locked: Path) -> None:
    findings = check_lock(planned(spec=document() | {"seed": 1}), locked)
    assert [(f.code, "seed is 1, was 0" in f.message) for f in findings] == [("DS514", True)] * 2


def test_another_backbone_is_named(locked: Path) -> None:
    class Other(Net):
        pass

    assert '"Other"' in one(check_lock(planned(Other()), locked)).message
    wide = check_lock(planned(Net(classes=5)), locked)
    assert wide[0].code == "DS512" and "parameters" in wide[0].message
    retyped = Net()
    retyped.spare = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 3)  # the same shapes in another class
    finding = one(check_lock(planned(retyped), locked))
    assert finding.code == "DS512" and "structure" in finding.message
    tied = Net()
    tied.spare.weight = tied.head.weight
    spec = document()
    spec["deltas"][1]["params"] = {"tied": "alone"}
    assert check_lock(planned(tied, spec), locked)[0].code == "DS512"


def test_the_weights_do_not_matter(locked: Path) -> None:
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert check_lock(planned(model), locked) == []


def test_no_lock(tmp_path: Path) -> None:
    finding = one(check_lock(planned(), tmp_path / "none.lock.json"))
    assert finding.code == "DS510" and "deltaspec lock" in str(finding.suggestion)
    assert one(check_lock(planned(), tmp_path)).code == "DS510"  # a directory


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"lock": 2}',
        b'{"lock": 1}',
        b"<<<<<<< HEAD\n{}",
        b"[" * 100_000,
        b'{"lock": 1, "specs": [], "model": {}, "deltas": {"ups": []}, "sites": 0, "trainable": 0, "plan": ""}',
        b'{"lock": ' + b"9" * 10_000 + b"}",
    ],
)
def test_a_malformed_lock_is_one_clear_finding(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.lock.json"
    path.write_bytes(content)
    finding = one(check_lock(planned(), path))
    assert finding.code == "DS511" and finding.file == str(path) and "no lock file of deltaspec" in finding.message


def test_every_value_of_a_lock_is_checked(locked: Path) -> None:
    """Change each value of the lock in turn: none may go unseen, none may end in anything but findings."""
    whole = json.loads(locked.read_text())

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [path] * bool(path) + [p for key, item in items for p in places(item, (*path, key))]

    for path in places(whole):
        for other in ("odd", -1, None, [], {}, True, "{0..99999999}.{0..99999999}"):
            data = copy.deepcopy(whole)
            holder = data
            for key in path[:-1]:
                holder = holder[key]
            if holder[path[-1]] == other:
                continue
            holder[path[-1]] = other
            locked.write_text(json.dumps(data))
            findings = check_lock(planned_once(), locked)
            assert findings and all(f.code.startswith("DS51") for f in findings), (path, other)


_PLAN: list[Plan] = []


def planned_once() -> Plan:
    if not _PLAN:
        _PLAN.append(planned())
    return _PLAN[0]


def test_writing_is_atomic(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = locked.read_text()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(lock_module.os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                write_lock(planned(spec=document(attached=False)), locked)
        assert locked.read_text() == before and os.listdir(locked.parent) == [locked.name]


def test_a_link_to_a_lock_stays_a_link(locked: Path) -> None:
    link = locked.with_name("link.lock.json")
    link.symlink_to(locked)
    write_lock(planned(spec=document(attached=False)), link)
    assert link.is_symlink() and '"attached": false' in locked.read_text()


def test_odd_module_names_survive(tmp_path: Path) -> None:
    names = ["a{b", "x,y", "50%", "007", "3"]
    odd = nn.ModuleDict()
    for name in names:
        odd._modules[name] = nn.Linear(2, 2)
    model = nn.Module()
    model.odd = odd
    whole = plan(model, {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"type": "Linear"}}]})
    path = tmp_path / "odd.lock.json"
    write_lock(whole, path)
    assert check_lock(whole, path) == []


def test_provenance_is_locked_and_changes_neither_plan_nor_digest(tmp_path: Path) -> None:
    provenance = {"data": ["tweets", {"split": 1}], "licence": "MIT"}
    told = planned(spec=document(provenance=provenance))
    assert told == planned() and told.specs[0] == planned().specs[0]
    path = tmp_path / "net.deltaspec.lock.json"
    write_lock(told, path)
    assert json.loads(path.read_text())["deltas"]["ups"]["provenance"] == provenance
    assert check_lock(told, path) == []
    changed = one(check_lock(planned(), path))
    assert changed.code == "DS514" and "provenance is absent, was data" in changed.message


def test_what_a_saved_lock_says_of_lineage_does_not_count(locked: Path) -> None:
    locked.write_text(lock(planned(), {"base": {"id": "org/base"}, "parents": {"a": "sha256:0"}}))
    assert check_lock(planned(), locked) == []
