"""Libraries beside a world that changes: sets saved again, links that move, views let go, another current directory."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from saved_library import NAMES, OWN, build, codes, file_of, lora, run, sign

from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError
from deltaspec.planning.planned import PlannedSite


def test_a_delta_that_was_saved_again_is_taken_in(saved):
    directory, wanted = saved
    compiled = build(OWN)
    library = compiled.library(directory)
    assert torch.equal(run(compiled, "french"), wanted["french"])
    source = build(*map(lora, NAMES[:3]), lora("polish", rank=3), number=2)
    source.save(directory)
    with pytest.raises(DeltaSpecError, match="saved again in the meantime"):
        library.load("german")
    compiled.only("french")
    with pytest.raises(DeltaSpecError, match="french.*is attached") as error:
        library.refresh()
    assert codes(error) == ["DS532"] and library.names == NAMES
    compiled.detach()
    library.refresh("german", "polish")
    assert torch.equal(run(compiled, "german"), run(source, "german"))
    assert torch.equal(run(compiled, "french"), wanted["french"])  # in memory, as it was
    assert torch.equal(run(compiled, "polish"), run(source, "polish"))
    library.refresh()
    assert library.names == (*NAMES[:3], "polish") and "dutch" not in compiled.deltas
    assert torch.equal(run(compiled, "french"), run(source, "french"))
    with pytest.raises(UnknownDeltaError):
        compiled.only("dutch")
    with pytest.raises(UnknownDeltaError):
        library.refresh("dutch")


def test_a_link_that_moves_and_new_folders(saved, tmp_path):
    source = build(lora("task"), number=3)
    for version in ("v1", "v2"):
        source.save(tmp_path / version)
        with torch.no_grad():
            next(source.deltas["task"].parameters()).add_(1)
    many = tmp_path / "many"
    many.mkdir()
    (many / "latest").symlink_to(tmp_path / "v1")
    compiled = build(OWN)
    library = compiled.library(many, by="folder")
    first = run(compiled, "latest")
    (many / "latest").unlink()
    (many / "latest").symlink_to(tmp_path / "v2")
    build(lora("other"), number=4).save(many / "new")
    library.refresh()
    assert library.names == ("latest", "new") and not torch.equal(run(compiled, "latest"), first)


def test_a_relative_path_survives_another_current_directory(saved, monkeypatch, tmp_path):
    directory, wanted = saved
    monkeypatch.chdir(directory.parent)
    compiled = build(OWN)
    library = compiled.library("deltas")
    monkeypatch.chdir("/")
    assert torch.equal(run(compiled, "dutch"), wanted["dutch"])
    library.refresh()


def test_views_that_were_let_go_keep_nothing_in_use(saved):
    compiled = build(OWN)
    library = compiled.library(saved[0], limit=1)
    gc.disable()
    try:
        view = compiled.view()
        view.only("french")
        del view
        compiled.only("german")  # DS531 while a view was in the way
        compiled.only("own")
        view = compiled.view()
        view.only("dutch")
        del view
        library.drop("dutch")
    finally:
        gc.enable()
    view = compiled.view()
    view.only("dutch")
    with pytest.raises(DeltaSpecError, match="DS532"):
        library.close()


def test_opening_and_closing_keeps_nothing(saved):
    def cycle() -> int:
        library = compiled.library(saved[0])
        run(compiled, "french")
        library.close()
        gc.collect()
        return sum(type(thing) is PlannedSite for thing in gc.get_objects())

    compiled = build(OWN)
    assert cycle() == cycle() == cycle()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("damage", ["longer", "shorter", "lock"])
def test_what_is_alike_is_checked_like_the_first(saved, first, damage):
    directory, _ = saved
    if damage == "lock":
        file_of(directory, "german", "lock").write_text("{}")
    else:
        resize = (lambda content: content + b"\0" * 8) if damage == "longer" else (lambda content: content[:-8])
        sign(directory, "german", "file", lambda path: path.write_bytes(resize(path.read_bytes())))
    compiled = build(OWN)
    library = compiled.library(directory)
    if not first:
        library.load("french")
    with pytest.raises(DeltaSpecError) as error:
        library.load("german")
    assert set(codes(error)) == {"DS522"}


def test_names_choose_some(saved):
    compiled = build(OWN)
    assert compiled.library(saved[0], "dutch", "french").names == ("french", "dutch")
    manifest = json.loads(Path(saved[0], "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["deltas"]] == list(NAMES)
