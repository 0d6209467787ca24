"""Facts that stand in adapter_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import show_value
from deltaspec.engines.adapters import Adapter
from deltaspec.engines.base import Base
from deltaspec.engines.observation import Observation
from deltaspec.formats.opening import CONFIG
from deltaspec.formats.options import Options
from deltaspec.formats.peft.targets import AT_END
from deltaspec.formats.unread import Unread
from deltaspec.names.patterns import PatternError, compile_regex, fullmatch

NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
"""Keys without which some reader of LoRA cannot do, or takes a value of its own."""
OPTIONS = (
    "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config", "arrow_config", "megatron_config",
)  # fmt: skip
"""Keys that make something else of LoRA where they are set."""
KNOWN = frozenset((
    *NEEDED, *OPTIONS, "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora",
    "alora_invocation_tokens", "qalora_group_size", "layer_replication", "runtime_config", "lora_bias",
    "target_parameters", "ensure_weight_tying",
))  # fmt: skip
"""All keys of PEFT's LoRA (0.21)."""
_ASKED: Mapping[str, Callable[[Options], object]] = {
    "r": lambda given: given.whole("r", 8),
    "lora_alpha": lambda given: given.number("lora_alpha", 8),
    "rank_pattern": lambda given: given.wholes("rank_pattern", AT_END),
    "alpha_pattern": lambda given: given.numbers("alpha_pattern", AT_END),
    "modules_to_save": lambda given: given.listed("modules_to_save"),
    "target_modules": lambda given: given.names("target_modules"),
    "target_parameters": lambda given: given.listed("target_parameters"),
    "bias": lambda given: given.text("bias", "none"),
}
"""Options whose values rules are about, each asked for as who reads the adapter does."""


def refuse_malformed(adapter: Adapter) -> None:
    """Raise DeltaSpecError (DS544) with a finding for each option that is not what it may be, in words of `restore`."""
    unread = Unread(adapter.folder)
    given = Options(unread, {key: value for key, value in adapter.data.items() if value is not None}, CONFIG)
    found: list[Diagnostic] = []
    for key, ask in _ASKED.items():
        if key in given.given:
            ask(given)
        found += (adapter.config.diagnostic(f.code, f.message, (key,), f.suggestion) for f in unread.findings)
        unread.findings.clear()
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = adapter.data.get(key)
        for name in pattern if isinstance(pattern, dict) and not found else ():
            try:
                _compiled(name)
            except PatternError as error:
                found.append(malformed(adapter, error, key))
    if found:
        raise DeltaSpecError(found)


def malformed(adapter: Adapter, error: PatternError, *path: str) -> Diagnostic:
    """Return the finding about an expression that cannot be used, or takes too long."""
    hint = error.suggestion or "name the modules in a list"
    return adapter.config.diagnostic("DS544", f"the expression {error}", path, hint)


def patterned(pattern: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    """Return the value that a pattern of PEFT gives a module: the first whose expression matches the name's end."""
    for name, value in (pattern or {}).items():
        if module == name or module.endswith(f".{name}"):
            return value
        if not _is_plain(name) and fullmatch(_compiled(name), module):
            return value
    return usual


def _is_plain(name: str) -> bool:
    return name.replace(".", "").replace("_", "").isalnum()


def _compiled(name: str) -> Any:
    """Return a pattern's expression; names as they stand match by their letters, whatever dots mean."""
    return None if _is_plain(name) else compile_regex(rf"(.*\.)?({name})", probe=False)


def observed(adapter: Adapter, base: Base) -> Iterator[Observation]:
    """Yield what the configuration of a LoRA says that some engine does not read as PEFT does."""
    data = adapter.data
    yield from _missing(data)
    for key in data:
        if key not in KNOWN and data[key] not in (None, False, [], {}, ""):
            yield Observation(
                "unknown_key", f"the key {show_value(key)}, which PEFT's LoRA does not have", key, path=(key,)
            )
    for key in OPTIONS:
        if data.get(key):
            yield Observation("option", key, key, path=(key,))
    for key, (fact, part) in _FLAGS.items():
        if data.get(key):
            sites = tuple(dict.fromkeys(found.site for found in adapter.keys if found.part == part))
            value = ""
            if fact == "parameters":
                value, sites = "stacked", tuple(dict.fromkeys(filter(base.is_stack, (k.site for k in adapter.keys))))
            yield Observation(fact, f"{key}: {_short(data[key])}", value, sites, (key,))
    bias = data.get("bias")
    if bias not in (None, "none"):
        sites = tuple(dict.fromkeys(found.site for found in adapter.keys if found.part == "bias"))
        yield Observation("bias", f"bias: {bias}", str(bias), sites, ("bias",))
    init = data.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in ("true", "false"):
        yield Observation("init", f"init_lora_weights: {init}", init.lower(), path=("init_lora_weights",))
    yield from _saved_modules(adapter)
    yield from _targets(adapter, base)
    yield from _added_tokens(adapter, base)


_FLAGS: Mapping[str, tuple[str, str | None]] = {
    "use_rslora": ("rslora", None),
    "use_dora": ("dora", "magnitude"),
    "lora_bias": ("lora_bias", "lora_bias"),
    "trainable_token_indices": ("tokens", "tokens"),
    "target_parameters": ("parameters", None),
    "layer_replication": ("replication", None),
    "alora_invocation_tokens": ("alora", None),
}
"""Keys that are a fact where they are set, and the part of a file that belongs to each."""


def _missing(data: Mapping[str, Any]) -> Iterator[Observation]:
    for key in NEEDED:
        if data.get(key) is None and not (key == "target_modules" and data.get("target_parameters")):
            yield Observation("missing_key", f"no {key} in the configuration", key, path=())
    if data.get("r") is not None and data["r"] <= 0:
        yield Observation("missing_key", f"r: {data['r']}, where a rank is a positive number", "r", path=("r",))


def _saved_modules(adapter: Adapter) -> Iterator[Observation]:
    for name in adapter.data.get("modules_to_save") or ():
        path = ("modules_to_save",)
        held = tuple(key.module for key in adapter.keys if key.part in ("weight", "bias"))
        sites = tuple(dict.fromkeys(m for m in held if m == str(name) or m.endswith(f".{name}")))
        yield Observation("saved_module", f"modules_to_save: {name}", str(name), sites, path)


def _targets(adapter: Adapter, base: Base) -> Iterator[Observation]:
    targets = adapter.data.get("target_modules")
    if isinstance(targets, str):
        value = "all-linear" if targets.lower() == "all-linear" else "regex"
        yield Observation("targets", f"target_modules: {_short(targets)}", value, path=("target_modules",))
    elif isinstance(targets, list):
        held = dict.fromkeys(key.site for key in adapter.keys if key.part in ("A", "embedding_A"))
        named = {str(name) for name in targets}
        beside = tuple(site for site in held if base.row(site) is not None and not _is_target(site, named))
        if beside and not adapter.data.get("target_parameters"):
            says = "tensors of modules that target_modules does not name"
            yield Observation("targets", says, "narrower", beside, ("target_modules",))


def _is_target(site: str, named: Iterable[str]) -> bool:
    parts = site.split(".")
    return any(".".join(parts[start:]) in named for start in range(len(parts)))


def _added_tokens(adapter: Adapter, base: Base) -> Iterator[Observation]:
    """Tokens beyond the base's vocabulary, in the file of a tokenizer that was saved along."""
    file = adapter.folder / "added_tokens.json"
    rows = next((row.in_features for row in base.rows.values() if row.vocabulary), None)
    if adapter.delta or rows is None or not file.is_file():
        return
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))
        added = [token for token, number in tokens.items() if number >= rows]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        finding = Diagnostic("DS625", f"cannot be read: {error}", str(file), suggestion="delete it, or save it again")
        raise DeltaSpecError([finding]) from None
    if added:
        says = f"{len(added)} added tokens (added_tokens.json) beyond the base's vocabulary of {rows}"
        yield Observation("added_tokens", says, path=())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
