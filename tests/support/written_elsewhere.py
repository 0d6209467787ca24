"""Adapters in `tests/formats/fixtures` that other libraries wrote: their bases, inputs, and what was computed then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import deltaspec
from deltaspec.formats.base import Base
from deltaspec.formats.opening import open_set

FIXTURES = Path(__file__).parent.parent / "formats" / "fixtures"
WRONG: tuple[Any, ...] = ("x", [[]], {"a": {"b": [1]}}, -1e300, 10**400, float("nan"))
"""Values that hardly an option takes."""


@cache
def base(library: str, name: str, kind: str, **settings: Any) -> Any:
    """Return a base model, under the attention that the libraries ran with. Nobody changes it."""
    model = getattr(transformers, kind).from_pretrained(
        FIXTURES / library / "bases" / name, attn_implementation="eager", **settings
    )
    return model.eval()


def base_of(library: str, case: str) -> Any:
    """Return the base model of a case."""
    about = json.loads((FIXTURES / library / "cases.json").read_text())[case]
    return base(library, about["base"], about["class"], **about.get("settings", {}))


def copied(library: str, case: str, folder: Path) -> Path:
    """Return a copy of a case's adapter that a test may change."""
    return Path(shutil.copytree(FIXTURES / library / case / "adapter", folder / "adapter"))


def inputs(library: str, case: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return a case's inputs, and the logits that its library computed from them."""
    held = load_file(FIXTURES / library / case / "io.safetensors")
    return {name: value for name, value in held.items() if "logits" not in name}, held["logits_active"]


def difference(library: str, case: str, folder: Path | None = None) -> float:
    """Read a case's adapter and return by how much its logits differ from those of its library, where a token is.

    A prompt's own positions, which this library leaves out, are not compared.
    """
    given, expected = inputs(library, case)
    compiled = deltaspec.restore(base_of(library, case), folder or FIXTURES / library / case / "adapter")
    with torch.no_grad():
        found = compiled(**given).logits
    apart = (found - expected[:, -found.shape[1] :]).abs()
    if "position_ids" in given:  # padded on the left: padding's own rows say nothing
        apart = apart[given["attention_mask"].bool()]
    return float(apart.max())


def refuse(library: str, case: str, folder: Path, code: str, said: str) -> None:
    """Check that a changed adapter of a case is refused with this code alone, in such words."""
    with pytest.raises(deltaspec.DeltaSpecError, match=said) as caught:
        deltaspec.restore(base_of(library, case), folder)
    assert {finding.code for finding in caught.value.diagnostics} == {code}


def try_wrong_values(library: str, case: str, folder: Path, names: Iterable[str], write: Callable[..., Any]) -> None:
    """Check that options of any value are read, or are findings; `write(name=value)` changes one of them."""
    plain = Base(base_of(library, case))
    for name in names:
        for value in WRONG:
            write(**{name: value})
            try:
                open_set(folder, lambda: plain)
            except deltaspec.DeltaSpecError as error:
                assert all(finding.suggestion for finding in error.diagnostics)
            except Exception as error:
                pytest.fail(f"{name}: {value!r}: {error!r}")
