"""Batches of several jobs put together into one, each row under its job; and the outputs cut apart again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

MASK = "attention_mask"
PADDING: Mapping[str, float] = {
    "input_ids": 0, MASK: 0, "token_type_ids": 0, "position_ids": 0, "inputs_embeds": 0, "labels": -100,
    "decoder_input_ids": 0, "decoder_attention_mask": 0, "bbox": 0,
}  # fmt: skip
"""What transformers' inputs are filled with where those of another job are longer."""
_IGNORED = ("labels", "decoder_input_ids", "decoder_attention_mask")
"""What is behind the end of these changes nothing before it: a decoder looks back, and labels there are ignored."""
_MAIN = ("decoder_input_ids", "input_ids", "inputs_embeds")
"""What outputs go along with, token by token: the first of these that there is."""
_TARGETS = ("labels", "label", "label_ids", "start_positions", "end_positions")
"""What a model takes to compute one loss of all rows, which no job wants."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What the forward of a model takes."""

    names: frozenset[str]
    pad: Mapping[str, float] = field(default_factory=dict)
    """What inputs are filled with, by name."""
    free: frozenset[str] = frozenset()
    """Inputs that may be filled up without a mask: it changes no row."""
    decodes: bool = False
    """Whether it makes a decoder's input of the labels."""

    @classmethod
    def of(cls, model: nn.Module, pad: Mapping[str, float]) -> Signature:
        """Return the signature of a model; `pad` in place of what inputs are filled with otherwise."""
        parameters = inspect.signature(type(model).forward).parameters.values()
        names = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        config = getattr(model, "config", None)
        token = getattr(config, "pad_token_id", None)
        known = {**PADDING, **({"input_ids": token, "decoder_input_ids": token} if isinstance(token, int) else {})}
        decodes = bool(getattr(config, "is_encoder_decoder", False))
        return cls(names, {**known, **pad}, frozenset((*pad, *_IGNORED)), decodes)

    def inputs(self, batch: Any) -> dict[str | int, Any]:
        """Return what of a batch the model takes: by names of the forward, or in order where there are none."""
        given = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
        if not isinstance(given, Mapping):
            return dict(enumerate(given if isinstance(given, tuple | list) else [given]))
        taken = _TARGETS[1:] if self.decodes and "decoder_input_ids" not in given else _TARGETS
        return {key: value for key, value in given.items() if key in self.names and key not in taken}


@dataclass(frozen=True, slots=True)
class Mixed:
    """One batch of the rows of several jobs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sizes: tuple[int, ...]
    """Rows of each job."""
    batches: tuple[Any, ...]
    """The batches of the jobs, as they were given."""
    own: tuple[Mapping[str | int, Any], ...]
    """What of each the model took."""
    pad: Mapping[str, float]

    def targets(self, outputs: Any) -> tuple[Any, ...]:
        """Return what losses are computed from, beside the outputs: batches, what goes by tokens as long as those."""
        lengths = _lengths(self.kwargs)
        by_token = _by_token(outputs, lengths)
        each = zip(self.batches, self.own, strict=True)
        return tuple(_as_long(batch, lengths, own, self.pad, by_token) for batch, own in each)


def mixed(signature: Signature, names: Sequence[str], batches: Sequence[Any]) -> Mixed:
    """Put the batches of jobs together. Raises DeltaSpecError (DS383) with all that does not fit."""
    inputs = [signature.inputs(batch) for batch in batches]
    findings: list[Diagnostic] = []

    def refuse(message: str, hint: str) -> None:
        findings.append(Diagnostic("DS383", message, "<jobs>", suggestion=hint))

    sizes = []
    for name, own in zip(names, inputs, strict=True):
        rows = {value.shape[0] for value in own.values() if isinstance(value, Tensor) and value.dim()}
        if len(rows) != 1:
            what = "no rows" if not rows else f"inputs of {' and '.join(map(str, sorted(rows)))} rows"
            refuse(f"a batch of the job {name!r} has {what}", "give tensors whose first dimension are the rows")
        sizes.append(min(rows, default=0))
    if not findings and len(inputs) > 1:
        inputs = _masked(inputs, signature)
        for name, own in zip(names[1:], inputs[1:], strict=True):
            for key in inputs[0].keys() ^ own.keys():
                has, lacks = (names[0], name) if key in inputs[0] else (name, names[0])
                refuse(f"batches of the job {has!r} have {key!r}, those of {lacks!r} do not", "give all jobs the same")
    if findings:
        raise DeltaSpecError(findings)
    together: dict[str | int, Any] = {}
    for key in inputs[0]:
        values = [own[key] for own in inputs]
        if not all(isinstance(value, Tensor) for value in values):
            if any(value is not values[0] and value != values[0] for value in values[1:]):
                refuse(f"{key!r} differs among jobs", "what is no tensor is one for all rows")
            together[key] = values[0]
            continue
        shapes = [value.shape[1:] for value in values]
        fills = key in signature.pad and (MASK in inputs[0] or key in signature.free)
        if key == MASK and len(shapes[0]) > 1:  # of pairs of tokens, by whatever numbers: what fills it is not known
            fills = key in signature.free
        if len({len(shape) for shape in shapes}) > 1 or (len(set(shapes)) > 1 and not fills):
            listed = ", ".join(f"{list(shape)} ({name})" for shape, name in zip(shapes, names, strict=True))
            hint = "give an attention_mask, and pad={name: value} for inputs that are not transformers'"
            refuse(f"rows of {key!r} have different shapes: {listed}", f"{hint}; or pad all jobs to one length")
            continue
        together[key] = torch.cat([padded(value, shapes, signature.pad.get(str(key), 0)) for value in values])
    if findings:
        raise DeltaSpecError(findings)
    args = tuple(together[key] for key in sorted(k for k in together if isinstance(k, int)))
    kwargs = {key: value for key, value in together.items() if isinstance(key, str)}
    return Mixed(args, kwargs, tuple(sizes), tuple(batches), tuple(inputs), signature.pad)


def _masked(inputs: list[dict[str | int, Any]], signature: Signature) -> list[dict[str | int, Any]]:
    """Give all jobs a mask of their tokens, where some have one, or their lengths differ and the model takes one."""
    main = next((key for key in ("input_ids", "inputs_embeds") if all(key in own for own in inputs)), None)
    if main is None or MASK not in signature.names:
        return inputs
    differ = len({own[main].shape[1] for own in inputs}) > 1
    if not differ and not any(MASK in own for own in inputs):
        return inputs
    ones = (torch.ones(own[main].shape[:2], dtype=torch.long, device=own[main].device) for own in inputs)
    return [own if MASK in own else {**own, MASK: mask} for own, mask in zip(inputs, ones, strict=True)]


def padded(value: Tensor, shapes: Sequence[tuple[int, ...]], fill: float) -> Tensor:
    """Return rows as long as the longest of these shapes, filled up at the end."""
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    missing = [most - own for most, own in zip(longest, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    return F.pad(value, [part for size in reversed(missing) for part in (0, size)], value=fill)


def _lengths(together: Mapping[str, Any]) -> dict[str, int]:
    """Return how long rows became that were filled up, by the name of the input."""
    found = {}
    for key, value in together.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            found[key] = value.shape[1]
    return found


def _by_token(outputs: Any, lengths: Mapping[str, int]) -> str | None:
    """Return the input that what a model gives goes along with, token by token: its logits, or else what is first."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else ()
    given = [getattr(outputs, "logits", None), outputs, *values]
    first = next((value for value in given if isinstance(value, Tensor)), None)
    main = next((key for key in _MAIN if key in lengths), None)
    if first is None or main is None:
        return main
    return main if first.dim() > 1 and first.shape[1] == lengths[main] else None


def _as_long(
    batch: Any, longer: Mapping[str, int], own: Mapping[str | int, Any], pad: Mapping[str, float], by_token: str | None
) -> Any:
    """Return what a loss is computed from: labels of tokens, say, as long as the rows became."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    if not isinstance(batch, Mapping):
        return batch
    found = dict(batch)
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or key not in pad:
            continue
        length = longer.get(key)
        if length is None:  # no input: as long as the tokens are where it goes by them, and not as many by chance
            along = by_token is not None and value.shape[1] == own[by_token].shape[1]
            length = longer[by_token] if along and by_token is not None else value.shape[1]
        found[key] = padded(value, [(length, *value.shape[2:])], pad[key])
    return found


def parts(outputs: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut the outputs of a mixed batch into those of its jobs; what has no rows is None there."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    each = zip(starts, sizes, strict=True)
    return [picked(outputs, slice(start, start + size), sum(sizes)) for start, size in each]


def picked(value: Any, chosen: slice | Tensor, rows: int) -> Any:
    """Return some rows of all tensors that have so many; what has none is None."""
    if isinstance(value, Tensor):
        return value[chosen] if value.dim() and value.shape[0] == rows else None
    if isinstance(value, Mapping):
        own = {key: picked(each, chosen, rows) for key, each in value.items()}
        return own if type(value) is dict else type(value)(**own)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(picked(each, chosen, rows) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(picked(each, chosen, rows) for each in value)
    return None
