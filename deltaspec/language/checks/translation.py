"""A configuration in PEFT's words as a spec, without its model or its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from deltaspec.documents.builder import MAX_FINDINGS
from deltaspec.documents.document import from_data
from deltaspec.language.checks.foreign import renamed
from deltaspec.language.checks.gate import gate
from deltaspec.language.checks.whole import check
from deltaspec.methods.registry import builtin_methods

if TYPE_CHECKING:
    from deltaspec.methods.base import Method

_OTHERWISE: Mapping[str, str] = {"LN_TUNING": "norm", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "soft_prompt"}
"""Our names of the methods that PEFT calls otherwise, in more than the case of letters."""
NAME = "default"
"""What PEFT calls an adapter that nobody named."""
_PLACES = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
    "modules_to_save", "trainable_token_indices", "bias",
)  # fmt: skip
"""Keys that say where something is changed, or become deltas of their own."""
_TYPES: Mapping[str, tuple[type, ...]] = {
    "target_modules": (str, list),
    "target_parameters": (list,),
    "exclude_modules": (str, list),
    "layers_to_transform": (int, list),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "modules_to_save": (list,),
    "trainable_token_indices": (list, dict),
    "bias": (str,),
}
"""Types of these, where they are set."""
_HARMLESS = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "init_weights",
    "init_lora_weights", "deltaT", "eps", "token_dim", "num_transformer_submodules", "num_attention_heads",
    "num_layers", "encoder_reparameterization_type", "prompt_tuning_init", "ensure_weight_tying",
))  # fmt: skip
"""Keys that change nothing by the values that are left for them here."""
_UNSET: Mapping[str, Any] = {"decompose_factor": -1, "mini_r": 1}
"""Values by which PEFT says that there is none."""
_KEPT = ("rank", "alpha")
"""Parameters that are written out where they are our defaults, too."""
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "LORA": {"r": 8, "lora_alpha": 8},
    "ADALORA": {"target_r": 8, "init_r": 12, "lora_alpha": 8},
    "LOHA": {"r": 8, "alpha": 8},
    "LOKR": {"r": 8, "alpha": 8},
    "HIRA": {"r": 32},
    "HRA": {"r": 8},
    "MISS": {"r": 64},
    "VERA": {"r": 256},
    "DELORA": {"r": 8, "init_weights": True},
    "OFT": {"eps": 6e-5, "use_cayley_neumann": True},
    "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM"},
}
"""What PEFT takes for keys that are left out, where we would take something else, or where it is written out anyway."""
_ALWAYS: Mapping[str, Mapping[str, Any]] = {
    "PREFIX_TUNING": {"positions": "counted"},
    "PROMPT_TUNING": {"place": "front"},
    "P_TUNING": {"place": "front"},
}
"""What PEFT has no key for, since it knows nothing else, and is not our default."""
_STARTS: Mapping[tuple[str, Any], str] = {("HIRA", "gaussian"): "normal", ("LOKR", "lycoris"): "zero_large"}
"""Starts that PEFT calls otherwise: (type, `init_weights`)."""
_EITHER = ("classifier", "score")
"""Heads of which a model has one: for classifiers PEFT writes both by itself."""


def our_name(peft_type: str) -> str:
    """Return what a method of PEFT would be called here; there may be none of this name."""
    return _OTHERWISE.get(peft_type, peft_type.lower())


def peft_name(method: str) -> str:
    """Return what a method of ours would be called in PEFT; there may be none of this name."""
    return next((theirs for theirs, ours in _OTHERWISE.items() if ours == method), method.upper())


def translated(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]] | None:
    """Return a spec that says what a configuration does, and the keys it has no word for; None where there is none."""
    kind = str(config.get("peft_type", "LORA"))
    method = builtin_methods().get(our_name(kind))
    if method is None or not _is_of_peft(config) or (kind in _ALWAYS and not _is_of_any_model(config)):
        return None
    params, left_out = _params(_in_full(config, kind), method)
    if params is None:
        return None
    delta: dict[str, Any] = {"name": NAME, "method": method.name}
    if params:
        delta["params"] = params
    target = _target(config)
    if target is not None:
        delta["target"] = target
    if overrides := list(_overrides(config, params, method)):
        delta["overrides"] = overrides
    spec = {"deltaspec": 1, "deltas": [delta, *_others(config, target)]}
    return (spec, left_out) if _is_valid(spec) else None


def _is_of_peft(config: Mapping[str, Any]) -> bool:
    """Return whether the keys that say places hold what PEFT writes there."""
    given = ((config[key], kinds) for key, kinds in _TYPES.items() if config.get(key))
    return all(isinstance(value, kinds) and not isinstance(value, bool) for value, kinds in given)


def _is_of_any_model(config: Mapping[str, Any]) -> bool:
    """Return whether a prompt's or prefix's configuration says all that its spec does.

    A prompt in front of a classifier needs `output: all` in some models, and must not have it in others. A prefix
    without its model has no width that its MLP could take from there.
    """
    if not config.get("num_virtual_tokens"):
        return False
    if config.get("peft_type") == "PREFIX_TUNING":
        return not config.get("prefix_projection") or bool(config.get("encoder_hidden_size") or config.get("token_dim"))
    return config.get("task_type") != "SEQ_CLS"


def _in_full(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return a configuration with what PEFT takes for keys that are left out, without keys that then say nothing."""
    full = {**_LEFT_OUT.get(kind, {}), **config, **_ALWAYS.get(kind, {})}
    start = full.get("init_weights")
    if isinstance(start, str) and (kind, start) in _STARTS:
        full["init"] = _STARTS[kind, full.pop("init_weights")]
    if kind == "OFT":
        if not full.pop("coft", False):
            del full["eps"]
        if not full["use_cayley_neumann"]:
            full.pop("num_cayley_neumann_terms", None)
        elif full.get("num_cayley_neumann_terms") == 3:
            full["num_cayley_neumann_terms"] = 4  # PEFT's series has the same four at three
    if kind == "ADALORA" and all(isinstance(full[key], int) for key in ("target_r", "init_r")):
        full["target_r"] = min(full["target_r"], full["init_r"])
    if kind == "PREFIX_TUNING":
        width = full.pop("encoder_hidden_size", None) or full.get("token_dim")
        full |= {"width": width} if full.get("prefix_projection") else {}
    return full


def _is_valid(spec: dict[str, Any]) -> bool:
    document, known = from_data(spec), builtin_methods()
    return not gate(document, known) and not check(document, known, [], lambda _: True)[:MAX_FINDINGS]


def _params(config: Mapping[str, Any], method: Method) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the method's parameters, and keys that it has no word for; None where they depend on the model."""
    fields = method.Params.model_fields
    params: dict[str, Any] = {}
    left_out = []
    # What the method itself says of a key counts before what others mean by it: AdaLoRA's r is not its rank.
    keys = sorted(config, key=lambda key: key.lower() not in method.foreign and key not in fields)
    for key in keys:
        value = config[key]
        if key in _PLACES or value is None or _UNSET.get(key) == value:
            continue
        meaning = method.foreign.get(key.lower())
        if isinstance(meaning, Mapping):
            said = _said(meaning, value)
            params |= {name: item for name, item in said.items() if name not in params}
            if not said and value not in (True, False, 0):
                left_out.append(key)
        elif isinstance(meaning, str) and meaning.startswith("write ") and value:
            return None, []
        elif key in fields:
            params[key] = value
        elif (ours := renamed(key, fields, method)) is not None:
            params.setdefault(ours, value)
        elif value and key not in _HARMLESS and not isinstance(meaning, str):
            left_out.append(key)
    plain = {name: field.default for name, field in fields.items()}
    return {name: item for name, item in params.items() if name in _KEPT or item != plain.get(name)}, left_out


def _said(meaning: Mapping[Any, str], value: Any) -> dict[str, Any]:
    """Return the parameters that a method's table of values gives for a value; none where it is not in there."""
    for given, ours in meaning.items():
        if given is value:
            return _parsed(ours)
        plain = isinstance(value, str | int) and not isinstance(value, bool)
        if isinstance(given, str) and plain and (found := re.fullmatch(given, str(value))):
            return _parsed(found.expand(ours))
    return {}


def _parsed(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text if text.startswith("{") else f"{{{text}}}"))


def _target(config: Mapping[str, Any]) -> Any:
    """Return the selector of the modules; None where PEFT would take its own default."""
    modules, parameters = config.get("target_modules"), config.get("target_parameters")
    inside: dict[str, Any] = {}
    if modules == "all-linear":
        kinds = [{"type": name, "optional": True} for name in ("Linear", "Conv1D")]
        inside = {"any": kinds, "not": {"role": "head", "optional": True}}
    elif isinstance(modules, str):
        inside = {"regex": modules}
    elif modules:
        inside = {"path": [_path(str(name)) for name in modules]}
    layers = config.get("layers_to_transform")
    if layers is not None and inside:
        inside["layers"] = [layers] if isinstance(layers, int) else list(layers)
    excluded = config.get("exclude_modules")
    if excluded and inside:
        without = {"regex": excluded} if isinstance(excluded, str) else {"path": [_path(str(n)) for n in excluded]}
        inside["not"] = without if "not" not in inside else {"any": [inside["not"], without]}
    stacked = {"parameter": [_path(str(name)) for name in parameters]} if parameters else None
    if inside and stacked:
        return {"any": [inside, stacked]}
    return stacked or inside or None


def _path(name: str) -> str:
    """Return a glob for a name that PEFT takes as the end of a module's name."""
    return f"**.{name}"


def _overrides(config: Mapping[str, Any], params: Mapping[str, Any], method: Method) -> Iterator[dict[str, Any]]:
    """Yield what patterns change: one override for each pattern, the narrower ones of both kinds merged."""
    patterns: dict[str, dict[str, Any]] = {}
    for key, name in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        if name in method.Params.model_fields:
            for pattern, value in (config.get(key) or {}).items():
                patterns.setdefault(str(pattern), {})[name] = value
    for pattern, changed in patterns.items():
        plain = re.fullmatch(r"[\w.]+", pattern)
        match = {"path": _path(pattern)} if plain else {"regex": rf"(.*\.)?({pattern.removeprefix('^')})"}
        if any(params.get(name) != value for name, value in changed.items()):
            yield {"match": match, "params": changed}


def _saved(names: list[str]) -> dict[str, Any]:
    """Return the selector of modules that are trained in full; of the heads that PEFT lists together, there is one."""
    if not set(_EITHER) <= set(names):
        return {"path": [_path(name) for name in names]}
    rest = [_path(name) for name in names if name not in _EITHER]
    heads = [{"path": _path(name), "optional": True} for name in _EITHER]
    return {"any": [{"path": rest}, *heads] if rest else heads}


def _others(config: Mapping[str, Any], target: Any) -> Iterator[dict[str, Any]]:
    """Yield what becomes a delta of its own."""
    if saved := config.get("modules_to_save"):
        yield {"name": "saved", "method": "full", "target": _saved([str(name) for name in saved])}
    tokens = config.get("trainable_token_indices")
    tables: dict[str, Any] = tokens if isinstance(tokens, dict) else {"": tokens} if tokens else {}
    for name, ids in tables.items():
        place = {"target": {"path": _path(str(name))}} if name else {}
        title = f"tokens_{name}" if len(tables) > 1 else "tokens"
        yield {"name": title, "method": "trainable_tokens", "params": {"token_ids": ids}, **place}
    if config.get("bias") in ("all", "lora_only"):
        place = {"target": target} if config["bias"] == "lora_only" and target is not None else {}
        yield {"name": "biases", "method": "bitfit", **place}
