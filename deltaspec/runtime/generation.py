"""Where a prompt ends while `generate` runs: some formulas edit the last tokens of a prompt, and of a prompt alone.

With a key-value cache, the first forward brings the prompt. Without one, every step brings the whole sequence, so the
prompt's length is remembered for the duration of one `generate`, by its own context (and so by thread and by task).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any

from torch import nn

from deltaspec.backbone.prompt_end import HOW, Prompt, current, running, unclear
from deltaspec.methods.registry import methods
from deltaspec.planning.planned import PlannedDelta


class _Watched:
    """The `generate` of a model, which makes known that it runs."""

    __wrapped__: Callable[..., Any]

    def __init__(self, generate: Callable[..., Any]) -> None:
        functools.update_wrapper(self, generate)

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        prompt = current()
        if prompt is None or prompt.model is not model or prompt.length is not None:  # that of another `generate`
            without = asked(model, args, kwargs, "use_cache") is False
            prompt = Prompt(model, remembered=False) if without else None
        with running(prompt):
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


def generating(planned: Mapping[str, PlannedDelta], active: Iterable[str], backbone: nn.Module) -> Callable[..., Any]:
    """Return the `generate` of a backbone under these deltas. Raises DeltaSpecError (DS450), before it generates."""
    whole: Any = backbone  # nn.Module does not say what it generates
    generate: Callable[..., Any] = whole.generate
    known = methods()
    names = [n for n in active if any(known[planned[n].method].ends_matter(s.params) for s in planned[n].sites)]
    if not names:
        return generate

    def run(*args: Any, **kwargs: Any) -> Any:
        cached = _check(names[0], backbone, args, kwargs)
        with nullcontext() if cached else running(Prompt(backbone, remembered=True)):
            return generate(*args, **kwargs)

    return run


def _check(name: str, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Refuse what hides the prompt's end from a delta; return whether there will be a cache."""
    setting, problem = functools.partial(asked, backbone, args, kwargs), None
    if setting("prefill_chunk_size") is not None:
        problem = "prefill_chunk_size brings the prompt in pieces"
    elif kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None:
        problem = "assisted generation brings guesses along with it"
    elif setting("use_cache") is False and not _is_plain_decoder(backbone):
        problem = "without a cache only a plain decoder of text tells where it ends"
    if problem is not None:
        raise unclear(f"delta {name!r} edits the last tokens of the prompt, and {problem}", HOW)
    return setting("use_cache") is not False


def _is_plain_decoder(backbone: Any) -> bool:
    """Return whether all blocks of a model see the same positions."""
    config = backbone.config
    return not config.is_encoder_decoder and config.get_text_config() is config
