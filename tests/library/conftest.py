"""What the tests of libraries share."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_library import NAMES, build, lora, run
from torch import Tensor


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A directory of four deltas that are alike, and the logits under each."""
    source = build(*map(lora, NAMES))
    source.save(tmp_path / "deltas")
    return tmp_path / "deltas", {name: run(source, name) for name in NAMES}
