"""Autocast, asked of any device: torch raises for those that have none, such as meta."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def autocasts(device: torch.device) -> bool:
    """Return whether operators of a device cast their inputs now."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> Any:
    """Return a context in which operators of a device cast nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
