"""Golden answers of a compiled model: made when deltas are saved, and compared with what the model gives now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.inputs import moved_to
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.serving.trial import evaluating
from deltaspec.storage.agreement import TOLERANCES, Agreement, Verification, agreement, coarser
from deltaspec.storage.golden import Golden, answer_of, given, golden_of, named_inputs
from deltaspec.storage.saved import SavedSet


class Answers:
    """Runs a view of a compiled model on inputs, under one set of deltas after the other."""

    def __init__(self, view: Any) -> None:
        self.view = view
        """A view of its own, so that what is attached elsewhere stays so."""

    def of(self, inputs: Mapping[str, Tensor], attached: Mapping[str, float]) -> Tensor:
        """Return the answer in evaluation mode under these deltas. Raises DeltaSpecError."""
        backbone = self.view.backbone
        device = next((p.device for p in backbone.parameters() if not p.is_meta), torch.device("cpu"))
        args, kwargs = given(moved_to(dict(inputs), str(device)))
        self.view.only(dict(attached))
        with evaluating(backbone):
            return answer_of(self.view(*args, **kwargs)).detach().cpu()

    def golden(self, inputs: Mapping[str, Tensor], sets: Iterable[Mapping[str, float]]) -> Iterator[Golden]:
        """Yield golden answers for sets of deltas with their strengths."""
        base = self.of(inputs, {})
        for attached in sets:
            yield Golden(inputs, attached, self.of(inputs, attached), base)


def kept_answers(
    view: Any, example_inputs: Any, names: tuple[str, ...], attached: Mapping[str, float]
) -> tuple[dict[str, bytes], bytes | None]:
    """Return the golden answers of deltas, each alone, and of all that is attached, where that is more than one alone.

    As files. Raises DeltaSpecError (DS550).
    """
    inputs, answers = named_inputs(example_inputs), Answers(view)
    alone = zip(names, answers.golden(inputs, ({name: 1.0} for name in names)), strict=True)
    files = {name: golden.to_bytes() for name, golden in alone}
    if not attached or (len(attached) == 1 and set(attached.values()) == {1.0}):
        return files, None
    return files, next(answers.golden(inputs, (attached,))).to_bytes()


def verify_saved(
    view: Any, directory: str | PathLike[str], names: tuple[str, ...], tolerance: float | None
) -> Verification:
    """Compare the golden answers of saved deltas with what the model gives. Raises DeltaSpecError (DS551: none)."""
    saved, answers = SavedSet(directory), Answers(view)
    dtype = dtype_of(view.backbone)
    kept = kept_in(saved, names)
    return Verification(compared(g, answers.of(g.inputs, g.attached), dtype, tolerance) for g in kept)


def kept_in(saved: SavedSet, names: tuple[str, ...]) -> list[Golden]:
    """Read the golden answers of saved deltas, by default of all, and of all that was attached.

    Raises DeltaSpecError, with all findings: files that are damaged, deltas without golden answers (DS551).
    """
    require_known(names, saved.names, saved.folder)
    found, findings = list[Golden](), list[Diagnostic]()
    for name in (*(names or saved.names), *(() if names else (None,))):
        try:
            golden = golden_of(saved, name)
        except DeltaSpecError as error:
            findings += error.diagnostics
            continue
        if golden is not None:
            found.append(golden)
        elif name is not None:
            hint = "save them with a few inputs: c.save(dir, golden=example_inputs)"
            findings.append(saved.finding("DS551", f"there are no golden answers of {name}", hint))
    if findings:
        raise DeltaSpecError(findings)
    return found


def compared(golden: Golden, answer: Tensor, dtype: str, tolerance: float | None) -> Agreement:
    """Compare golden answers with others, which were computed in a dtype."""
    own = str(golden.answer.dtype).removeprefix("torch.")
    return agreement(
        golden.attached,
        golden.answer,
        golden.base,
        answer,
        dtype=coarser(own, dtype),
        mask=golden.mask,
        tolerance=tolerance,
    )


def dtype_of(backbone: nn.Module) -> str:
    """Return the coarsest dtype of a model's parameters that there is a tolerance for."""
    names = {str(p.dtype).removeprefix("torch.") for p in backbone.parameters()} & TOLERANCES.keys()
    return coarser(*names) if names else "float32"
