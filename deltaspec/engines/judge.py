"""What an engine makes of an adapter: the facts about it, each held against that engine's rules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from deltaspec.backbone.loading import model_from
from deltaspec.backbone.tabulate import tabulate
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, in_order
from deltaspec.engines import configuration, tensors
from deltaspec.engines.adapters import Adapter, read_peft
from deltaspec.engines.base import Base
from deltaspec.engines.observation import Observation
from deltaspec.engines.own import read_saved
from deltaspec.engines.rules import Rule, Rules, rules_of
from deltaspec.engines.vocabulary import EXPORT, FACTS, OUTCOMES, REWRITES
from deltaspec.engines.ways_out import way_out
from deltaspec.formats.opening import base_reference, located
from deltaspec.names.folding import shown
from deltaspec.names.patterns import PatternError
from deltaspec.storage.delta_set import MANIFEST

if TYPE_CHECKING:
    from torch import nn

MOST = 8
"""Patterns of sites that a finding names."""


def check(
    adapter: str | os.PathLike[str], base: str | nn.Module, engine: str, max_rank: int | None = None
) -> list[Diagnostic]:
    """Return the findings about an adapter on a base under an engine; see `deltaspec.engines.check`."""
    rules = rules_of(engine)
    folder = located(adapter)
    ours = (folder / MANIFEST).is_file()
    read = None if ours else read_peft(folder)
    held = Base(tabulate(model_from(*base_reference(folder, base)) if isinstance(base, str) else base))
    adapters = read_saved(folder, held) if read is None else [read]
    return in_order(finding for each in adapters for finding in judge(each, held, rules, max_rank))


def judge(adapter: Adapter, base: Base, rules: Rules, max_rank: int | None = None) -> Iterator[Diagnostic]:
    """Yield the findings about one adapter. Raises DeltaSpecError where its configuration is malformed (DS544)."""
    configuration.refuse_malformed(adapter)
    try:
        found = list(_observed(adapter, base))
    except PatternError as error:  # one that takes too long on some name
        raise DeltaSpecError([configuration.malformed(adapter, error)]) from None
    for observation in found:
        for rule in rules.about(observation.fact, observation.value):
            yield _finding(adapter, observation, rules, rule)
        if observation.fact == "rank" and (rule_of_rank := _too_high(rules, observation.number, max_rank)) is not None:
            yield _finding(adapter, observation, rules, rule_of_rank)


def _observed(adapter: Adapter, base: Base) -> Iterator[Observation]:
    if adapter.method != "LORA":
        label = adapter.ours or adapter.method or "none"
        if not adapter.is_lora:
            sites = adapter.places or tuple(dict.fromkeys(filter(None, map(base.module_of, adapter.tensors))))
            path, hint = ("peft_type",), way_out(adapter.method)
            yield Observation("method", f"the method {label}", adapter.method, sites, path, hint)
        elif adapter.method:
            yield Observation("mislabelled", f"tensors of LoRA under peft_type: {label}", label, path=("peft_type",))
    if adapter.is_lora:
        yield from configuration.observed(adapter, base)
    yield from tensors.observed(adapter, base)


def _too_high(rules: Rules, rank: int, max_rank: int | None) -> Rule | None:
    """Return the rule that a rank breaks: the limit that an engine was started with, or has by itself."""
    limit = rules.rank
    if limit.greatest is not None and rank > limit.greatest:
        return Rule(fact="rank", outcome="rejected", happens=f"it takes ranks up to {limit.greatest}")
    started = max_rank if max_rank is not None else limit.default
    if started is None or rank <= started:
        return None
    happens = f"it takes ranks up to {started} {'as it was started' if max_rank is not None else 'by default'}"
    hint = None if limit.flag is None else f"start it with {limit.flag} {limit.enough(rank)}"
    if hint is not None and max_rank is None:
        hint += f", and check for that with --max-rank {limit.enough(rank)}"
    return Rule(fact="rank", outcome="rejected", happens=happens, hint=hint)


def _finding(adapter: Adapter, observation: Observation, rules: Rules, rule: Rule) -> Diagnostic:
    fact = FACTS[observation.fact]
    who = f"{adapter.delta}: " if adapter.delta else ""
    at = f" at {shown(observation.sites, MOST)}" if observation.sites else ""
    message = f"{who}{OUTCOMES[rule.outcome].format(rules.title)}: {observation.says}{at}: {rule.happens}"
    ways = [observation.hint or rule.hint or ("" if rule.rewrite else fact.way_out)]
    if rule.rewrite is not None:
        ways.insert(0, f"{EXPORT} {REWRITES[rule.rewrite]}")
    suggestion = "; or ".join(filter(None, ways)).replace("ENGINE", rules.engine)
    suggestion = suggestion.replace("ADAPTER", str(adapter.folder))
    if observation.path is None or adapter.delta:
        return Diagnostic(fact.code, message, adapter.file, suggestion=suggestion, where=adapter.delta)
    return adapter.config.diagnostic(fact.code, message, observation.path, suggestion)
