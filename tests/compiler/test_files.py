"""What `save_as` is given: values of other kinds are refused in plain words, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaspec

SPEC = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora", "target": "0"}]}


@pytest.fixture(scope="module")
def compiled() -> Any:
    torch.manual_seed(0)
    return deltaspec.compile(nn.Sequential(nn.Linear(4, 4)), SPEC)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"form": 5}, TypeError, "form must be a name such as 'peft', not 5"),
        ({"form": []}, TypeError, "form must be a name"),
        ({"directory": None}, TypeError, "directory must be a path, not None"),
        ({"directory": ""}, ValueError, "directory must not be empty"),
        ({"approximate": "x"}, TypeError, "approximate must be a rank, a whole number, or None, not 'x'"),
        ({"approximate": 1.5}, TypeError, "approximate must be a rank"),
        ({"approximate": True}, TypeError, "approximate must be a rank"),
        ({"approximate": 0}, ValueError, "approximate must be a rank of 1 or more, not 0"),
        ({"approximate": -1}, ValueError, "approximate must be a rank of 1 or more, not -1"),
    ],
)
def test_save_as_says_what_it_takes(
    compiled: Any, changed: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        compiled.save_as(**{"form": "peft", "directory": tmp_path / "out", **changed})
    assert not (tmp_path / "out").exists()


def test_a_path_that_cannot_be_written_is_the_systems_error(compiled: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        compiled.save_as("peft", tmp_path / "file" / "out")
