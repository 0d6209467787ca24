"""Configurations of other tools, recognised by their keys: PEFT, AdapterHub, OpenDelta, Axolotl, LLaMA-Factory.

What a training tool says of LoRA is brought into PEFT's words, and those into ours by what the methods declare
(`Method.foreign`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.documents.document import Document

_OURS = ("deltaspec", "deltas", "selectors", "expect")
"""Keys that only a spec has."""
_CONVERT = "deltaspec convert DIRECTORY -o OUT reads it"
_TRAINS = ("adapter", "lora_r", "lora_alpha", "datasets", "sequence_len", "micro_batch_size", "num_epochs")
_TUNES = ("finetuning_type", "lora_rank", "lora_target", "stage", "template", "dataset_dir")


def other_tool(document: Document) -> Diagnostic | None:
    """Return the finding (DS226) about a document that is another tool's configuration; None where it is none."""
    data = document.data
    if any(key in data for key in _OURS):
        return None
    for name, article, is_its, in_peft in _TOOLS:
        if is_its(data):
            reads = f": {_CONVERT}" if in_peft is None or name == "PEFT" else ", not a spec"
            message = f"this is {article} {name} configuration{reads}"
            return document.diagnostic("DS226", message, (), _as_spec(None if in_peft is None else in_peft(data)))
    return None


def _as_spec(config: dict[str, Any] | None) -> str | None:
    """Say what spec a configuration in PEFT's words would become; None where that takes its model or its weights."""
    if config is None:
        return "what spec it becomes depends on its weights, which lie beside it"
    import yaml  # a valid spec needs none of this

    from deltaspec.language.checks.translation import translated

    found = translated(config)
    if found is None:
        return "what spec it becomes depends on its model, and on the weights that lie beside it"
    spec, left_out = found
    text = yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    beside = f" (without {', '.join(left_out)}, which it has no word for)" if left_out else ""
    return f"as a spec it would be{beside}: {text.strip()}"


def _is_peft(data: Mapping[str, Any]) -> bool:
    return "peft_type" in data or {"r", "lora_alpha", "target_modules"} <= data.keys()


def _is_adapterhub(data: Mapping[str, Any]) -> bool:
    return {"config", "model_class"} <= data.keys() or str(data.get("version", "")).startswith("adapters.")


def _is_opendelta(data: Mapping[str, Any]) -> bool:
    return "delta_type" in data or "opendelta_version" in data


def _is_axolotl(data: Mapping[str, Any]) -> bool:
    return "base_model" in data and any(key in data for key in _TRAINS)


def _is_llama_factory(data: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in data and any(key in data for key in _TUNES)


_AXOLOTL: Mapping[str, str] = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_trainable_token_indices": "trainable_token_indices",
}
"""PEFT's names of Axolotl's keys."""
_LLAMA_FACTORY: Mapping[str, str] = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target": "target_modules",
    "additional_target": "modules_to_save",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
"""PEFT's names of LLaMA-Factory's keys."""


def _from_axolotl(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of PEFT that Axolotl makes; an unknown method where it trains none."""
    adapter = data.get("adapter")
    if adapter not in ("lora", "qlora"):
        return {"peft_type": str(adapter)}
    config = {theirs: data[key] for key, theirs in _AXOLOTL.items() if data.get(key) is not None}
    if data.get("lora_target_linear"):
        config["target_modules"] = "all-linear"
    return {"peft_type": "LORA"} | config


def _from_llama_factory(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of PEFT that LLaMA-Factory makes; an unknown method where it trains none."""
    kind = data.get("finetuning_type", "lora")
    if kind != "lora":
        return {"peft_type": str(kind)}
    config = {theirs: data[key] for key, theirs in _LLAMA_FACTORY.items() if data.get(key) is not None}
    rank = config.setdefault("r", 8)
    if isinstance(rank, int):
        config.setdefault("lora_alpha", 2 * rank)
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), str):
            config[key] = [name for name in re.split(r"\s*,\s*", config[key].strip()) if name]
    if config.get("target_modules", ["all"]) == ["all"]:
        config["target_modules"] = "all-linear"
    if data.get("pissa_init"):
        steps = data.get("pissa_iter", 16)
        config["init_lora_weights"] = "pissa" if steps == -1 else f"pissa_niter_{steps}"
    return {"peft_type": "LORA"} | config


_TOOLS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], Any] | None], ...] = (
    ("PEFT", "a", _is_peft, dict),
    ("AdapterHub", "an", _is_adapterhub, None),
    ("OpenDelta", "an", _is_opendelta, None),
    ("Axolotl", "an", _is_axolotl, _from_axolotl),
    ("LLaMA-Factory", "a", _is_llama_factory, _from_llama_factory),
)
"""Name, its article, how a configuration of it is known, and how it is said in PEFT's words (None: weights say it)."""
