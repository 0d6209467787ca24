"""Where a prompt ends while text is generated: remembered over the forwards of one `generate`.

A model's own `generate` is watched, by an entry of its `__dict__`: a forward without a cache does not show whether it
is a prompt alone or one that was gone on from. What runs now is kept by context, and so by thread and by task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

HOW = "generate with use_cache=True, in one piece (no prefill_chunk_size) and without an assistant"


@dataclass(slots=True, eq=False)
class _Prompt:
    """The prompt of a `generate` that runs without a cache."""

    model: nn.Module
    remembered: bool
    """Whether its first forward may be taken for the prompt."""
    length: int | None = None
    """Known once its first forward has run."""


_PROMPT: ContextVar[_Prompt | None] = ContextVar("_PROMPT", default=None)
"""That of the innermost `generate`; None outside, and where a cache holds the prompt."""


@contextmanager
def _running(prompt: _Prompt | None) -> Iterator[None]:
    token = _PROMPT.set(prompt)
    try:
        yield
    finally:
        _PROMPT.reset(token)


def remembering(model: nn.Module) -> Any:
    """Take the first forward of a `generate` that comes next for its prompt, and the following for continuations."""
    return _running(_Prompt(model, remembered=True))


class _Watched:
    """The `generate` of a model, which makes known that it runs."""

    __wrapped__: Callable[..., Any]

    def __init__(self, generate: Callable[..., Any]) -> None:
        functools.update_wrapper(self, generate)

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        prompt = _PROMPT.get()
        if prompt is None or prompt.model is not model or prompt.length is not None:  # that of another `generate`
            without = asked(model, args, kwargs, "use_cache") is False
            prompt = _Prompt(model, remembered=False) if without else None
        with _running(prompt):
            return self.__wrapped__(model, *args, **kwargs)


def watch(backbone: nn.Module) -> None:
    """Let what generates in a model make known that it runs."""
    for module in _generating(backbone):
        if not isinstance(module.generate.__func__, _Watched):
            module.__dict__["generate"] = MethodType(_Watched(module.generate.__func__), module)


def unwatch(backbone: nn.Module) -> None:
    """Undo `watch`, on a copy of a model."""
    for module in _generating(backbone):
        if isinstance(module.generate.__func__, _Watched):
            generate = module.__dict__.pop("generate").__func__.__wrapped__
            if generate is not type(module).generate:
                module.__dict__["generate"] = MethodType(generate, module)


def _generating(backbone: nn.Module) -> list[Any]:
    # A copy that is being made has no children yet, and takes over what was watched in the other.
    modules = backbone.modules() if "_modules" in backbone.__dict__ else ()
    able = (module for module in modules if hasattr(type(module), "generate"))
    return [module for module in able if isinstance(module.generate, MethodType)]


def asked(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a call of `generate`: the call's own, its configuration's, or the model's."""
    if name in kwargs:
        return kwargs[name]
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    found = getattr(given, name, None)
    return getattr(getattr(model, "generation_config", None), name, None) if found is None else found


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
