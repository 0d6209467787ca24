"""Writing for a serving engine: with the rewrites that make its check pass, which is run before anything appears."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.engines import check, needs
from deltaspec.engines.rules import rules_of
from deltaspec.formats.outgoing import Wishes


def wishes_for(engine: str, wishes: Wishes) -> Wishes:
    """Return how an adapter is to be written for an engine. Raises DeltaSpecError for one that is not known (DS627)."""
    rewrites = needs(engine)
    facts = {rule.fact for rule in rules_of(engine).rules}
    return replace(
        wishes,
        uniform=wishes.uniform or not rewrites.isdisjoint({"one_rank", "one_factor"}),
        low_rank="method" in facts,
        dora="dora" not in facts,
        rslora="rslora_to_alpha" not in rewrites,
        listed="list_targets" in rewrites,
        single="usual_dtype" in rewrites,
    )


def greatest_rank(config: Mapping[str, Any]) -> int | None:
    """Return the greatest rank of a PEFT configuration; None where it has none."""
    return max((config.get("r") or 0, *(config.get("rank_pattern") or {}).values())) or None


def require_served(files: dict[str, bytes], config: str, base: nn.Module, engine: str, source: str | None) -> None:
    """Raise DeltaSpecError with all that an engine would reject, ignore or get wrong of these files.

    Of ranks, the greatest that some start of it takes counts, not what it takes by itself. Findings name `source`, the
    directory that they were made of, or the model at hand: the files themselves are never written.
    """
    data = json.loads(files[config])
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in files.items():
            (Path(temporary) / name).write_bytes(content)
        found = check(temporary, base, engine, max_rank=greatest_rank(data))
    if found:
        ways = [_way(f.suggestion or "", temporary, source) or None for f in found]
        place = source or "<model>"
        raise DeltaSpecError(
            [replace(f, file=place, line=0, column=0, suggestion=w) for f, w in zip(found, ways, strict=True)]
        )


def _way(suggestion: str, temporary: str, source: str | None) -> str:
    """Return a way out in terms of what is there: the directory `source`, or the compiled model."""
    if source is not None:
        return suggestion.replace(temporary, source)
    return suggestion.replace(f'deltaspec.restore(model, "{temporary}").merge()', "c.merge()").replace(temporary, "DIR")
