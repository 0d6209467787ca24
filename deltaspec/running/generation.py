"""Where a prompt ends while `generate` runs: some formulas edit the last tokens of a prompt, and of a prompt alone.

With a key-value cache, the first forward brings the prompt. Without one, every step brings the whole sequence, so the
prompt's length is remembered for the duration of one `generate`, by its own context (and so by thread and by task).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.methods import methods

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.planning.planned import PlannedDelta

_PROMPT: ContextVar[list[int] | None] = ContextVar("_PROMPT", default=None)
"""Inside `generate`, a list: of the prompt's length, once its forward has run."""
_UTILS = "transformers.generation.utils"
_HOW = "generate with use_cache=True, in one piece (no prefill_chunk_size) and without an assistant"


def generating(planned: Mapping[str, PlannedDelta], active: Iterable[str], backbone: nn.Module) -> Callable[..., Any]:
    """Give the `generate` of a backbone under these deltas. Raises DeltaSpecError (DS450), before it generates."""
    whole: Any = backbone  # nn.Module does not say what it generates
    generate: Callable[..., Any] = whole.generate
    names = [name for name in active if _ends_matter(planned[name])]
    if not names:
        return generate

    def run(*args: Any, **kwargs: Any) -> Any:
        cached = _check(names[0], backbone, args, kwargs)
        with nullcontext() if cached else remembering():
            return generate(*args, **kwargs)

    return run


@contextmanager
def remembering() -> Iterator[None]:
    """Take the first forward in this context for the prompt, and those that follow for its continuations."""
    token = _PROMPT.set([])
    try:
        yield
    finally:
        _PROMPT.reset(token)


def prompt_length(length: int) -> int | None:
    """Give the length of the prompt that a forward over `length` positions without a cache starts with.

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


def _ends_matter(planned: PlannedDelta) -> bool:
    return any(methods()[planned.method].ends_matter(site.params) for site in planned.sites)


def _check(name: str, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Refuse what hides the prompt's end from a delta; tell whether there will be a cache."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    default = getattr(backbone, "generation_config", None)

    def setting(key: str) -> Any:
        if key in kwargs:
            return kwargs[key]
        found = getattr(given, key, None)
        return getattr(default, key, None) if found is None else found

    problem = None
    if setting("prefill_chunk_size") is not None:
        problem = "prefill_chunk_size brings the prompt in pieces"
    elif kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None:
        problem = "assisted generation brings guesses along with it"
    elif setting("use_cache") is False and not _is_plain_decoder(backbone):
        problem = "without a cache only a plain decoder of text tells where it ends"
    if problem is not None:
        raise _error(f"delta {name!r} edits the last tokens of the prompt, and {problem}", _HOW)
    return setting("use_cache") is not False


def _is_plain_decoder(backbone: Any) -> bool:
    """Tell whether all blocks of a model see the same positions."""
    config = backbone.config
    return not config.is_encoder_decoder and config.get_text_config() is config


def _generates_without_cache() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == _UTILS:
            return getattr(frame.f_locals.get("generation_config"), "use_cache", None) is False
        frame = frame.f_back
    return False


def _error(message: str, suggestion: str) -> DeltaSpecError:
    return DeltaSpecError([Diagnostic("DS450", message, file="<model>", suggestion=suggestion)])
