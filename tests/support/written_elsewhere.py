"""Adapters in `tests/formats/fixtures` that other libraries wrote: their bases, inputs, and what was computed then."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import deltaspec

FIXTURES = Path(__file__).parent.parent / "formats" / "fixtures"


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
