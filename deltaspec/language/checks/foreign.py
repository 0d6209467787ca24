"""The names that other libraries' configurations use (PEFT, AdapterHub, OpenDelta), and what to write here instead.

Every answer can be followed as it stands: `did you mean "rank"?` renames the key, `write scaling: rslora instead` puts
that in its place, and `delete it` takes it out. What belongs to one method stands in that method (`Method.foreign`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from json import dumps
from typing import TYPE_CHECKING, Any

from deltaspec.methods.registry import builtin_methods

if TYPE_CHECKING:
    from deltaspec.methods.base import Method

_MISSING = "delete it: there is no such option here"
_NEEDLESS = "delete it: deltaspec needs no such key"
_MODEL = "delete it: the model says so itself"
_START = "delete it: the start is the usual one"
_RENAMES: Mapping[str, str] = {
    "svd_rank": "rank",
    "majority_sign_method": "majority_sign",
    **dict.fromkeys(("dropout_rate", "p"), "dropout"),
}
"""Parameters that mean the same, and are no single method's: of combinations, and of several libraries' layers."""
_GONE: Mapping[str, str] = {
    **dict.fromkeys(("task_type", "inference_mode", "fan_in_fan_out", "base_model_name_or_path"), _NEEDLESS),
    **dict.fromkeys(("backbone_model", "common_structure", "structure_mapping", "interactive_modify"), _NEEDLESS),
    **dict.fromkeys(("revision", "auto_mapping", "peft_version", "runtime_config", "architecture"), _NEEDLESS),
    **dict.fromkeys(("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), _MODEL),
    **dict.fromkeys(
        ("module_dropout", "rank_dropout", "ensure_weight_tying", "composition_mode", "use_dora"), _MISSING
    ),
    "init_weights": _START,
}
"""Keys with no counterpart, in the configurations of several methods or of a library as a whole."""
VALUES: Mapping[tuple[str, str], str] = {
    ("init", "gaussian"): "normal",
    ("init", "true"): "kaiming_uniform",
    ("init", "random"): "uniform",
    ("init", "sample_vocab"): "vocabulary",
    ("combine", "weighted"): "linear",
    **{("dtype", word): "float16" for word in ("fp16", "half", "f16")},
    **{("dtype", word): "bfloat16" for word in ("bf16", "bfloat")},
    **{("dtype", word): "float32" for word in ("fp32", "float", "single", "f32")},
    **{("dtype", word): "float64" for word in ("fp64", "double", "f64")},
}
"""Values that are called otherwise: (key, value in small letters)."""


def renamed(key: str, known: Collection[str], method: Method | None) -> str | None:
    """Return which of the parameters `known` another library's key means, in this method; None where it is none."""
    return next((ours for ours in _meanings(key.lower(), method) if isinstance(ours, str) and ours in known), None)


def parameter_hint(key: str, value: object, known: Collection[str], method: Method | None) -> str | None:
    """Return what to write for another library's parameter, in a method that knows the parameters `known`."""
    plain = key.lower()
    if method is not None and plain in method.foreign:
        return _answer(method.foreign[plain], value)
    if plain == "bias":
        return _MISSING if value in ("none", False) else "write a delta of its own: {name: biases, method: bitfit}"
    if ours := renamed(plain, known, method):
        return _answer(ours, value)
    elsewhere = plain not in _GONE and any(not _is_gone(ours) for ours in _meanings(plain, method))
    return _MISSING if elsewhere or plain.endswith(("dropout", "_config")) else None


def place_hint(key: str, value: object, method: Method | None) -> str | None:
    """Return what to write, and where, for another library's key that is no parameter here."""
    plain = key.lower()
    if make := _PLACES.get(plain):
        return make(value)
    if plain.endswith("_pattern"):
        name = plain.removesuffix("_pattern")
        known = {name for each in (method, *builtin_methods().values()) if each for name in each.Params.model_fields}
        ours = name if name in known else renamed(name, known, method)
        return _pattern(ours, value) if ours else None
    gone = (_answer(ours, value) for ours in _meanings(plain, method) if _is_gone(ours))
    return _GONE.get(plain) or next(gone, None)


def _meanings(key: str, method: Method | None) -> Iterator[str | Mapping[Any, str] | None]:
    """Yield what a foreign key is said to mean: by the method itself, for all methods, by deltaspec's other methods."""
    for names in (method.foreign if method else {}, _RENAMES):
        if key in names:
            yield names[key]
    for other in builtin_methods().values():
        if key in other.foreign:
            yield other.foreign[key]


def _is_gone(meaning: str | Mapping[Any, str] | None) -> bool:
    """Return whether a method says of a foreign key that it has no counterpart."""
    return meaning is None or (isinstance(meaning, str) and meaning.startswith("delete it"))


def _answer(meaning: str | Mapping[Any, str] | None, value: object) -> str:
    """Word what a method declares in `foreign`, for the value that is written."""
    if meaning is None:
        return _MISSING
    if isinstance(meaning, str):
        return meaning if " " in meaning else f'did you mean "{meaning}"?'
    text = value if isinstance(value, str) else _flow(value)
    for given, ours in meaning.items():
        if given is value:
            return f"write {ours} instead"
        if isinstance(given, str) and (found := re.fullmatch(given, text)):
            return f"write {found.expand(ours)} instead"
    return _MISSING if isinstance(value, str) else _START  # a start that is named, and not here, is an unusual one


def _at(answer: str, usual: str) -> Callable[[object], str]:
    """Return what words an answer about modules or parameters, with the usual one where none is named."""

    def word(value: object) -> str:
        paths = [_path(name) for name in _names(value)] or [f'"{usual}"']
        return answer.replace("@", paths[0] if len(paths) == 1 else f"[{', '.join(paths)}]")

    return word


def _tokens(value: object) -> str:
    ids = _flow(value) if isinstance(value, list) else "[7, 8]"
    return f"write a delta of its own: {{name: tokens, method: trainable_tokens, params: {{token_ids: {ids}}}}}"


def _pattern(name: str, value: object) -> str:
    """Return what to write for other values of a parameter at some modules, given as a mapping there."""
    pairs = list(value.items()) if isinstance(value, dict) else []
    pairs = [(k, v) for k, v in pairs if isinstance(k, str)] or [("q_proj", 4)]
    each = ", ".join(f"{{match: {_match(k)}, params: {{{name}: {_flow(v)}}}}}" for k, v in pairs)
    return f"write beside params: overrides: [{each}]"


def _match(name: str) -> str:
    return _path(name) if re.fullmatch(r"[\w.*]+", name) else f"{{regex: {dumps(f'(.*[.])?({name})')}}}"


def _layer_list(value: object) -> str:
    numbers = value if isinstance(value, list) else [value]
    return _flow(numbers) if numbers and all(type(n) is int and n >= 0 for n in numbers) else "[0, 1]"


def _attention(value: object) -> str:
    letters = [n for n in _names(value) if n in ("q", "k", "v")] or ["q", "v"]
    return f"write beside params: target: {{role: [{', '.join(f'attn.{n}' for n in letters)}]}}"


def _role(name: str) -> Callable[[object], str]:
    return lambda value: f"write beside params: target: {{role: {name}}}" if value else _NEEDLESS


_LORA_PLACES = {"selfattn_lora": "[attn.q, attn.v]", "intermediate_lora": "mlp.up", "output_lora": "mlp.down"}
_PLACES: Mapping[str, Callable[[object], str]] = {
    **dict.fromkeys(
        ("target_modules", "modified_modules", "modules", "targets"),
        _at("say where with target, beside params: target: @", "**.q_proj"),
    ),
    **dict.fromkeys(("exclude_modules", "exclude"), _at("write inside target: not: @", "**.lm_head")),
    "target_parameters": _at("write beside params: target: {parameter: @}", "**.experts.gate_up_proj"),
    "attn_matrices": _attention,
    **dict.fromkeys(
        ("layers_to_transform", "layers_pattern"), lambda value: f"write inside target: layers: {_layer_list(value)}"
    ),
    "leave_out": lambda value: f"write inside target: not: {{layers: {_layer_list(value)}}}",
    **dict.fromkeys(
        ("modules_to_save", "unfrozen_modules", "trainable_modules"),
        _at("write a delta of its own: {name: head, method: full, target: @}", "**.classifier"),
    ),
    "trainable_token_indices": _tokens,
    "is_parallel": lambda value: f"change the method: {'parallel_adapter' if value else 'adapter'}",
    "phm_layer": lambda value: f"change the method: {'compacter' if value else 'adapter'}",
    **{key: _role(role) for key, role in _LORA_PLACES.items()},
}


def _names(value: object) -> list[str]:
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str) and name]


def _path(name: str) -> str:
    return dumps(name if name.startswith("**") else f"**.{name}", ensure_ascii=False)


def _flow(value: Any) -> str:
    return dumps(value, ensure_ascii=False)
