"""Reading an OpenDelta directory."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from deltaspec.backbone.loading import Wanted
from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming
from deltaspec.formats.opendelta import types
from deltaspec.formats.opendelta.saved import CONFIG, WEIGHTS, Saved
from deltaspec.formats.unread import Unread
from deltaspec.names.folding import shown
from deltaspec.names.packages import modules_in

FILES = (CONFIG, "config.*.json", *WEIGHTS)


def recognises(folder: Path) -> bool:
    """Return whether a directory holds an OpenDelta delta; a model's own has a configuration of the same name."""
    path = folder / CONFIG
    return path.is_file() and b'"delta_type"' in path.read_bytes()


def base_of(folder: Path) -> tuple[str | None, Wanted]:
    """Return the base model that a delta names, and its class."""
    config = Unread(folder).json(CONFIG)
    name, kind = config.get("backbone_checkpoint_name"), config.get("backbone_class")
    return name if isinstance(name, str) and name else None, Wanted(kind if isinstance(kind, str) else None)


def signature(folder: Path) -> bytes | None:
    """Return None: what a delta comes to depends on the values in its files."""
    return None


@cache
def known_types() -> dict[str, ModuleType]:
    """Return the modules of the delta types that can be read, by `delta_type`."""
    return {name: import_module(f"{types.__name__}.{name}") for name in modules_in(types)}


def read(folder: Path, base: Base, name: str) -> Incoming:
    """Read an OpenDelta directory for a base model. Raises DeltaSpecError with all findings.

    Where several deltas were on one model, its file holds all of them, and the configuration one: those of the others
    may lie beside it as `config.<anything>.json`.
    """
    saved = Saved(folder, base, name)
    configs = {file: saved.json(file) for file in (CONFIG, *sorted(p.name for p in folder.glob("config.*.json")))}
    for file, config in configs.items():
        kind = config.get("delta_type")
        if not isinstance(kind, str) or kind not in known_types():
            saved.unknown("delta_type", kind, known_types(), file)
    kinds = [str(config.get("delta_type")) for config in configs.values()]
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        saved.find(
            "DS539", f"has several configurations of type {', '.join(twice)}", "save each delta by itself", CONFIG
        )
    saved.settle()
    saved.incoming.kind = f"OpenDelta {' + '.join(kinds)}"
    saved.incoming.base = base_of(folder)[0]
    saved.load(WEIGHTS)
    saved.widen()
    _refuse_others(saved, kinds)
    saved.settle()
    changed = [m for kind in kinds for infix in known_types()[kind].INFIXES for m in saved.modules(infix) if m]
    saved.places(changed)  # says what the model that it was trained in is here
    beside = [key for key in saved.weights if kinds != ["bitfit"] or not key.endswith("bias")]
    saved.in_full("trained", saved.owned(beside))
    trained_in = base_of(folder)[1].kind
    lost = [key for key in beside if key in saved.weights and not _of_a_delta(key, kinds)]
    if lost and trained_in not in (None, base.table.model_class):
        message = f"also holds {shown(lost)}, trained beside the delta, and this {base.table.model_class} has none"
        saved.find("DS523", message, f"load {trained_in}", saved.file)
    for file, config in configs.items():
        options = saved.options(config, file)
        known_types()[config["delta_type"]].read(saved, options, config["delta_type"] if len(configs) > 1 else "")
        if not saved.findings:  # else not all options were asked for
            options.finish(f"OpenDelta's {config['delta_type']}")
    return saved.finish()


def _of_a_delta(key: str, kinds: list[str]) -> bool:
    """Return whether a key is of some delta, or may be a bias that BitFit trained."""
    infixes = {infix for module in known_types().values() for infix in module.INFIXES}
    inside = any(re.sub(r"_\d+$", "", segment) in infixes for segment in key.split("."))
    return inside or ("bitfit" in kinds and key.endswith("bias"))


def _refuse_others(saved: Saved, kinds: list[str]) -> None:
    """Refuse tensors of types that no configuration is here of, and second deltas of one type."""
    for kind, module in known_types().items():
        for infix in module.INFIXES:
            plain, again = saved.modules(infix), saved.modules(rf"{infix}_\d+")
            if again:
                message = f"holds a second {kind} at {shown(again)}, and a configuration for one"
                saved.find("DS538", message, "save each delta by itself, on a model without others", saved.file)
            if (
                plain
                and kind not in kinds
                and not saved.owned(f"{m}.{infix}.{r}" for m, rs in plain.items() for r in rs)
            ):
                message = f"also holds a delta of type {kind} at {shown(plain)}, and {module.NEEDS} is not in {CONFIG}"
                hint = f"copy the configuration that was saved with that one here, as config.{kind}.json"
                saved.find("DS538", message, hint, saved.file)
