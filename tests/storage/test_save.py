"""Saving: what lies on disk, and what crashes, full disks and crowds leave there."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_set import CHOSEN, build, manifest, run

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError


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
