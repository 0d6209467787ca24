"""`verify`: whether saved deltas give the answers that were kept with them, here or in another library."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from deltaspec.backbone.loading import model_from
from deltaspec.compiler.answers import Answers, compared, dtype_of, kept_in
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.compiler.restore import restore
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.formats.opening import base_reference, located, no_adapter, refuse_no_adapter
from deltaspec.formats.peft.reader import recognises
from deltaspec.names.urls import is_url
from deltaspec.storage.agreement import TOLERANCES, Verification
from deltaspec.storage.delta_set import MANIFEST
from deltaspec.storage.matching import Match
from deltaspec.storage.saved import SavedSet
from deltaspec.verification.onnx import OnnxAnswers
from deltaspec.verification.peft import PeftAnswers, verify_peft
from deltaspec.verification.server import verify_server

OTHERS = ("peft", "onnx")
"""What answers can be compared with, besides servers, which are named by their URL."""


def verify(
    directory: str | PathLike[str],
    model: nn.Module | str | None,
    *names: str,
    against: str | None = None,
    tolerance: float | None = None,
    dtype: str | None = None,
    key: str | None = None,
    match: Match = "weights",
) -> Verification:
    """Compare the golden answers of saved deltas, by name or all, with what is computed for their inputs now.

    `against` says by whom: None, deltaspec itself, `restore`d onto `model`; `peft`, the real PEFT, of what `save_as`
    writes for it; `onnx`, ONNX Runtime, of an export; or the URL of a server that speaks OpenAI's API, where each delta
    is a model of its name (`key` is sent as bearer token; no model is needed where the server tells ids of tokens).
    A directory of PEFT has no golden answers: there, PEFT's answers are what is expected of `restore`.

    `directory` may be a hub id; `model` is the base, or what the command line calls it by, which is then loaded with
    its weights, in `dtype`. `match` as for `restore`.

    `dtype` is the dtype that the other side computes in, if it is coarser; `tolerance` takes the place of what rounding
    leaves in it. Raises DeltaSpecError: no golden answers (DS551), another side that cannot be asked (DS553), and what
    `restore` raises.
    """
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"dtype is one of {', '.join(TOLERANCES)}, not {dtype!r}")
    if against is not None and against not in OTHERS and not is_url(against):
        raise ValueError(f"against is {', '.join(OTHERS)} or a URL (http://…, https://…), not {against!r}")
    folder = located(directory)
    if not (folder / MANIFEST).exists():
        _refuse_unanswered(folder, against, model)
        base = _loaded(folder, model, dtype)
        assert base is not None
        return verify_peft(folder, base, tolerance, dtype)
    saved = SavedSet(folder)
    kept = kept_in(saved, names)
    if against is not None and is_url(against):
        return verify_server(kept, against, _loaded(folder, model, None), tolerance, dtype, key)
    base = _loaded(folder, model, dtype)
    if base is None:
        raise TypeError("a model is needed, with its weights")
    compiled = restore(base, folder, *names, match=match)
    other = Answers(compiled.view()) if against is None else _other(against, compiled, base)
    computed = dtype or dtype_of(base)
    with torch.no_grad():
        return Verification([compared(g, other.of(g.inputs, g.attached), computed, tolerance) for g in kept])


def _refuse_unanswered(folder: Path, against: str | None, model: object) -> None:
    """Raise DeltaSpecError for a directory without golden answers (DS551), unless PEFT can say what is expected."""
    if not recognises(folder):
        refuse_no_adapter(folder)
        raise no_adapter(folder)
    if model is None or against != "peft":
        message = "a directory of PEFT has no golden answers"
        hint = 'compare with PEFT itself: --against peft (in Python: against="peft")'
        raise DeltaSpecError([Diagnostic("DS551", message, file=str(folder), suggestion=hint)])


def _loaded(folder: Path, model: nn.Module | str | None, dtype: str | None) -> nn.Module | None:
    if not isinstance(model, str):
        return model
    reference, wanted = base_reference(folder, model)
    return model_from(reference, replace(wanted, weights=True, dtype=dtype))


def _other(against: str, compiled: CompiledModel, model: nn.Module) -> PeftAnswers | OnnxAnswers:
    return PeftAnswers(compiled, model) if against == "peft" else OnnxAnswers(compiled)
