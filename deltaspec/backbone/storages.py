"""Storages of tensors, told apart on every device: on the meta device all have the address 0."""

from __future__ import annotations

import torch


def identity(storage: torch.UntypedStorage) -> int:
    """Return what tells a storage from the others that live."""
    return int(storage._cdata)  # noqa: SLF001 (a storage's identity has no other name)
