"""Writing LoRA on parameters as PEFT's `target_parameters`: single matrices, and the stacks of a mixture's experts.

Where PEFT puts their keys says `parameters.py`. Its wrapper changes a parameter while its module is called, so it also
takes layers that `target_modules` cannot mean: in some mixtures PEFT reads `up_proj` as an older name of the experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.aside import PREFIX
from deltaspec.formats.peft.factors import Update, stack
from deltaspec.formats.peft.naming import parameter_list
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.methods.shared.weights import canonical
from deltaspec.names.paths import below, is_inside

WRAPPED = ".base_layer"
ONE_BY_ONE = "write the deltas that are on these by themselves: c.save_as('peft', …, names)"
_MIXTRAL = frozenset({"mixtral", "minimax", "minimax_m2"})
_QWEN = frozenset({
    "qwen2_moe", "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open", "mellum", "qwen3_moe", "beam",
    "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next", "hunyuan_v1_moe", "flex_olmo",
    "olmoe", "exaone_moe", "cohere2_moe",
})  # fmt: skip
_OLDER = {
    **dict.fromkeys(_MIXTRAL, ("gate", "w1", "w2", "w3")),
    **dict.fromkeys(_QWEN, ("gate", "gate_proj", "up_proj", "down_proj")),
}
"""By model type, names that PEFT 0.21 takes for those of the experts before transformers 5 stacked them."""


def older_names(out: Outgoing) -> tuple[str, ...]:
    """Return the last names of modules that PEFT's `target_modules` cannot mean in this model."""
    return _OLDER.get(getattr(out.base.config, "model_type", ""), ())


def untargetable(out: Outgoing, part: Part) -> str | None:
    """Return why PEFT's wrapper of parameters cannot act at a place that is a parameter; None where it can."""
    site = part.at.site
    if site.host != part.fqn:
        return "PEFT changes a parameter while its own module is called, and another reads this one"
    if site.row.aliases:
        return "PEFT would replace the module under one of its names alone"
    if not part.fqn:
        return "PEFT cannot replace the model itself"
    module: Any = out.base.model.get_submodule(part.fqn)
    if site.stack == (1,) and getattr(module, "is_transposed", False):
        return "PEFT does not turn the only matrix of a transposed stack"
    if site.row.kind == "conv1d" and not site.stack:
        return "PEFT has no layer for this matrix"
    return None


def updates_at(part: Part, known: Callable[[Part], Iterable[Update]]) -> list[Update]:
    """Return what a delta adds at one place, which may be a stack of matrices."""
    if not part.at.site.stack:
        return list(known(part))
    (length,) = part.at.site.stack
    each = [list(known(_of_matrix(part, index))) for index in range(length)]
    return [stack(matrices) for matrices in zip(*each, strict=True)]


def _of_matrix(part: Part, index: int) -> Part:
    """Return what a delta has at one matrix of a stack."""
    specs = part.at.tensors
    values = [getattr(part.own, spec.name) for spec in specs]
    own = [value[index] if spec.stack else value for spec, value in zip(specs, values, strict=True)]
    return replace(part, own=DeltaTensors(tuple(spec.name for spec in specs), own))


def matrices(part: Part, values: Tensor) -> Iterator[Tensor]:
    """Yield the canonical matrices, `[out, in]`, of the parameter that a place is."""
    for matrix in values if part.at.site.stack else (values,):
        yield canonical(part.at.site.row.kind, matrix)


def write_parameters(out: Outgoing, updates: Mapping[str, Update]) -> None:
    """Write which parameters are changed, exactly these, and the factors of each, by its FQN."""
    names = [name for name, _ in out.base.model.named_parameters(remove_duplicate=False)]
    listed = parameter_list(list(updates), names)
    if listed is None:
        out.refuse(_parts_of(out, updates), "PEFT's target_parameters cannot mean this parameter and no other")
        return
    out.config["target_parameters"] = listed
    depths = wrappers(updates)
    if inner := [name for name in updates if any(_is_below(name.rpartition(".")[0], fqn) for fqn in depths)]:
        out.refuse(_parts_of(out, inner), "PEFT finds no parameter inside a module whose own parameters it wraps")
        return
    out.tensors = {_inside(key, depths): value for key, value in out.tensors.items()}
    for fqn in depths:
        module = out.base.model.get_submodule(fqn)
        own = [name for name in (below(fqn, name) for name in module._parameters) if name in updates]
        for depth, name in enumerate(reversed(own)):  # the last one is around all others
            at = f"{PREFIX}{fqn}{WRAPPED * depth}"
            down, up = _as_peft(out, name, updates[name])
            out.tensors |= {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}


def wrappers(parameters: Iterable[str]) -> dict[str, int]:
    """Return how many wrappers PEFT puts around each module to change these parameters, by their FQNs."""
    return dict(Counter(name.rpartition(".")[0] for name in parameters))


def _inside(key: str, depths: Mapping[str, int]) -> str:
    """Return a key as it is where modules around it are wrapped."""
    for fqn, depth in depths.items():
        if key.startswith(f"{PREFIX}{fqn}."):
            return f"{PREFIX}{fqn}{WRAPPED * depth}{key.removeprefix(PREFIX + fqn)}"
    return key


def _is_below(fqn: str, other: str) -> bool:
    return fqn != other and is_inside(fqn, other)


def _parts_of(out: Outgoing, parameters: Iterable[str]) -> list[Part]:
    """Return the parts that are changes of these parameters, by their FQNs."""
    wanted = set(parameters)
    return [
        p for p in out.all_parts if p.at.fqn in wanted or (p.parameter is None and below(p.fqn, "weight") in wanted)
    ]


def _as_peft(out: Outgoing, name: str, update: Update) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT has them for the parameter as it is stored: those of all matrices in one."""
    fqn = name.rpartition(".")[0]
    row = out.base.rows[fqn]
    down, up = update.down, update.up
    if not update.stacked:
        return (up.t(), down.t()) if row.kind in ("conv1d", "embedding") else (down, up)
    module: Any = out.base.model.get_submodule(fqn)
    theirs = len(down) > 1 and bool(getattr(module, "is_transposed", False))
    if row.transposed != theirs:
        down, up = up.transpose(1, 2), down.transpose(1, 2)
    return down.reshape(-1, down.shape[2]), up.permute(1, 2, 0).reshape(up.shape[1], -1)


def refuse_beside(out: Outgoing, modules: Mapping[str, Update], parameters: Collection[str]) -> None:
    """Refuse parameters beside what PEFT's wrapper does not go with: DoRA, a learned bias, transposed layers."""
    there = {
        "DoRA": any(update.magnitude is not None for update in modules.values()),
        "a learned bias": any(update.bias is not None for update in modules.values()),
        "Conv1D layers": any(out.base.rows[fqn].kind == "conv1d" for fqn in modules),
    }
    for what in (what for what, found in there.items() if found):
        reason = f"PEFT's target_parameters do not go with {what} in one adapter"
        out.refuse(_parts_of(out, parameters), reason, ONE_BY_ONE)
