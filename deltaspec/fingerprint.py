"""What identifies a backbone: its structure exactly, its weights by a fixed sample of their bytes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from deltaspec.deltas import find, is_inside

SAMPLE = 256
"""Values read of each tensor."""


def weights_fingerprint(backbone: nn.Module) -> str | None:
    """Digest a fixed, evenly spaced sample of each parameter's bytes (at most 256 values each); None on the meta
    device.

    Fast on any size, and enough to tell two checkpoints apart; it does not prove that they are equal in every value.
    """
    digest = hashlib.sha256()
    found = find(backbone)
    for name, tensor in backbone.named_parameters(remove_duplicate=False):
        if found is not None and is_inside(name, found[0]):
            continue
        if tensor.device.type == "meta":
            return None
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(_sample(tensor.detach()))
    return f"sha256:{digest.hexdigest()}"


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
    if flat.numel() > SAMPLE:
        # Integer arithmetic: the same positions on every machine.
        flat = flat[torch.arange(SAMPLE, device=flat.device) * (flat.numel() - 1) // (SAMPLE - 1)]
    return bytes(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())
