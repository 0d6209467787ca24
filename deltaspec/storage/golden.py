"""Golden answers: what deltas gave for a few inputs when they were saved, kept beside them to be compared with later.

One safetensors file a delta, which has all that is needed: the inputs, the answer with what was attached, and that of
the backbone alone, by which a delta that is not at work can be told from one that is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaspec.backbone.inputs import call_arguments
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.storage.saved import GOLDEN, SavedSet

MOST_BYTES = 32 << 20
"""Size of the inputs and answers of one delta at most."""
_ANSWER, _BASE, _INPUT = "answer", "base", "inputs."


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """A few inputs, and what a model gave for them."""

    inputs: Mapping[str, Tensor]
    """By the names of the forward's arguments; those that are given without a name are called 0, 1 …"""
    attached: Mapping[str, float]
    """The deltas that were attached, and their strengths."""
    answer: Tensor
    """The logits; of a model without logits, its output, or the first tensor of that."""
    base: Tensor
    """The same of the backbone, with nothing attached."""

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file. Raises DeltaSpecError (DS550) where it is too large."""
        from safetensors.torch import save as to_bytes

        tensors = {_ANSWER: self.answer, _BASE: self.base, **{_INPUT + key: t for key, t in self.inputs.items()}}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > MOST_BYTES:
            message = f"the golden answers take {size / 2**20:.0f} MiB, and at most {MOST_BYTES >> 20} MiB are kept"
            raise DeltaSpecError([_finding(message, "give fewer inputs, or shorter ones")])
        plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        return to_bytes(plain, {"format": "pt", "attached": json.dumps(dict(self.attached))})

    @classmethod
    def from_bytes(cls, content: bytes) -> Golden:
        """Read what `to_bytes` wrote. Raises ValueError."""
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes

        try:
            tensors = from_bytes(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            attached = json.loads(header["__metadata__"]["attached"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"is no file of golden answers: {error}") from None
        numbers = isinstance(attached, dict) and all(type(value) in (int, float) for value in attached.values())
        inputs = {key.removeprefix(_INPUT): value for key, value in tensors.items() if key.startswith(_INPUT)}
        if not numbers or not inputs or tensors.keys() != {_ANSWER, _BASE, *(_INPUT + key for key in inputs)}:
            raise ValueError("is no file of golden answers: it has other parts")
        if tensors[_ANSWER].shape != tensors[_BASE].shape or not tensors[_ANSWER].is_floating_point():
            raise ValueError("is no file of golden answers: its answers do not fit together")
        return cls(inputs, attached, tensors[_ANSWER], tensors[_BASE])

    @property
    def mask(self) -> Tensor | None:
        """Which positions of the answer are no padding, where the inputs say so; at others it means nothing."""
        mask = self.inputs.get("attention_mask")
        fits = mask is not None and self.answer.dim() > mask.dim() and self.answer.shape[: mask.dim()] == mask.shape
        return mask.bool() if mask is not None and fits else None


def golden_of(saved: SavedSet, name: str | None) -> Golden | None:
    """Read the golden answers of a saved delta, or (None) of all that was attached; None where none were kept.

    Raises DeltaSpecError where the file is damaged.
    """
    entry = saved.manifest if name is None else saved.entry[name]
    if GOLDEN not in entry:
        return None
    content, problems = saved.read(name, GOLDEN)
    if content is None:
        raise DeltaSpecError(problems)
    try:
        return Golden.from_bytes(content)
    except ValueError as error:
        raise DeltaSpecError([saved.finding("DS522", str(error), "save again", entry[GOLDEN])]) from error


def named_inputs(example_inputs: Any) -> dict[str, Tensor]:
    """Return what a forward is given, by name, as `Golden` keeps it. Raises DeltaSpecError (DS550)."""
    args, kwargs = call_arguments(example_inputs)
    named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    wrong = [name for name, value in named.items() if not isinstance(value, Tensor)]
    if wrong or not named:
        what = f"{wrong[0]!r} is a {type(named[wrong[0]]).__name__}" if wrong else "there are none"
        message = f"golden inputs are tensors, by the names of the forward's arguments: {what}"
        raise DeltaSpecError([_finding(message, "leave out what is no tensor, such as use_cache or return_dict")])
    return named


def given(inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the positional and the keyword arguments that named inputs stand for."""
    return tuple(v for k, v in inputs.items() if k.isdecimal()), {k: v for k, v in inputs.items() if not k.isdecimal()}


def answer_of(output: Any) -> Tensor:
    """Return what counts of a model's output: the logits, or the first tensor of numbers; else raise DS550."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = logits if isinstance(logits, Tensor) else _first(output)
    if found is None:
        message = f"a {type(output).__name__} is no answer that can be kept: it holds no tensor of numbers"
        raise DeltaSpecError([_finding(message, "save without golden=, or let the forward return a tensor")])
    return found


def _first(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for part in parts if (found := _first(part)) is not None), None)


def _finding(message: str, hint: str) -> Diagnostic:
    return Diagnostic("DS550", message, file="<model>", suggestion=hint)
