"""Directories that hold a model, or another library's adapter, are left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.occupied import refuse_inside, refuse_occupied


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_the_weights_of_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DeltaSpecError, match="holds the weights of a model"):
        refuse_occupied(tmp_path, adapters=False)


def test_an_adapter_of_another_library(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse_occupied(tmp_path, adapters=False)
    with pytest.raises(DeltaSpecError, match="holds an adapter of another library"):
        refuse_occupied(tmp_path)


def test_an_empty_directory_and_none(tmp_path: Path) -> None:
    refuse_occupied(tmp_path)
    refuse_occupied(tmp_path / "none")


def test_what_is_read_is_no_place_to_write(tmp_path: Path) -> None:
    read = tmp_path / "read"
    (read / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(read)
    for place in ("read", "read/below", "read/new/deep", "link", "link/new", "other/../read"):
        with pytest.raises(DeltaSpecError, match="DS590") as raised:
            refuse_inside(tmp_path / place, tmp_path / "elsewhere", read)
        assert "outside of it" in str(raised.value)
    for place in (".", "readable", "new/read"):
        refuse_inside(tmp_path / place, read)
