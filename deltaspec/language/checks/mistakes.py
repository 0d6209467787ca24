"""Ways out of common mistakes: misspelt and misplaced keys, and values of the wrong type or form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any
from unicodedata import name

from deltaspec.diagnostics.findings import Path
from deltaspec.diagnostics.wording import closest, show_value
from deltaspec.documents.builder import MAX_NUMBER
from deltaspec.language.checks.foreign import VALUES, parameter_hint, place_hint, renamed

if TYPE_CHECKING:
    from deltaspec.methods.base import Method

_KEYS: Mapping[str, Mapping[str, str]] = {
    "spec": {
        "version": "deltaspec",
        **dict.fromkeys(("delta", "adapters"), "deltas"),
        **dict.fromkeys(("backbone", "base_model"), "model"),
    },
    "delta": {
        **dict.fromkeys(("type", "kind", "peft_type", "delta_type"), "method"),
        **dict.fromkeys(("config", "parameters", "args", "kwargs"), "params"),
        **dict.fromkeys(("selector", "select", "where", "sites"), "target"),
        **dict.fromkeys(("sources", "weights", "adapters"), "from"),
        **dict.fromkeys(("combination_type", "combination"), "combine"),
        "enabled": "attached",
        "id": "name",
    },
    "override": {"target": "match", "selector": "match", "parameters": "params"},
    "selector": {
        **dict.fromkeys(("or", "any_of", "one_of", "include"), "any"),
        **dict.fromkeys(("and", "all_of"), "all"),
        **dict.fromkeys(("exclude", "none", "none_of", "except"), "not"),
        **dict.fromkeys(("glob", "fqn", "name", "module", "modules"), "path"),
        **dict.fromkeys(("pattern", "re", "regexp"), "regex"),
        **dict.fromkeys(("class", "cls", "class_name", "isinstance"), "type"),
        "selector": "ref",
        "$ref": "ref",
    },
    "train": {
        **dict.fromkeys(("learning_rate", "rate", "eta"), "lr"),
        **dict.fromkeys(("wd", "decay"), "weight_decay"),
        **dict.fromkeys(("loraplus_lr_ratio", "lora_plus", "loraplus"), "lr_ratio"),
        **dict.fromkeys(("warmup_steps", "warmup_ratio", "num_warmup_steps"), "warmup"),
        **dict.fromkeys(
            ("lr_scheduler_type", "scheduler", "lr_scheduler", "lr_schedule", "decay_schedule"), "schedule"
        ),
        **dict.fromkeys(("data_seed", "random_seed"), "seed"),
    },
    "layers": {"start": "from", "end": "to", "step": "every", "indices": "only"},
    "model": {"model_type": "type", "class": "architecture", "architectures": "architecture"},
    "bounds": {"fraction": "max_fraction", "max_percent": "max_fraction"},
}
_DELTA = ("name", "method", "from", "combine", "params", "target", "overrides", "expect", "attached", "dtype",
          "train", "matrix")  # fmt: skip
_TRAIN = ("lr", "weight_decay", "lr_ratio", "warmup", "schedule", "seed")
_ATOMS = ("path", "regex", "type", "role", "layers", "shape", "parameter", "ref", "any", "all", "not", "optional")
_METHODS: Mapping[str, str] = {
    **dict.fromkeys(("houlsby", "pfeiffer", "bottleneck", "bottleneck_adapter", "seq_bn", "double_seq_bn"), "adapter"),
    **dict.fromkeys(("parallel", "par_bn", "scaled_parallel", "par_seq_bn"), "parallel_adapter"),
    **dict.fromkeys(
        ("finetune", "finetuning", "fine_tuning", "full_finetuning", "full_fine_tuning", "full_ft"), "full"
    ),
    **dict.fromkeys(("modules_to_save", "classifier", "head", "linear_probe"), "full"),
    **dict.fromkeys(("bias", "biases"), "bitfit"),
    **dict.fromkeys(("ln_tuning", "layernorm", "layer_norm"), "norm"),
    **dict.fromkeys(("dora", "rslora", "pissa", "qlora", "loftq"), "lora"),
    "bone": "miss",
    "fedpara": "loha",
    **dict.fromkeys(("krona", "lycoris"), "lokr"),
    **dict.fromkeys(("prefix_tuning", "prefixtuning", "p_tuning_v2", "ptuning_v2"), "prefix"),
    **dict.fromkeys(("prompt_tuning", "prompttuning", "softprompt"), "soft_prompt"),
}
_YES, _NO = ("yes", "on", "true", "y"), ("no", "off", "false", "n")


def kind_at(path: Path) -> str:
    """Return what kind of mapping stands at a path of a document."""
    last = path[-1] if path else None
    if last is None or last == "model":
        return "model" if last else "spec"
    if path[0] == "deltas" and "target" not in path:
        rest = path[2:]
        if not rest:
            return "delta"
        if last == "params":
            return "params"
        if last == "train":
            return "train"
        if "params" in rest:
            return "value"
        if rest[0] == "overrides" and len(rest) == 2:
            return "override"
    if last in ("layers", "shape"):
        return str(last)
    if "expect" in path and "untouched" not in path:
        return "bounds"
    return "selector"


def unknown_key_hint(
    key: str, path: Path, known: Sequence[str], siblings: Mapping[str, Any], method: Method | None = None
) -> str:
    """Return what was meant by an unknown key of the mapping at `path`, which knows the keys `known`.

    `method` is that of the delta in which the mapping stands, if it is known.
    """
    kind = kind_at(path)
    plain = key.lower()
    value = siblings.get(key)
    if kind == "params":
        if hint := parameter_hint(key, value, known, method):
            return hint
        if key in _DELTA and key not in known:
            return f"{key} belongs to the delta: write it beside params, not inside"
    if kind == "delta":
        if hint := _combination_hint(plain, value, siblings):
            return hint
        if key in _ATOMS and key != "type":
            return f"selectors go under target: target: {{{key}: …}}"
        if plain in _TRAIN or plain in _KEYS["train"]:
            return f"hints for training go under train: train: {{{_KEYS['train'].get(plain, plain)}: …}}"
        own = tuple(method.Params.model_fields) if method else ()
        if ours := key if key in own else renamed(key, own, method):
            return f"parameters go under params: params: {{{ours}: …}}"
    if kind in ("params", "delta") and (hint := place_hint(key, value, method)):
        return hint
    if kind == "spec" and key in _DELTA:
        return f"{key} belongs to one delta: write it in an entry of deltas"
    ours = _KEYS.get(kind, {}).get(plain) or closest(key, known)
    if ours is not None:
        return _meant(ours, key)
    return f"known keys: {', '.join(known)}" if known else "this method has no parameters"


def _combination_hint(key: str, value: object, siblings: Mapping[str, Any]) -> str | None:
    """Return how other libraries' names of sources and of a way to combine them are written."""
    ours = _KEYS["delta"].get(key)
    if ours not in ("from", "combine"):
        return None
    if "method" not in siblings and (ours == "combine" or isinstance(value, dict)):
        return f'did you mean "{ours}"?'
    return "a derived delta is written without a method: {name: blend, from: {a: 0.5, b: 0.5}, combine: linear}"


def method_hint(method: str, known: Sequence[str]) -> str:
    """Return what was meant by an unknown method."""
    plain = method.lower().replace("-", "_")
    alias = _METHODS.get(plain)
    near = alias if alias in known else closest(plain, known)
    if near:
        return _meant(near, method)
    return f"installed methods: {', '.join(known)}; others come with packages that provide them"


def choice_hint(key: str, value: str, known: Sequence[str]) -> str:
    """Return what was meant by an unknown value of a key that knows the values `known`."""
    alias = VALUES.get((key, value.lower()))
    near = alias if alias in known else closest(value, known)
    return _meant(near, value) if near else f"known values: {', '.join(known)}"


def _meant(near: str, written: str) -> str:
    """Suggest a word, and name a character of the written one that may look like a letter of it and is another."""
    odd = next((c for c in written if not c.isascii()), None)
    told = f" yours has U+{ord(odd):04X} {name(odd, '')}".rstrip() if odd else ""
    return f'did you mean "{near}"?{told}'


def value_hint(value: object, kinds: Iterable[str], path: Path) -> str | None:
    """Return what was meant by a value of the wrong type."""
    kinds = tuple(kinds)
    if value is None:
        return "delete the key, or give it a value"
    if isinstance(value, str):
        if ("object" in kinds or "array" in kinds) and (hint := no_space_hint(value)):
            return hint
        if path == ("model",):
            return f"write {{type: {value}}}, or {{architecture: …}} for one class"
        if kinds == ("array",):
            return f"write a list: [{show_value(value)}]"
        if path[-1:] == ("max_fraction",) and (share := _share(value)) is not None:
            return f"write {share:g}"
        if "boolean" in kinds and value.lower() in (*_YES, *_NO):
            return f"write {'true' if value.lower() in _YES else 'false'}"
        if path[-1:] == ("bias",) and value in ("none", "all", "lora_only"):
            return f"write {'false' if value == 'none' else 'true'}"
        if path[-1:] == ("rank",) and value.rstrip().endswith("%"):
            return f'write {{budget: "{value}"}}'
        if "integer" in kinds or "number" in kinds:
            plain = value.strip().replace("_", "").replace(",", "")
            try:
                number = float(plain)
            except ValueError:
                return None
            if number.is_integer() or ("number" in kinds and isfinite(number)):
                return f"write {plain}, without quotes" if plain == value else f"write {plain}"
        return None
    if isinstance(value, float) and "integer" in kinds and value.is_integer() and abs(value) < MAX_NUMBER:
        return f"write {int(value)}"
    if path[-1:] == ("budget",):
        return 'a share of the backbone is written with a per cent sign: "0.5%"'
    lists = path[-1:] == ("layers",) or path[-2:-1] == ("matrix",)
    if lists and isinstance(value, int | float) and not isinstance(value, bool):
        return f"write a list: [{value}]"
    if isinstance(value, int | float) and not isinstance(value, bool) and kinds == ("string",):
        return f'quote it: "{value}"'
    if "array" in kinds and isinstance(value, dict):
        return "write a list: begin each item with -"
    if path[-1:] == ("expect",) and len(path) > 1 and type(value) is int:
        return f"write {{sites: {value}}}"
    if isinstance(value, list) and kinds == ("object",):
        return "write a mapping: key: value"
    return None


def no_space_hint(text: str) -> str | None:
    """Return what was meant by a text that is a key and a value without the space between them."""
    key, colon, value = text.partition(":")
    if colon and value[:1].strip() and key.isidentifier():
        return f"a space is missing after the colon: write {key}: {value[:40]}"
    return None


def _share(text: str) -> float | None:
    """Read a percentage; None where it is none."""
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        return None
    return share if text.strip().endswith("%") and 0 < share <= 1 else None
