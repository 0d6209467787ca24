"""`deltaspec.restore`: a compiled model from a plain one and saved deltas."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from deltaspec.backbone.fingerprint import structure_fingerprint, weights_fingerprint
from deltaspec.backbone.tabulate import tabulate
from deltaspec.compiler.build import build
from deltaspec.compiler.compile import refuse_unusable
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.language.load import load as load_spec
from deltaspec.planning.resolve import plan
from deltaspec.storage.load import fill, settled
from deltaspec.storage.saved import ENDINGS, SavedSet


def restore(
    model: nn.Module, directory: str | PathLike[str], *, capture: str = "auto", example_inputs: Any = None
) -> CompiledModel:
    """Compile the saved specs onto a model and load the saved tensors; the deltas that were attached when saving are
    attached, as strongly.

    Raises DeltaSpecError with all findings; `model` is never changed.
    """
    refuse_unusable(model, capture)
    return settled(directory, lambda saved: _restore(model, saved, capture, example_inputs))


def _restore(model: nn.Module, saved: SavedSet, capture: str, example_inputs: Any) -> CompiledModel:
    try:
        if findings := [f for entry in saved.entries for field in ENDINGS for f in saved.read(entry["name"], field)[1]]:
            raise DeltaSpecError(findings)
        paths = [saved.folder / entry["spec"] for entry in saved.entries]
        specs = dict.fromkeys(map(load_spec, paths))  # derived ones share one
        planned = plan(model, *specs, example_inputs=example_inputs)
    except DeltaSpecError as error:  # of which another backbone may be the cause
        structure = structure_fingerprint(tabulate(model))
        found = saved.check_backbone(structure, lambda: weights_fingerprint(model), type(model).__name__)
        raise DeltaSpecError([*found, *error.diagnostics]) from error
    # Every value comes from the files: no decomposition of a weight, no tokenizer of a text is needed.
    built, capture, reason = build(model, planned, capture, drawn=False)
    fill(built.active, planned, built.host.deltas, saved)
    compiled = CompiledModel(built, capture, reason)
    compiled.only(saved.attached)
    return compiled
