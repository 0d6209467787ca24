"""Batches: the inputs of a step, by the names that a model's forward takes, at the sizes that are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from deltaspec.backbone.inputs import call_arguments, dummy_inputs
from deltaspec.backbone.table import ModuleTable
from deltaspec.language.conditions import Conditions

LENGTH = 512
"""Tokens of a row, where nobody says how many."""
_IDS = frozenset({"input_ids", "decoder_input_ids"})
_INPUTS = {"length": _IDS, "target_length": {"decoder_input_ids"}, "image_size": {"pixel_values"}}
"""Inputs that an option says the size of."""
_ONE_LABEL = ("SequenceClassification", "ImageClassification", "AudioClassification", "MultipleChoice", "NextSentence")


class Batch(NamedTuple):
    """Arguments of one forward. Their values do not matter."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def positions(self) -> int:
        """Number of positions of all rows, of what has most of them."""
        inputs = (value for value in tree_leaves(self) if isinstance(value, Tensor))
        return max((prod(value.shape[:2]) for value in inputs), default=1)

    def __str__(self) -> str:
        """Write the names and shapes: `input_ids [8, 512], labels [8, 512]`."""
        named = [("", value) for value in self.args] + list(self.kwargs.items())
        shown = ((name, list(value.shape)) for name, value in named if isinstance(value, Tensor))
        return ", ".join(f"{name} {shape}".lstrip() for name, shape in shown)


Wrong = tuple[str, str, str]
"""Key of an option, what is wrong with it, and the way out."""


def settled(
    given: Conditions, model: nn.Module, table: ModuleTable, example_inputs: Any
) -> tuple[Conditions, list[Wrong]]:
    """Return the conditions with the length that is taken where none is given, and what does not fit the model.

    Of example inputs nothing is assumed: they have sizes of their own.
    """
    known = dummy_inputs(model) if example_inputs is None else None
    places = _places(model, table)
    wrong: list[Wrong] = []
    for key, names in _INPUTS.items():
        if getattr(given, key) is not None and known is not None and names.isdisjoint(known):
            message = f"{key} has no meaning for a {table.model_class}, which takes {', '.join(known)}"
            wrong.append((key, message, f"leave {key} out"))
    for key in ("length", "target_length"):
        asked = getattr(given, key)
        if asked is not None and places is not None and asked > places and not wrong:
            message = f"{key} {asked:,} is more than the {places:,} positions that this model has"
            wrong.append((key, message, f"take {places} at most"))
    if known is None or given.length is not None or _IDS.isdisjoint(known):
        return given, wrong
    return given.model_copy(update={"length": min(LENGTH, places or LENGTH)}), wrong


def _places(model: nn.Module, table: ModuleTable) -> int | None:
    """Return how many positions a model has a table for; None where it has none."""
    told = [row.positions.places for row in table.rows if row.positions is not None]
    known = [places for places in told if places is not None]
    if not known and any(row.kind == "embedding" and "position" in row.fqn.rpartition(".")[2] for row in table.rows):
        config: Any = getattr(model, "config", None)
        known = [size for size in (getattr(config, "max_position_embeddings", None),) if isinstance(size, int)]
    return min(known, default=None)


def batches(model: nn.Module, conditions: Conditions, example_inputs: Any) -> Iterator[Batch]:
    """Yield the forms of a batch that a model may take, the likeliest first; none where its inputs are not known.

    Of example inputs those sizes change that the conditions say, and were not left out.
    """
    if example_inputs is not None:
        yield Batch(*call_arguments(_sized(example_inputs, conditions)))
        return
    known = dummy_inputs(model)
    if known is None:
        return
    sized = {name: _of_size(name, value, conditions) for name, value in known.items()}
    base = Batch((), sized)
    if conditions.labels and "labels" in inspect.signature(model.forward).parameters:
        rows, tokens = conditions.batch, _tokens(sized)
        one = torch.empty(rows, dtype=torch.long, device="meta")
        each = None if tokens is None else torch.empty(tokens, dtype=torch.long, device="meta")
        forms = [one, each] if any(part in type(model).__name__ for part in _ONE_LABEL) else [each, one]
        yield from (Batch((), {**sized, "labels": form}) for form in forms if form is not None)
    yield base
    if len(sized) > 1 and "decoder_input_ids" not in sized:  # one modality of several, whose parts must fit by values
        yield from (Batch((), {name: value}) for name, value in sized.items() if name in _IDS)


def _tokens(sized: dict[str, Tensor]) -> torch.Size | None:
    ids = sized.get("decoder_input_ids", sized.get("input_ids"))
    return None if ids is None else ids.shape


def _of_size(name: str, value: Tensor, conditions: Conditions) -> Tensor:
    shape = [conditions.batch, *value.shape[1:]]
    if name in _IDS:
        shape[1] = conditions.length or LENGTH
        if name == "decoder_input_ids" and conditions.target_length is not None:
            shape[1] = conditions.target_length
    if name == "pixel_values" and conditions.image_size is not None:
        shape[-2:] = [conditions.image_size] * 2
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _sized(inputs: Any, conditions: Conditions) -> Any:
    """Return example inputs as they are, but for the sizes that were asked for: rows first, then places of ids."""
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, inputs)
    first = next((value for value in found if value.dim()), None)
    length = next((value.shape[1] for value in found if value.dim() > 1 and not value.is_floating_point()), None)

    def sized(value: Tensor) -> Tensor:
        shape = list(value.shape)
        if first is not None and value.dim() and shape[0] == first.shape[0] and "batch" in conditions.model_fields_set:
            shape[0] = conditions.batch
        if value.dim() > 1 and shape[1] == length and conditions.length is not None:
            shape[1] = conditions.length
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return tree_map_only(Tensor, sized, inputs)
