"""What transformers says while it loads a model: its bars and reports are kept off, what they mean is said here."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.names.folding import shown

_DRAWN = "pooler"
"""A part of encoders that stands before heads, and that checkpoints of other heads have not."""


@contextmanager
def quiet(*, progress: bool) -> Iterator[None]:
    """Keep transformers' reports and bars off standard error; with `progress`, a terminal still sees bars."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers import logging

    # It logs configurations at length when a model is built without weights, and a table of keys when it is loaded.
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not (progress and sys.stderr.isatty()):
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def refuse_lacking(reference: str, model: nn.Module, missing: Iterable[str]) -> None:
    """Raise DeltaSpecError (DS591) for a model of whose backbone a checkpoint lacks tensors: they would be drawn.

    A head that is drawn anew, since the checkpoint is of another head or of none, is a warning: deltas may bring it.
    """
    keys = sorted(missing)
    prefix = str(getattr(model, "base_model_prefix", ""))
    headed = bool(prefix) and hasattr(model, prefix)
    own = [key for key in keys if not headed or key.startswith(f"{prefix}.")]
    if lacking := [key for key in own if _DRAWN not in key.split(".")]:
        message = f"its files lack {shown(lacking)} of this {type(model).__name__}"
        hint = "restore the files, or name a directory with all weights, as save_pretrained writes it"
        raise DeltaSpecError([Diagnostic("DS591", message, reference, suggestion=hint)])
    if keys:
        warnings.warn(f"{reference} has no values for {shown(keys)}: they are drawn anew at each load", stacklevel=2)
