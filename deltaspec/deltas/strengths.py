"""How strong attached deltas are: numbers that formulas read as tensors, so that changing one rebuilds nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Strengths:
    """The strength of each delta that is not at its full, trained one, which is 1."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self._values: dict[str, float] = dict(values or {})
        self._tensors: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __getitem__(self, name: str) -> float:
        return self._values.get(name, 1.0)

    def __deepcopy__(self, memo: dict[int, object]) -> Strengths:
        twin = memo[id(self)] = Strengths(self._values)
        # The forwards that are installed hold these tensors, and are copied, too.
        twin._tensors = {key: copy.deepcopy(tensor, memo) for key, tensor in self._tensors.items()}
        return twin

    def as_dict(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Return those that differ from 1, of these deltas or of all."""
        return {name: value for name, value in self._values.items() if names is None or name in names}

    def scaled(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of these deltas that are not at their full strength."""
        return tuple(name for name in names if name in self._values)

    def set(self, strengths: Mapping[str, float]) -> None:
        """Let these be all that differ from 1. Tensors are written in place."""
        self._values = dict(strengths)
        with torch.no_grad():
            for (name, _, _), tensor in self._tensors.items():
                if name in strengths:
                    tensor.fill_(strengths[name])

    def forget(self, name: str) -> None:
        """Forget a delta that is gone for good."""
        self._values.pop(name, None)
        for key in [key for key in self._tensors if key[0] == name]:
            del self._tensors[key]

    def __bool__(self) -> bool:
        return bool(self._values)

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Return a delta's strength as a tensor `[]` that follows it, with the device and dtype of another."""
        key = (name, like.device, like.dtype if like.is_floating_point() else torch.float32)
        if key not in self._tensors:
            # Made outside of inference mode, or it could never be written outside of it.
            with torch.inference_mode(False):
                self._tensors[key] = torch.full((), self[name], device=key[1], dtype=key[2])
        return self._tensors[key]
