"""`verify`: whether saved deltas give the answers that were kept with them, here or in another library."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import nn

from deltaspec.compiler.answers import Answers, compared, dtype_of, kept_in
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.compiler.restore import restore
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.formats.peft.reader import recognises
from deltaspec.storage.agreement import TOLERANCES, Verification
from deltaspec.storage.saved import SavedSet
from deltaspec.verification.onnx import OnnxAnswers
from deltaspec.verification.peft import PeftAnswers, verify_peft
from deltaspec.verification.server import verify_server

OTHERS = ("peft", "onnx")
"""What answers can be compared with, besides servers, which are named by their URL."""


def verify(
    directory: str | PathLike[str],
    model: nn.Module | None,
    *names: str,
    against: str | None = None,
    tolerance: float | None = None,
    dtype: str | None = None,
    key: str | None = None,
) -> Verification:
    """Compare the golden answers of saved deltas, by name or all, with what is computed for their inputs now.

    `against` says by whom: None, deltaspec itself, `restore`d onto `model`; `peft`, the real PEFT, of what `save_as`
    writes for it; `onnx`, ONNX Runtime, of an export; or the URL of a server that speaks OpenAI's API, where each delta
    is a model of its name (`key` is sent as bearer token; no model is needed where the server tells ids of tokens).
    A directory of PEFT has no golden answers: there, PEFT's answers are what is expected of `restore`.

    `dtype` is the dtype that the other side computes in, if it is coarser; `tolerance` takes the place of what rounding
    leaves in it. Raises DeltaSpecError: no golden answers (DS551), another side that cannot be asked (DS553), and what
    `restore` raises.
    """
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"dtype is one of {', '.join(TOLERANCES)}, not {dtype!r}")
    if against is not None and against not in OTHERS and "://" not in against:
        raise ValueError(f"against is {', '.join(OTHERS)} or a URL, not {against!r}")
    if recognises(Path(directory)):
        if model is None or against != "peft":
            message = "a directory of PEFT has no golden answers"
            hint = 'compare with PEFT itself: --against peft (in Python: against="peft")'
            raise DeltaSpecError([Diagnostic("DS551", message, file=str(directory), suggestion=hint)])
        return verify_peft(directory, model, tolerance, dtype)
    if against is not None and "://" in against:
        return verify_server(kept_in(SavedSet(directory), names), against, model, tolerance, dtype, key)
    if model is None:
        raise TypeError("a model is needed, with its weights")
    kept = kept_in(SavedSet(directory), names)
    compiled = restore(model, Path(directory), *names)
    other = Answers(compiled.view()) if against is None else _other(against, compiled, model)
    computed = dtype or dtype_of(model)
    with torch.no_grad():
        return Verification([compared(g, other.of(g.inputs, g.attached), computed, tolerance) for g in kept])


def _other(against: str, compiled: CompiledModel, model: nn.Module) -> PeftAnswers | OnnxAnswers:
    return PeftAnswers(compiled, model) if against == "peft" else OnnxAnswers(compiled)
