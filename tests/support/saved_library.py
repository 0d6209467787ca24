"""A model with one delta of its own, and directories of saved ones that it can know as a library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from moved import moved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

LLAMA = ARCHITECTURES["llama"]
OWN = {"name": "own", "method": "lora", "params": {"rank": 3}, "target": {"role": "attn.q"}, "attached": False}
NAMES = ("french", "german", "spanish", "dutch")


def lora(name: str, rank: int = 2) -> dict[str, Any]:
    target = {"role": ["attn.q", "attn.v", "mlp.up"]}
    return {"name": name, "method": "lora", "params": {"rank": rank}, "target": target, "attached": False}


def build(*deltas: dict[str, Any], number: int = 1, model: nn.Module | None = None) -> CompiledModel:
    """Compile, and move all tensors off their initial values."""
    compiled = deltaspec.compile(model or LLAMA.model(), {"deltaspec": 1, "deltas": list(deltas)})
    return moved(compiled, number)


def run(compiled: CompiledModel, *names: str) -> Tensor:
    with torch.no_grad(), compiled.only(*names):
        return compiled(**LLAMA.inputs()).logits


def codes(error: pytest.ExceptionInfo[DeltaSpecError]) -> list[str]:
    return [finding.code for finding in error.value.diagnostics]


def sign(directory: Path, name: str, field: str, change: Callable[[Path], None]) -> None:
    """Change one of a delta's files, and its digest in the manifest with it."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    entry = next(entry for entry in manifest["deltas"] if entry["name"] == name)
    change(directory / entry[field])
    entry[f"{field}_sha256"] = hashlib.sha256((directory / entry[field]).read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))


def file_of(directory: Path, name: str, field: str = "file") -> Path:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    return directory / next(entry for entry in manifest["deltas"] if entry["name"] == name)[field]


def _with(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda path: save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)
