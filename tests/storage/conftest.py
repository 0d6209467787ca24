"""What the tests of saved deltas share."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_set import save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path)
