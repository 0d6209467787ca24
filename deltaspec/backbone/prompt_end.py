"""Where a prompt ends while text is generated: remembered over the forwards of one `generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

import torch

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

_PROMPT: ContextVar[list[int] | None] = ContextVar("_PROMPT", default=None)
"""Inside `generate`, a list: of the prompt's length, once its forward has run."""
_UTILS = "transformers.generation.utils"
_HOW = "generate with use_cache=True, in one piece (no prefill_chunk_size) and without an assistant"


@contextmanager
def remembering() -> Iterator[None]:
    """Take the first forward in this context for the prompt, and those that follow for its continuations."""
    token = _PROMPT.set([])
    try:
        yield
    finally:
        _PROMPT.reset(token)


def prompt_length(length: int) -> int | None:
    """Return the length of the prompt that a forward over `length` positions without a cache starts with.

    None where it is all prompt. Raises DeltaSpecError (DS450) inside a `generate` that nothing remembers.
    """
    if torch.compiler.is_compiling():
        return None
    known = _PROMPT.get()
    if known is None:
        if not torch.is_grad_enabled() and _generates_without_cache():
            message = "the last tokens of a prompt are to be edited, and without a cache the model cannot tell them"
            raise _error(message, "call generate of the compiled model, c.generate, or generate with use_cache=True")
        return None
    if not known:
        known.append(length)
    return known[0]


def pieces(before: int, length: int) -> DeltaSpecError:
    """Make the error about a prompt that comes in pieces."""
    message = (
        f"the last tokens of a prompt are to be edited, and this forward continues one of {before} tokens by {length}"
    )
    return _error(message, f"give the whole prompt in one forward; {_HOW}")


def _generates_without_cache() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == _UTILS:
            return getattr(frame.f_locals.get("generation_config"), "use_cache", None) is False
        frame = frame.f_back
    return False


def _error(message: str, suggestion: str) -> DeltaSpecError:
    return DeltaSpecError([Diagnostic("DS450", message, file="<model>", suggestion=suggestion)])
