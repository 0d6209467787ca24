"""PEFT's rules for which modules an adapter is put on, and which rank and alpha it has at each.

Read in `BaseTuner.inject_adapter`, `check_target_module_exists` and `get_pattern_key` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.peft.adapter import CONFIG, Adapter
from deltaspec.names.folding import shown
from deltaspec.names.patterns import matched

ALL_LINEAR = "all-linear"
AT_END = r"(.*\.)?({})$"
"""Where PEFT puts the keys of `rank_pattern` and `alpha_pattern`: at the end of a module's name."""
BELOW_ANY = r".*\.{}$"
"""Where it puts those of FourierFT and C3A."""
_BELOW = r"(^|.*\.){}($|\..*)"
_AT_LAYER = r"(?:^|.*?\.){}\.(?P<index>\d+)\."


LAYERS = ("linear", "conv1d", "conv")


def check_targets(adapter: Adapter, modules: Mapping[str, str], kinds: Iterable[str] = LAYERS) -> None:
    """Compare the modules that have keys, with their FQNs here, with those that the configuration means.

    PEFT leaves out keys of modules that it does not mean, and draws at random those that are missing, in silence.
    """
    targets, excluded = adapter.options.names("target_modules"), adapter.options.names("exclude_modules")
    layers, pattern = _layers(adapter), adapter.options.names("layers_pattern", _AT_LAYER)
    saved = adapter.options.listed("modules_to_save", _BELOW)
    adapter.options.settle()
    if targets is None:  # the defaults of the model's type: the keys show them
        return
    names = list(modules)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return
    meant = {name for name in names if is_meant(name, targets, excluded, layers, pattern)}
    here = [row.fqn for row in adapter.base.table.rows if row.fqn and row.kind in kinds]
    wanted = {fqn for fqn in here if is_meant(fqn, targets, excluded, layers, pattern)}
    if other := [name for name in names if name not in meant]:
        message = f"target_modules does not mean {shown(other)}, so PEFT leaves out what the file has for it"
        adapter.find("DS543", message, "the configuration was changed after the adapter was saved", CONFIG)
    own = set(modules.values())
    lacking = [fqn for fqn in sorted(wanted - own) if not any(_below_saved(fqn, name) for name in saved)]
    if lacking and own <= {row.fqn for row in adapter.base.table.rows}:
        message = f"has no tensors for {counted(len(lacking), 'module')} that target_modules means: {shown(lacking)}"
        adapter.find("DS543", message, "the file was cut, or is for a model with fewer layers", adapter.file)


def is_meant(name: str, targets: Any, excluded: Any = None, layers: Any = None, pattern: Any = None) -> bool:
    """Return whether PEFT puts an adapter onto a module of this name. Raises PatternError."""
    if excluded and (matched("fullmatch", excluded, name) if isinstance(excluded, str) else _listed(name, excluded)):
        return False
    if isinstance(targets, str):
        return matched("fullmatch", targets, name) is not None
    if name in targets:
        return True
    if not _listed(name, targets):
        return False
    if layers is None or layers == []:
        return True
    index = _layer(name, pattern)
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def _layers(adapter: Adapter) -> int | list[int] | None:
    if adapter.options.get("layers_to_transform") is None:
        return None
    if isinstance(adapter.options.given["layers_to_transform"], list):
        return adapter.options.items("layers_to_transform", (), int)
    return adapter.options.whole("layers_to_transform", 0)


def _layer(name: str, pattern: Any) -> int | None:
    given = [pattern] if isinstance(pattern, str) else list(pattern or ())
    for one in map(_AT_LAYER.format, given) if given else (r".*?\.[^.]*\.(?P<index>\d+)\.",):
        if (found := matched("match", one, name)) is not None:
            return int(found["index"])
    return None


def _listed(name: str, words: Iterable[str]) -> bool:
    return any(name == word or name.endswith(f".{word}") for word in words)


def ranks_of(adapter: Adapter) -> dict[str, int]:
    """Return `rank_pattern`."""
    return adapter.options.wholes("rank_pattern", AT_END, 1)


def alphas_of(adapter: Adapter) -> dict[str, float]:
    """Return `alpha_pattern`."""
    return adapter.options.numbers("alpha_pattern", AT_END)


def _below_saved(fqn: str, name: str) -> bool:
    return matched("match", _BELOW.format(name), fqn) is not None


def by_pattern(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return what `rank_pattern` or `alpha_pattern` says of a module: of its keys, regexes, the first at its end."""
    for key, value in patterns.items():
        if matched("match", AT_END.format(key), name):
            return value
    return default


def by_pattern_below(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return what a pattern of FourierFT or C3A says of a module: of its keys, a regex below a module, or the name."""
    for key, value in patterns.items():
        if matched("match", BELOW_ANY.format(key), name):
            return value
    return patterns.get(name, default)
