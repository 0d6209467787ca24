"""Engines: what each serving engine rejects, ignores or gets wrong of an adapter, one data file an engine.

Reads headers of tensors, never their values, and writes nothing.

    >>> from deltaspec import engines
    >>> "vllm" in engines.known()
    True
    >>> engines.check("adapter", "base", "vllm")  # doctest: +SKIP
    [Diagnostic(code='DS605', message='rejected by vLLM: DoRA …', …)]
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.diagnostics.findings import Diagnostic


def known() -> tuple[str, ...]:
    """Return the names of the engines whose rules are here, sorted: one a file."""
    from deltaspec.engines.rules import names

    return names()


def check(
    adapter: str | PathLike[str], base: str | nn.Module, engine: str, max_rank: int | None = None
) -> list[Diagnostic]:
    """Return what an engine would reject, ignore or get wrong of an adapter on a base; empty where it serves it right.

    `adapter` is a directory that `save` wrote, or one of PEFT's; `base` a model, with weights or without, or what the
    command line names one by. `engine` is a name of `known()`, or a file of rules. `max_rank` is the limit that the
    engine was started with; left out, its own default. Raises DeltaSpecError where one of them cannot be read.
    """
    from deltaspec.engines.judge import check as judged

    return judged(adapter, base, engine, max_rank)


def needs(engine: str) -> frozenset[str]:
    """Return the rewrites (`deltaspec.engines.vocabulary.REWRITES`) by which an export fits an engine, without loss."""
    from deltaspec.engines.rules import rules_of

    return rules_of(engine).rewrites


def notes(engine: str) -> tuple[str, ...]:
    """Return what whoever starts an engine must know, whatever the adapter: flags, forms of files, defaults."""
    from deltaspec.engines.rules import rules_of

    return rules_of(engine).notes
