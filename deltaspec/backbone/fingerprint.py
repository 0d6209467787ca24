"""The identity of a backbone: its structure exactly, its weights and saved buffers by a fixed sample of their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deltaspec.backbone.reserved import find
from deltaspec.backbone.sharded import is_sharded
from deltaspec.backbone.table import ModuleTable, ParameterInfo, Row
from deltaspec.backbone.weight_forms import packed_form
from deltaspec.names.paths import below, is_inside

SAMPLE = 256
"""Values read of each tensor."""


def weights_fingerprint(backbone: nn.Module, kept: Mapping[tuple[str, str], Tensor] | None = None) -> str | None:
    """Digest a fixed, evenly spaced sample of the bytes (at most 256 values) of each parameter and each floating-point
    buffer that a checkpoint holds, such as BatchNorm's statistics; None where some are not there as plain values.

    Fast on any size, and enough to tell two checkpoints apart; it does not prove that they are equal in every value.
    Deltas under the reserved name do not count; `kept` buffers, by module's FQN and name, count as they are there.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(backbone, kept or {}):
        if tensor.is_meta or is_sharded(tensor) or packed_form(tensor) is not None:
            return None
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(_sample(tensor.detach()))
    return f"sha256:{digest.hexdigest()}"


def _tensors(backbone: nn.Module, kept: Mapping[tuple[str, str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    found = find(backbone)
    home = None if found is None else found[0]
    yield from ((n, p) for n, p in backbone.named_parameters(remove_duplicate=False) if not _is_delta(n, home))
    for fqn, module in backbone.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or not buffer.is_floating_point():
                continue
            if not _is_delta(place := below(fqn, name), home):
                yield place, kept.get((fqn, name), buffer)


def _is_delta(name: str, home: str | None) -> bool:
    return home is not None and is_inside(name, home)


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
    if flat.numel() > SAMPLE:
        # Integer arithmetic: the same positions on every machine.
        flat = flat[torch.arange(SAMPLE, device=flat.device) * (flat.numel() - 1) // (SAMPLE - 1)]
    return bytes(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())


def structure_fingerprint(table: ModuleTable) -> str:
    """Hash module names and classes, parameter names, shapes and ties: `sha256:…`.

    A model whose weights are packed has the structure of the plain one.
    """
    ties = ((row, [[p.name, _plain_shape(row, p), sorted(p.tied)] for p in row.parameters]) for row in table.rows)
    rows = [[row.fqn, row.unpacked or row.type, sorted(row.aliases), tied] for row, tied in ties]
    return digest([table.model_type, rows])


def _plain_shape(row: Row, parameter: ParameterInfo) -> tuple[int, ...]:
    """Return the shape that a parameter has in the plain model, where a Conv1D's weight is the transpose."""
    return parameter.shape[::-1] if row.unpacked == "Conv1D" and parameter.packed else parameter.shape


def digest(data: object) -> str:
    """Hash JSON data in its canonical form: `sha256:…`."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
