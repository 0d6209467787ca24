"""Writing deltas as a PEFT adapter: of the type whose methods they are of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from deltaspec.backbone.origin import origin
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.adapter import CONFIG, WEIGHTS
from deltaspec.formats.peft.aside import ASIDE, ROWS
from deltaspec.formats.peft.card import card
from deltaspec.formats.peft.low_rank import write_updates
from deltaspec.formats.peft.reader import known_types, type_module
from deltaspec.formats.peft.task import task
from deltaspec.names.escaping import file_stem
from deltaspec.planning.lock import lock
from deltaspec.storage.card import CARD

MAIN = CONFIG
_USUAL = "lora"
"""Method whose deltas are one where there are several, at any strength."""


@torch.no_grad()
def write(out: Outgoing) -> dict[str, bytes]:
    """Return the files of a PEFT adapter. Raises DeltaSpecError with all findings."""
    from safetensors.torch import save as to_bytes

    if (write_type := _writer(out)) is not None:
        write_type(out)
    out.refuse(out.parts, "PEFT has no form for it here")
    out.settle()
    config = _config(out)
    out.label = f"PEFT {str(config['peft_type']).lower()}"
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in out.tensors.items()}
    if out.wishes.single:
        plain = {key: value.float() if value.is_floating_point() else value for key, value in plain.items()}
    return {
        WEIGHTS[0]: to_bytes(plain, {"format": "pt"}),
        CARD: card(out, config).encode(),
        **_specs(out),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def _writer(out: Outgoing) -> Callable[[Outgoing], None] | None:
    """Return what writes the type that fits; None, with findings, where there is none for all methods together."""
    present = {part.method for part in out.parts}
    main = present - ASIDE
    writers = [module for name in known_types() if hasattr(module := type_module(name), "write")]
    low_rank = {method: module.updates for module in writers if hasattr(module, "updates") for method in module.METHODS}
    own = main or present - {"full"} or present
    fitting = [module for module in writers if own <= module.METHODS and _fits(out, module)]
    if fitting and not out.wishes.low_rank:
        write: Callable[[Outgoing], None] = fitting[0].write
        return write
    known = frozenset[str]().union(*(module.METHODS for module in writers))
    close = {part.method for part in out.parts if part.is_weight} if out.wishes.approximate else set[str]()
    if main <= {*low_rank, *close}:
        return partial(write_updates, known=low_rank)
    if out.wishes.low_rank or (lost := main - known - close):
        lost = main - {*low_rank, *close}
        for method in sorted(lost):
            what = "is no low-rank update" if out.wishes.low_rank else "has no form in PEFT"
            out.refuse([part for part in out.parts if part.method == method], f"{method} {what}")
    else:
        _refuse_together(out, sorted(main))
    out.parts = []
    return None


def _refuse_together(out: Outgoing, main: list[str]) -> None:
    parts = [part for part in out.parts if part.method in main]
    if len(main) > 1:
        reason = f"a PEFT adapter is of one type, and {', '.join(main)} are of several"
        out.refuse(parts, reason, "write them one by one: " + _one_by_one(out))
        return
    several = {part.fqn for part in parts if len(out.at(part.fqn)) > 1}
    if any(part.strength != 1 for part in parts):
        strong = [part for part in parts if part.strength != 1]
        out.refuse(strong, f"strength {strong[0].strength:g} has no place in PEFT's {main[0]}")
    elif several:
        reason = "PEFT has one of this type a module, and several deltas are here"
        out.refuse(
            [part for part in parts if part.fqn in several], reason, "write them one by one: " + _one_by_one(out)
        )
    else:
        out.refuse(parts, f"PEFT's {main[0]} has no form for these parameters")


def _one_by_one(out: Outgoing) -> str:
    return "; ".join(f"c.save_as('peft', …, {name!r})" for name in out.strengths)


def _fits(out: Outgoing, module: ModuleType) -> bool:
    """Return whether a type has a form for all its parts, so far as that does not depend on the modules."""
    parts = [part for part in out.parts if part.method in module.METHODS]
    if module.METHODS <= ASIDE:
        return not hasattr(module, "fits_together") or bool(module.fits_together(parts))
    if _USUAL in module.METHODS or not (hasattr(module, "updates") or out.wishes.approximate):
        return True  # what does not fit is refused by name when it is written
    alone = all(part.strength == 1 and part.parameter is None for part in parts)
    alone = alone and (getattr(module, "KEEPS_ROWS", False) or all(part.method != ROWS for part in out.parts))
    alone = alone and len({part.fqn for part in parts}) == len(parts)
    fits = all(module.fits(part) for part in parts) if hasattr(module, "fits") else True
    return alone and fits and (not hasattr(module, "fits_together") or bool(module.fits_together(parts)))


def _config(out: Outgoing) -> dict[str, Any]:
    """Return the whole configuration, in PEFT's order: what all types have, then the type's own."""
    found = origin(out.base.model)
    base, revision = out.named or (found.get("id"), found.get("revision"))
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
