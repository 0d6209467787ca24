"""Where a prompt ends while `generate` runs: some formulas edit the last tokens of a prompt, and of a prompt alone.

With a key-value cache, the first forward brings the prompt. Without one, every step brings the whole sequence, so the
prompt's length is remembered for the duration of one `generate`, by its own context (and so by thread and by task).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from deltaspec.backbone.prompt_end import HOW, asked, remembering, unclear
from deltaspec.methods.registry import methods
from deltaspec.planning.planned import PlannedDelta


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
        with nullcontext() if cached else remembering(backbone):
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
