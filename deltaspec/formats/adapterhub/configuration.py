"""AdapterHub's configurations: mappings, strings (`seq_bn[reduction_factor=16]|lora`), and those of older versions.

Read in `adapter_config.py`, `utils.py` and `loading.py` of adapters 1.3.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from deltaspec.diagnostics.wording import closest

BOTTLENECK = "bottleneck"
"""Name here of the architecture that AdapterHub gives none."""
_STRING = re.compile(r"(?P<name>[^\[\]|\n]+)(?:\[(?P<options>.*)\])?")
_BAR = re.compile(r"\|(?![^\[]*\])")
"""A bar that is in no brackets."""
_SEQ: dict[str, Any] = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True,
                        "non_linearity": "relu", "reduction_factor": 16}  # fmt: skip
_DOUBLE: dict[str, Any] = {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 16}
_PARALLEL: dict[str, Any] = {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu",
                             "reduction_factor": 2, "is_parallel": True, "scaling": 4.0}  # fmt: skip
_INVERTIBLE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
_COMPACT = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
_LORA = {"architecture": "lora"}
_VERA = {**_LORA, "vera_d": 0.1, "vera_b": 0.0}
_PREFIX: dict[str, Any] = {"architecture": "prefix_tuning"}
_REFT = {"architecture": "reft", "layers": "all", "prefix_positions": 3, "suffix_positions": 0, "r": 1}

NAMED: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("seq_bn", "pfeiffer"), _SEQ),
    **dict.fromkeys(("double_seq_bn", "houlsby"), _DOUBLE),
    **dict.fromkeys(("par_bn", "parallel"), _PARALLEL),
    **dict.fromkeys(("scaled_par_bn", "scaled_parallel"), _PARALLEL | {"scaling": "learned"}),
    **dict.fromkeys(("seq_bn_inv", "pfeiffer+inv"), _SEQ | _INVERTIBLE),
    **dict.fromkeys(("double_seq_bn_inv", "houlsby+inv"), _DOUBLE | _INVERTIBLE),
    "compacter": _DOUBLE | _COMPACT,
    "compacter++": _SEQ | _COMPACT,
    "prefix_tuning": _PREFIX,
    "prefix_tuning_flat": _PREFIX | {"flat": True},
    "prompt_tuning": {"architecture": "prompt_tuning"},
    "lora": _LORA,
    "ia3": _LORA | {"intermediate_lora": True, "r": 1, "alpha": 1, "attn_matrices": ["k", "v"],
                    "composition_mode": "scale"},
    "vera": _VERA,
    "dora": _LORA | {"use_dora": True},
    "dvora": _VERA | {"use_dora": True},
    "mtl_lora": {"architecture": "mtl_lora"},
    "loreft": _REFT | {"orthogonality": True},
    "noreft": _REFT | {"orthogonality": False, "subtract_projection": True},
    "direft": _REFT | {"orthogonality": False, "subtract_projection": False},
    "mam": {"architecture": "union", "configs": [_PREFIX | {"bottleneck_size": 800}, _PARALLEL]},
    "unipelt": {
        "architecture": "union",
        "configs": [_PREFIX | {"prefix_length": 10, "use_gating": True}, _SEQ | {"use_gating": True},
                    _LORA | {"r": 8, "alpha": 2, "use_gating": True}],
    },
}  # fmt: skip
"""What the names of configurations stand for, without what is the default of their architecture."""

_OLDER_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def parts_of(given: Any, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the configurations that one is made of: one, or those of a union; `whole` is what it was saved in.

    Raises ValueError where it is none.
    """
    try:
        if isinstance(given, str):
            found = [part for name, options in _parsed(given) for part in _united(_named(name, options))]
        elif isinstance(given, Mapping):
            found = _united(dict(given))
        else:
            found = []
    except RecursionError as error:
        raise ValueError("it has unions in unions without end") from error
    if not found:
        raise ValueError(f"it is a {type(given).__name__}, neither a mapping nor a string")
    return [_modern(part, whole) for part in found]


def _united(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    if config.get("architecture") != "union":
        return [dict(config)]
    inside = config.get("configs")
    if more := sorted(config.keys() - {"architecture", "configs"}):
        raise ValueError(f"{', '.join(more)} {'is' if len(more) == 1 else 'are'} no key of a union")
    if not isinstance(inside, list) or not inside or not all(isinstance(part, str | Mapping) for part in inside):
        raise ValueError("it is a union without configurations")
    parts = [_united(part) if isinstance(part, Mapping) else
             [made for name, options in _parsed(part) for made in _united(_named(name, options))]
             for part in inside]  # fmt: skip
    return [part for several in parts for part in several]


def _parsed(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read `name[key=value,…]|name…`; values are Python's literals, and nothing is executed."""
    found = []
    for piece in _BAR.split(text):
        match = _STRING.fullmatch(piece.strip())
        if match is None:
            raise ValueError(f"{piece.strip()!r:.80} is not of the form name[key=value, …]")
        found.append((match["name"].strip(), _options(match["options"] or "")))
    return found


def _options(text: str) -> dict[str, Any]:
    """Read `key=value, …` as the keywords of a call."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        keywords = call.keywords if isinstance(call, ast.Call) and not call.args else []
        found = {word.arg: ast.literal_eval(word.value) for word in keywords if word.arg is not None}
        whole = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text!r:.80} are no options key=value") from error
    if not whole or len(found) != len(keywords):
        raise ValueError(f"{text!r:.80} are no options key=value")
    return found


def _named(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known = NAMED.get(name)
    if known is None:
        meant = closest(name, NAMED)
        way_out = f"did you mean {meant!r}?" if meant else f"they are {', '.join(NAMED)}"
        raise ValueError(f"{name!r:.80} is none of AdapterHub's configurations; {way_out}")
    if known.get("architecture") == "union":
        return {**known, "configs": [{**part, **options} for part in known["configs"]]}
    return {**known, **options}


def _modern(part: dict[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as the last version has it, as AdapterHub itself reads older ones."""
    nested = part.pop("invertible_adapter", None)  # version 1
    if isinstance(nested, Mapping):
        part.setdefault("inv_adapter", nested.get("block_type"))
    version = whole.get("version")
    if version is None and isinstance(named := part.get("non_linearity"), str):
        part["non_linearity"] = _OLDER_ACTIVATIONS.get(named, named)
    if part.get("architecture") == "lora" and isinstance(version, str) and _before(version, (1, 1, 0)):
        part["alpha"] = part.get("r", 8)
    return part


def _before(version: str, limit: tuple[int, ...]) -> bool:
    """Return whether a file was saved by an earlier version of `adapters`; its predecessor's have no such prefix."""
    found = re.match(r"adapters\.(\d+)\.(\d+)\.(\d+)", version)
    return found is not None and tuple(map(int, found.groups())) < limit
