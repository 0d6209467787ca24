"""Saved deltas: what comes back, what is refused, and what a crash leaves."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Traceable
from repository import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.storage.saved import SavedSet

CHOSEN = ARCHITECTURES["traceable-modules"]
INPUTS = CHOSEN.inputs()
SPEC = {
    "deltaspec": 1,
    "seed": 5,
    "selectors": {"ends": ["head", "up"]},
    "deltas": [
        {"name": "norms", "method": "full", "target": ["bn", "norm"]},
        {"name": "low", "method": "lora", "params": {"rank": 2}, "target": {"ref": "ends"},
         "overrides": [{"match": "head", "params": {"rank": 3}}]},
        {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": "up", "attached": False},
    ],
}  # fmt: skip


def build(model: nn.Module | None = None, number: int = 1, spec: Any = None) -> CompiledModel:
    """Compile, and move all tensors off their initial values."""
    compiled = deltaspec.compile(model or CHOSEN.model(), spec or SPEC, capture="modules")
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for delta in compiled.deltas.values():
            for parameter in delta.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return compiled


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(INPUTS)


def state(compiled: CompiledModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in compiled.state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    compiled = build()
    compiled.only("low", "norms")
    compiled.save(tmp_path)
    return tmp_path


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder: Path, change: Any) -> None:
    """Change a manifest's data in place."""
    data = manifest(folder)
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def forge(folder: Path, delta: str, change: Any) -> Path:
    """Change the tensors of one delta, and make the manifest's digest fit."""
    entry = next(e for e in manifest(folder)["deltas"] if e["name"] == delta)
    path = folder / entry["file"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(folder, lambda data: next(e for e in data["deltas"] if e["name"] == delta).update(file_sha256=digest))
    return path


def refused(folder: Path, model: nn.Module | None = None) -> list[str]:
    """Return the codes with which both `load` and `restore` refuse; nothing may have changed."""
    compiled = build(model, number=2)
    before, snap = state(compiled), snapshot(compiled, identity=True)
    with pytest.raises(DeltaSpecError) as loading:
        compiled.load(folder)
    after = state(compiled)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert differences(snap, snapshot(compiled, identity=True)) == []
    fresh = model or CHOSEN.model()
    snap = snapshot(fresh, identity=True)
    with pytest.raises(DeltaSpecError) as restoring:
        deltaspec.restore(fresh, folder)
    assert differences(snap, snapshot(fresh, identity=True)) == []
    assert {d.code for d in restoring.value.diagnostics} <= {d.code for d in loading.value.diagnostics}
    for finding in loading.value.diagnostics:
        assert finding.suggestion, finding
        assert Path(finding.file).parent == folder
    return sorted(d.code for d in loading.value.diagnostics)


# What comes back


def test_everything_comes_back_in_this_process(saved):
    compiled = build()
    compiled.only("low", "norms")
    back = deltaspec.restore(CHOSEN.model(), saved)
    assert back.attached == ("norms", "low")
    for names in ((), ("low",), ("wide",), ("norms", "low", "wide")):
        compiled.only(*names)
        back.only(*names)
        assert torch.equal(run(compiled), run(back))
    assert back.plan.trainable == compiled.plan.trainable


def test_strengths_come_back(tmp_path):
    compiled = build()
    compiled.only({"low": 0.25, "wide": 1.0})
    compiled.save(tmp_path)
    back = deltaspec.restore(CHOSEN.model(), tmp_path)
    assert back.strengths == {"low": 0.25, "wide": 1.0}
    assert torch.equal(run(back), run(compiled))
    rewrite(tmp_path, lambda data: data.pop("strengths"))  # as sets saved by earlier versions are
    assert deltaspec.restore(CHOSEN.model(), tmp_path).strengths == {"low": 1.0, "wide": 1.0}


def test_everything_comes_back_in_another_process(tmp_path):
    compiled = build()
    compiled.only("norms", "low")
    compiled.save(tmp_path / "deltas")
    torch.save(run(compiled), tmp_path / "expected.pt")
    code = f"""
import sys; sys.path[:0] = {[str(Path(deltaspec.__file__).parents[1]), str(ROOT / "tests" / "support")]!r}
import torch, deltaspec
from models import ARCHITECTURES
chosen = ARCHITECTURES["traceable-modules"]
model = chosen.model()
back = deltaspec.restore(model, {str(tmp_path / "deltas")!r})
assert back.attached == ("norms", "low"), back.attached
with torch.no_grad():
    out = back(chosen.inputs())
    assert torch.equal(out, torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True))
    assert torch.equal(back.detach()(chosen.inputs()), model(chosen.inputs()))
print("restored")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "restored", done.stderr


def test_a_half_precision_backbone_comes_back(tmp_path):
    chosen = ARCHITECTURES["bert"]
    model = chosen.model().to(torch.bfloat16)
    spec = {"deltaspec": 1, "deltas": [{"name": "low", "method": "lora"}, {"name": "head", "method": "full"}]}
    compiled = build(model, spec=spec)
    compiled.save(tmp_path)
    back = deltaspec.restore(model, tmp_path)
    with torch.no_grad():
        left, right = compiled(**chosen.inputs()).logits, back(**chosen.inputs()).logits
    assert left.dtype is torch.bfloat16
    assert torch.equal(left, right)
    kinds = {key: value.dtype for key, value in back.deltas["low"].tensors()}
    assert set(kinds.values()) == {torch.float32}


def test_files_are_readable_by_others(saved):
    entries = {entry["name"]: entry for entry in manifest(saved)["deltas"]}
    assert set(entries) == {"norms", "low", "wide"}
    tensors = load_file(saved / entries["low"]["file"])
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "head.down": (3, 24), "head.up": (5, 3), "up.down": (2, 8), "up.up": (24, 2),
    }  # fmt: skip
    assert set(load_file(saved / entries["norms"]["file"])) == {
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
        "norm.weight",
        "norm.bias",
    }
    spec = deltaspec.load(saved / entries["low"]["spec"])
    assert [delta.name for delta in spec.deltas] == ["low"]
    assert spec.deltas[0].params.rank == 2
    assert spec.seed == 5


def test_saving_again_replaces_the_set_and_leaves_strangers_alone(saved):
    (saved / "notes.txt").write_text("mine")
    first = set(os.listdir(saved))
    build(number=3).save(saved)
    second = set(os.listdir(saved))
    assert "notes.txt" in second and len(first) == len(second)
    assert first & second == {"notes.txt", "manifest.json"}
    assert torch.equal(run(deltaspec.restore(CHOSEN.model(), saved)), run(build(number=3)))


def test_saving_does_not_depend_on_what_is_attached(tmp_path):
    compiled = build()
    compiled.save(tmp_path / "a")
    compiled.detach()
    compiled.save(tmp_path / "b")
    one, two = manifest(tmp_path / "a"), manifest(tmp_path / "b")
    assert one.pop("attached") == ["norms", "low"] and two.pop("attached") == []
    assert one == two


def test_nothing_is_unpickled(saved, monkeypatch):
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    assert deltaspec.restore(CHOSEN.model(), saved).attached == ("norms", "low")


# What is refused


def test_no_directory_and_no_manifest(tmp_path):
    assert refused(tmp_path / "nowhere") == ["DS521"]
    assert refused(tmp_path) == ["DS521"]
    (tmp_path / "manifest.json").mkdir()
    assert refused(tmp_path) == ["DS521"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("head.up"),
        lambda tensors: tensors.update({"tail.up": torch.zeros(2)}),
    ],
    ids=["missing", "surplus"],
)
def test_missing_and_surplus_tensors(saved, change):
    forge(saved, "low", change)
    assert refused(saved) == ["DS525"]


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("head.up", torch.zeros(3, 5), "DS526"),
        ("head.up", torch.zeros(5, 3, 1), "DS526"),
        ("head.up", torch.zeros(5, 3, dtype=torch.int64), "DS526"),
        ("head.up", torch.zeros(5, 3, dtype=torch.float8_e5m2), "DS526"),
        ("head.up", torch.full((5, 3), float("nan")), "DS527"),
        ("head.up", torch.full((5, 3), float("-inf")), "DS527"),
    ],
    ids=["transposed", "rank", "integers", "float8", "nan", "inf"],
)
def test_tensors_that_do_not_fit(saved, key, value, code):
    forge(saved, "low", lambda tensors: tensors.update({key: value}))
    assert refused(saved) == [code]


def test_all_findings_come_at_once(saved):
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["up.up"]
        tensors["up.sideways"] = torch.zeros(1)
        tensors["up.down"] = torch.zeros(1, 1)
        tensors["head.up"] = torch.full((5, 3), float("nan"))

    forge(saved, "low", damage)
    entry = next(e for e in manifest(saved)["deltas"] if e["name"] == "wide")
    (saved / entry["file"]).unlink()
    assert refused(saved) == ["DS521", "DS525", "DS525", "DS526", "DS527"]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file(saved, keep):
    path = saved / manifest(saved)["deltas"][1]["file"]
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(saved) == ["DS522"]


def test_a_truncated_file_whose_digest_was_made_to_fit(saved):
    path = saved / manifest(saved)["deltas"][1]["file"]
    path.write_bytes(path.read_bytes()[:-8])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(saved, lambda data: data["deltas"][1].update(file_sha256=digest))
    assert refused(saved) == ["DS522"]


def test_a_flipped_bit(saved):
    path = saved / manifest(saved)["deltas"][1]["file"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert refused(saved) == ["DS522"]


def test_a_pickle_in_place_of_safetensors(saved):
    path = saved / manifest(saved)["deltas"][1]["file"]
    torch.save({"head.up": torch.zeros(5, 3)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(saved, lambda data: data["deltas"][1].update(file_sha256=digest))
    assert refused(saved) == ["DS522"]


class Wider(Traceable):
    """The same net with another head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 6)


def test_another_backbone_and_other_weights(saved):
    with pytest.raises(DeltaSpecError, match=r"DS523.*another backbone: Traceable, whose structure differs"):
        deltaspec.restore(Wider().eval(), saved)
    # Nor is another kind of model taken for a mistake in the spec.
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(nn.Sequential(nn.Linear(2, 2)), saved)
    assert [d.code for d in caught.value.diagnostics][:2] == ["DS523", "DS302"]
    other = CHOSEN.model()
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    assert refused(saved, other) == ["DS523"]
    assert refused(saved, CHOSEN.model().double()) == ["DS523"]


def test_a_delta_that_the_model_lacks(saved):
    spec = {"deltaspec": 1, "deltas": [{"name": "norms", "method": "full", "target": ["bn", "norm"]}]}
    compiled = build(spec=spec)
    kept = state(compiled)
    with pytest.raises(DeltaSpecError) as caught:
        compiled.load(saved)
    assert [d.code for d in caught.value.diagnostics] == ["DS524", "DS524"]
    assert all(torch.equal(kept[key], value) for key, value in state(compiled).items())


def test_a_model_with_more_deltas_loads_those_that_were_saved(saved):
    more = json.loads(json.dumps(SPEC))
    more["deltas"].append({"name": "extra", "method": "bitfit", "target": "head"})
    compiled = build(number=4, spec=more)
    kept = {key: value.clone() for key, value in compiled.deltas["extra"].tensors()}
    compiled.load(saved)
    assert all(torch.equal(kept[key], value) for key, value in compiled.deltas["extra"].tensors())
    compiled.only("norms", "low")
    assert torch.equal(run(compiled), run(deltaspec.restore(CHOSEN.model(), saved)))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"text"', "{}", '{"deltaspec": 2}', '{"deltaspec": 1}',
        '{"deltaspec": 1, "backbone": {}, "deltas": [], "attached": []}',
        "[" * 100_000, "\0", "\ufeff{}",
    ],
)  # fmt: skip
def test_a_malformed_manifest(saved, text):
    (saved / "manifest.json").write_text(text)
    assert refused(saved) == ["DS522"]


def test_a_manifest_with_a_key_twice(saved):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text.replace('"attached": [', '"attached": [], "attached": [', 1))
    assert refused(saved) == ["DS522"]


def test_a_manifest_that_is_no_text(saved):
    (saved / "manifest.json").write_bytes(b"\xff\xfe\x00{")
    assert refused(saved) == ["DS522"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["deltas"][0].pop("file_sha256"),
        lambda data: data["deltas"][0].update(file=3),
        lambda data: data["deltas"].append("norms"),
        lambda data: data["deltas"].append(dict(data["deltas"][0])),
        lambda data: data.update(attached=["nobody"]),
        lambda data: data.update(attached="low"),
        lambda data: data.update(attached=[["low"]]),
        lambda data: data.update(attached=[1]),
        lambda data: data.update(strengths=["low"]),
        lambda data: data.update(strengths={"low": "much"}),
        lambda data: data.update(strengths={"low": float("nan")}),
        lambda data: data.update(strengths={"low": 10**400}),
        lambda data: data.update(backbone={"class": "x"}),
        lambda data: data.update(backbone=[]),
        lambda data: data.update(deltas={}),
        lambda data: data.update(deltaspec=True),
        lambda data: data["backbone"].update(weights=7),
    ],
)
def test_a_manifest_with_a_part_that_is_wrong(saved, change):
    rewrite(saved, change)
    codes = refused(saved)
    assert codes in (["DS522"], ["DS523"])


@pytest.mark.parametrize("field", ["file", "spec", "lock"])
@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/{}", "..", ".", "", "a\0b", "..\\{}"])
def test_a_manifest_that_points_out_of_its_directory(saved, field, name):
    original = manifest(saved)["deltas"][0][field]
    target = saved / "sub"
    target.mkdir()
    (target / original).write_bytes((saved / original).read_bytes())
    rewrite(saved, lambda data: data["deltas"][0].update({field: name.format(original)}))
    assert refused(saved) in (["DS522"], ["DS521"])


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_lock_that_was_damaged(saved, change):
    change(saved / manifest(saved)["deltas"][1]["lock"])
    assert refused(saved) in (["DS521"], ["DS522"])


@pytest.mark.parametrize("text", ['{"deltas": [{"name": "low", "params": 3}]}', "[" * 100_000, "[]", "null"])
def test_a_forged_spec_is_not_loaded(saved, text):
    compiled = build(number=2)
    before = state(compiled)
    (saved / manifest(saved)["deltas"][1]["spec"]).write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    rewrite(saved, lambda data: data["deltas"][1].update(spec_sha256=digest))
    with pytest.raises(DeltaSpecError, match="DS522"):
        compiled.load(saved)
    assert all(torch.equal(before[key], value) for key, value in state(compiled).items())


def test_a_model_without_values_is_neither_saved_nor_loaded(saved):
    with torch.device("meta"):
        model = Traceable().eval()
    for forbidden in (lambda: build(model).save(saved), lambda: deltaspec.restore(model, saved)):
        files = {path: path.read_bytes() for path in saved.iterdir()}
        with pytest.raises(DeltaSpecError) as caught:
            forbidden()
        assert [d.code for d in caught.value.diagnostics] == ["DS534"] * 3
        assert files == {path: path.read_bytes() for path in saved.iterdir()}


def test_a_saved_spec_that_was_damaged(saved):
    (saved / manifest(saved)["deltas"][1]["spec"]).write_text("{")
    with pytest.raises(DeltaSpecError, match="DS522"):
        deltaspec.restore(CHOSEN.model(), saved)
    (saved / manifest(saved)["deltas"][1]["spec"]).unlink()
    with pytest.raises(DeltaSpecError):
        deltaspec.restore(CHOSEN.model(), saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_deltas_are_not_saved(tmp_path, value):
    compiled = build()
    good = build()
    good.save(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for name in ("low", "wide"):
        with torch.no_grad():
            next(compiled.deltas[name].parameters()).view(-1)[0] = value
    with pytest.raises(DeltaSpecError) as caught:
        compiled.save(tmp_path)
    assert [d.code for d in caught.value.diagnostics] == ["DS520", "DS520"]
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == files


# Crashes and crowds


def writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the replacements of one save."""
    calls = []
    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: (calls.append(b), real(a, b))[1])
        build(number=8).save(folder)
    return len(calls)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_crash_between_any_two_writes_leaves_the_old_set_or_the_new(tmp_path, monkeypatch, kind):
    old, new = build(number=1), build(number=2)
    expected = {"old": run(old), "new": run(new)}
    seen = []
    total = writes(tmp_path / "count", monkeypatch)
    assert total == 10  # three files a delta, and the manifest
    real = os.replace
    for crash_at in range(total + 1):
        folder = tmp_path / str(crash_at)
        old.save(folder)
        left = [crash_at]

        def replace(source: str, target: str, left: list[int] = left) -> None:
            if left[0] == 0:
                raise kind("the power went out")
            left[0] -= 1
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            if crash_at < total:
                with pytest.raises(kind):
                    new.save(folder)
            else:
                new.save(folder)
        back = run(deltaspec.restore(CHOSEN.model(), folder))
        seen.append(next(which for which, output in expected.items() if torch.equal(back, output)))
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        new.save(folder)  # and the directory is of use again
        assert torch.equal(run(deltaspec.restore(CHOSEN.model(), folder)), expected["new"])
    assert seen == ["old"] * total + ["new"]


def test_a_crash_while_the_old_files_are_removed_leaves_the_new_set(tmp_path, monkeypatch):
    build(number=1).save(tmp_path)
    new = build(number=2)

    def unlink(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink)
        new.save(tmp_path)
    assert torch.equal(run(deltaspec.restore(CHOSEN.model(), tmp_path)), run(new))


def test_saving_clears_away_what_killed_saves_left(saved):
    build(number=3).save(saved)
    whole = set(os.listdir(saved))
    left = ["low.01234567.safetensors", ".low.01234567.safetensors.0123456789abcdef", ".manifest.json.0123456789abcdef"]
    mine = ["low.safetensors", ".low.01234567.safetensors.swp", "manifest.json.0123456789abcdef"]
    for name in left + mine:
        (saved / name).write_bytes(b"half of")
    build(number=3).save(saved)
    assert set(os.listdir(saved)) == whole | set(mine)


def test_a_save_that_fails_on_a_full_disk_leaves_nothing_behind(saved, monkeypatch):
    before = set(os.listdir(saved))
    real, written = os.fsync, []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        build(number=3).save(saved)
    assert set(os.listdir(saved)) == before


@pytest.mark.parametrize("read", ["load", "restore", "library"])
def test_reading_while_the_deltas_are_saved_again_gives_the_new_ones(tmp_path, monkeypatch, read):
    old, new = build(number=1), build(number=2)
    old.save(tmp_path)
    real, calls = SavedSet.read, []

    def once_saved_again(saved: SavedSet, name: str, field: str) -> Any:
        calls.append(name)
        if len(calls) == 4:
            new.save(tmp_path)
        return real(saved, name, field)

    monkeypatch.setattr(SavedSet, "read", once_saved_again)
    if read == "restore":
        assert torch.equal(run(deltaspec.restore(CHOSEN.model(), tmp_path)), run(new))
    elif read == "load":
        assert torch.equal(run(build(number=3).load(tmp_path)), run(new))
    else:  # it knows the deltas as they were, and says so
        known = build(spec={"deltaspec": 1, "deltas": [{"name": "own", "method": "bitfit", "target": "head"}]})
        known.library(tmp_path)
        new.save(tmp_path)
        with pytest.raises(DeltaSpecError, match="DS521.*saved again in the meantime"):
            known.only("low")


def test_a_save_that_comes_while_another_cleans_up_keeps_its_files(tmp_path, monkeypatch):
    one, two = build(number=1), build(number=2)
    two.save(tmp_path)
    real = Path.unlink
    started: list[threading.Thread] = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if not started:  # the other save wants to write again the very files that this one is about to remove
            started.append(threading.Thread(target=two.save, args=(tmp_path,)))
            started[0].start()
            started[0].join(timeout=0.3)
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        one.save(tmp_path)
        started[0].join()
    assert torch.equal(run(deltaspec.restore(CHOSEN.model(), tmp_path)), run(two))


def test_saving_at_the_same_time_leaves_one_whole_set(tmp_path):
    models = [build(number=n) for n in range(4)]
    failures: list[BaseException] = []
    gate = threading.Barrier(len(models))

    def work(compiled: CompiledModel) -> None:
        try:
            gate.wait()
            for _ in range(5):
                compiled.save(tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(compiled,)) for compiled in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    back = run(deltaspec.restore(CHOSEN.model(), tmp_path))
    assert sum(torch.equal(back, run(compiled)) for compiled in models) == 1


def test_running_statistics_are_part_of_what_a_backbone_is(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
            self.u = parametrizations.spectral_norm(nn.Linear(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.u(self.norm(self.a(x)))

    torch.manual_seed(0)
    model = Normed().train()
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora", "target": "a"}]}
    c = deltaspec.compile(model, spec, example_inputs=torch.randn(3, 4))
    c(torch.randn(3, 4))  # spectral_norm writes its vectors, which are put back once nothing is attached
    c.save(tmp_path)
    assert deltaspec.restore(model, tmp_path, example_inputs=torch.randn(3, 4)).attached == ("a",)
    c.load(tmp_path)
    moved = copy.deepcopy(model)
    moved.norm.running_mean += 1.0
    with pytest.raises(DeltaSpecError, match="DS523"):
        deltaspec.restore(moved, tmp_path, example_inputs=torch.randn(3, 4))
