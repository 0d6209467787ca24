"""Writing deltas as a PEFT adapter: of the type whose methods they are of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.adapter import CONFIG, WEIGHTS
from deltaspec.formats.peft.aside import ASIDE
from deltaspec.formats.peft.card import CARD, card
from deltaspec.formats.peft.reader import known_types, type_module
from deltaspec.formats.peft.task import base_of, task
from deltaspec.names.escaping import file_stem
from deltaspec.planning.lock import lock

MAIN = CONFIG
_USUAL = "LORA"
"""Type that carries what goes beside any type, where that is all there is."""


@torch.no_grad()
def write(out: Outgoing) -> dict[str, bytes]:
    """Return the files of a PEFT adapter. Raises DeltaSpecError with all findings."""
    from safetensors.torch import save as to_bytes

    kind = _type(out)
    if kind is not None:
        kind.write(out)
    out.refuse(out.parts, "PEFT has no form for it here")
    out.settle()
    config = _config(out)
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in out.tensors.items()}
    return {
        WEIGHTS[0]: to_bytes(plain, {"format": "pt"}),
        CARD: card(out, config).encode(),
        **_specs(out),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def _type(out: Outgoing) -> ModuleType | None:
    """Return the module of the type to write; None, with findings, where there is none for all methods together."""
    present = {part.method for part in out.parts}
    main = present - ASIDE
    writers = [module for name in known_types() if hasattr(module := type_module(name), "write")]
    fitting = [module for module in writers if (main or present) <= module.METHODS]
    if fitting or not main:
        return fitting[0] if fitting else type_module(_USUAL)
    known = frozenset[str]().union(*(module.METHODS for module in writers))
    if lost := main - known:
        for method in sorted(lost):
            out.refuse([part for part in out.parts if part.method == method], f"PEFT has no form for {method}")
        out.parts = []
        return None
    together = ", ".join(sorted(main))
    out.refuse(
        [part for part in out.parts if part.method in main],
        f"a PEFT adapter is of one type, and {together} are of several",
        "write them one by one: " + "; ".join(f"c.save_as('peft', …, {name!r})" for name in out.strengths),
    )
    out.parts = []
    return None


def _config(out: Outgoing) -> dict[str, Any]:
    """Return the whole configuration, in PEFT's order: what all types have, then the type's own."""
    base, revision = base_of(out.base.model)
    kind = type(out.base.model)
    task_type = task(out)
    auto = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "task_type": task_type,
        "auto_mapping": None if task_type else auto,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        **out.config,
    }


def _specs(out: Outgoing) -> dict[str, bytes]:
    """Return the spec and the lock of each delta that went out."""
    files = {}
    for name in _independent(out):
        part = out.plan.alone(name, out.strengths)
        stem = file_stem(name)
        files[f"{stem}.deltaspec.json"] = (json.dumps(part.specs[0].to_data(), indent=2) + "\n").encode()
        files[f"{stem}.deltaspec.lock.json"] = lock(part).encode()
    return files


def _independent(out: Outgoing) -> Iterable[str]:
    return [delta.name for delta in out.plan.deltas if delta.name in out.strengths]
