"""Where a prompt ends while text is generated: remembered over the forwards of one `generate`.

A forward without a cache does not show whether it is a prompt alone or one that was gone on from, so whoever generates
says so (`runtime/generation.py`). What runs now is kept by context, and so by thread and by task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

HOW = "generate with use_cache=True, in one piece (no prefill_chunk_size) and without an assistant"


@dataclass(slots=True, eq=False)
class Prompt:
    """The prompt of a `generate` that runs without a cache."""

    model: nn.Module
    remembered: bool
    """Whether its first forward may be taken for the prompt."""
    length: int | None = None
    """Known once its first forward has run."""


_PROMPT: ContextVar[Prompt | None] = ContextVar("_PROMPT", default=None)
"""That of the innermost `generate`; None outside, and where a cache holds the prompt."""


@contextmanager
def running(prompt: Prompt | None) -> Iterator[None]:
    """Let this be the prompt of what generates inside."""
    token = _PROMPT.set(prompt)
    try:
        yield
    finally:
        _PROMPT.reset(token)


def current() -> Prompt | None:
    """Return the prompt of the innermost `generate` that runs without a cache."""
    return _PROMPT.get()


def prompt_length(length: int) -> int | None:
    """Return the length of the prompt that a forward over `length` positions without a cache starts with.

    None where it is all prompt. Raises DeltaSpecError (DS450) inside a `generate` that nothing remembers.
    """
    prompt = None if torch.compiler.is_compiling() else _PROMPT.get()
    if prompt is None:
        return None
    if not prompt.remembered:
        message = "the last tokens of a prompt are to be edited, and without a cache the model cannot tell them"
        raise unclear(message, "call generate of the compiled model, c.generate, or generate with use_cache=True")
    if prompt.length is None:
        prompt.length = length
    return prompt.length


def pieces(before: int, length: int) -> DeltaSpecError:
    """Make the error about a prompt that comes in pieces."""
    message = (
        f"the last tokens of a prompt are to be edited, and this forward continues one of {before} tokens by {length}"
    )
    return unclear(message, f"give the whole prompt in one forward; {HOW}")


def unclear(message: str, suggestion: str) -> DeltaSpecError:
    """Make an error about a prompt whose end cannot be told."""
    return DeltaSpecError([Diagnostic("DS450", message, file="<model>", suggestion=suggestion)])
