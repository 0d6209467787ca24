"""PEFT's rules for which modules an adapter is put on, and which rank and alpha it has at each.

Read in `BaseTuner.inject_adapter`, `check_target_module_exists` and `get_pattern_key` of PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.peft.adapter import CONFIG, Adapter
from deltaspec.names.folding import shown

ALL_LINEAR = "all-linear"


LAYERS = ("linear", "conv1d", "conv")


def check_targets(adapter: Adapter, modules: Mapping[str, str], kinds: Iterable[str] = LAYERS) -> None:
    """Compare the modules that have keys, with their FQNs here, with those that the configuration means.

    PEFT leaves out keys of modules that it does not mean, and draws at random those that are missing, in silence.
    """
    targets = adapter.option("target_modules")
    excluded = adapter.option("exclude_modules")
    layers, pattern = adapter.option("layers_to_transform"), adapter.option("layers_pattern")
    if targets is None:  # the defaults of the model's type: the keys show them
        return
    names = list(modules)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return
    try:
        meant = {name for name in names if is_meant(name, targets, excluded, layers, pattern)}
        here = [row.fqn for row in adapter.base.table.rows if row.fqn and row.kind in kinds]
        wanted = {fqn for fqn in here if is_meant(fqn, targets, excluded, layers, pattern)}
    except re.error as error:
        adapter.find("DS544", f"target_modules is no regular expression: {error}", "save the adapter again", CONFIG)
        return
    if other := [name for name in names if name not in meant]:
        message = f"target_modules does not mean {shown(other)}, so PEFT leaves out what the file has for it"
        adapter.find("DS543", message, "the configuration was changed after the adapter was saved", CONFIG)
    saved = adapter.option("modules_to_save") or []
    own = set(modules.values())
    lacking = [fqn for fqn in sorted(wanted - own) if not any(_below_saved(fqn, name) for name in saved)]
    if lacking and own <= {row.fqn for row in adapter.base.table.rows}:
        message = f"has no tensors for {counted(len(lacking), 'module')} that target_modules means: {shown(lacking)}"
        adapter.find("DS543", message, "the file was cut, or is for a model with fewer layers", adapter.file)


def is_meant(name: str, targets: Any, excluded: Any = None, layers: Any = None, pattern: Any = None) -> bool:
    """Return whether PEFT puts an adapter onto a module of this name. Raises re.error."""
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _listed(name, excluded)):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    if not _listed(name, targets):
        return False
    if layers is None or layers == []:
        return True
    index = _layer(name, pattern)
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def _layer(name: str, pattern: Any) -> int | None:
    patterns = [r"[^.]*"] if not pattern else [pattern] if isinstance(pattern, str) else list(pattern)
    lead = r".*?\." if not pattern else r"(?:^|.*?\.)"
    for one in patterns:
        if (found := re.match(rf"{lead}{one}\.(?P<index>\d+)\.", name)) is not None:
            return int(found["index"])
    return None


def _listed(name: str, words: Iterable[str]) -> bool:
    return any(name == word or name.endswith(f".{word}") for word in words)


def _below_saved(fqn: str, name: str) -> bool:
    return re.match(rf"(^|.*\.){name}($|\..*)", fqn) is not None


def by_pattern(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return what `rank_pattern` or `alpha_pattern` says of a module: of its keys, regexes, the first at its end."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def by_pattern_below(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return what a pattern of FourierFT or C3A says of a module: of its keys, a regex below a module, or the name."""
    for key, value in patterns.items():
        if re.match(rf".*\.{key}$", name):
            return value
    return patterns.get(name, default)
