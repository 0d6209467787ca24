"""Configurations of other tools, recognised by their keys: PEFT, AdapterHub, OpenDelta, Axolotl, LLaMA-Factory, and of
models.

What a training tool says of LoRA is brought into PEFT's words, and those into ours by what the methods declare
(`Method.foreign`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.wording import show_value
from deltaspec.documents.document import MAX_BYTES, Document

_OURS = ("deltaspec", "deltas", "selectors", "expect")
"""Keys that only a spec has."""
_ADAPTERS, _SETUP, _CONFIG = "adapter_config.json", "adapter_setup.json", "config.json"
"""Names by which a library finds its configuration in a directory: PEFT's and AdapterHub's, a setup of AdapterHub's,
OpenDelta's and any model's."""
CONFIGURATIONS = (_ADAPTERS, _SETUP, _CONFIG)
_TRAINS = ("adapter", "lora_r", "lora_alpha", "datasets", "sequence_len", "micro_batch_size", "num_epochs")
_TUNES = ("finetuning_type", "lora_rank", "lora_target", "stage", "template", "dataset_dir")


def of_adapters(files: Iterable[str]) -> list[str]:
    """Return those of these files that are configurations of adapters, a setup for all that it holds."""
    named = [file for file in files if os.path.basename(file) in CONFIGURATIONS]
    setups = [os.path.join(os.path.dirname(file), "") for file in named if os.path.basename(file) == _SETUP]
    apart = [f for f in named if os.path.basename(f) == _SETUP or not any(f.startswith(folder) for folder in setups)]
    return [file for file in apart if os.path.basename(file) != _CONFIG or _names_a_delta_type(file)]


def _names_a_delta_type(file: str) -> bool:
    """Return whether a `config.json` is OpenDelta's, as a reader of its directory tells it."""
    try:
        with open(file, "rb") as stream:
            return b'"delta_type"' in stream.read(MAX_BYTES)
    except OSError:  # what cannot be read is none of an adapter's
        return False


def other_tool(document: Document) -> Diagnostic | None:
    """Return the finding (DS226) about a document that is another tool's configuration; None where it is none."""
    data = document.data
    if any(key in data for key in _OURS):
        return None
    for name, article, is_its, in_peft in _TOOLS:
        if is_its(data):
            reads = f": deltaspec convert {_folder(document.name, 'DIRECTORY')} -o OUT reads it"
            reads = reads if name in _CONVERTED else ", not a spec"
            if name == "PEFT" and (unread := _unread_type(data)) is not None:
                hint = "there is no method for it: merge it into its base with PEFT (model.merge_and_unload())"
                message = f"this is a PEFT configuration of type {show_value(unread)}, which deltaspec cannot read"
                return document.diagnostic("DS226", message, ("peft_type",), hint)
            message = f"this is {article} {name} configuration{reads}"
            return document.diagnostic("DS226", message, (), _as_spec(in_peft(data)))
    if _is_model(data):
        hint = f"a spec says which deltas change which of its modules: deltaspec tree {_folder(document.name, 'MODEL')}"
        return document.diagnostic("DS226", "this is a model's configuration, not a spec", (), f"{hint} shows them")
    return None


def _folder(name: str, otherwise: str) -> str:
    """Return the directory, as a shell takes it, of a configuration; something else where it came from none."""
    known = os.path.basename(name) in CONFIGURATIONS and os.path.isfile(name)
    return shlex.quote(os.path.dirname(name) or ".") if known else otherwise


def _as_spec(config: dict[str, Any] | str) -> str:
    """Say what spec a configuration in PEFT's words would become, or why there is none."""
    if isinstance(config, str):
        return config
    import yaml  # a valid spec needs none of this

    from deltaspec.language.checks.translation import translated

    found = translated(config)
    if found is None:
        return "what spec it becomes depends on its model, and on the weights that lie beside it"
    spec, left_out = found
    plain = json.loads(json.dumps(spec))  # what is meant twice is written twice, not as an anchor
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    beside = f" (without {', '.join(left_out)}, which it has no word for)" if left_out else ""
    return f"as a spec it would be{beside}: {text.strip()}"


def _unread_type(config: Mapping[str, Any]) -> object | None:
    """Return the type that a PEFT configuration names, where no method is for it."""
    from deltaspec.language.checks.translation import our_name
    from deltaspec.methods.registry import builtin_methods

    kind = config.get("peft_type", "LORA")
    return None if isinstance(kind, str) and our_name(kind.upper()) in builtin_methods() else kind


def _is_peft(data: Mapping[str, Any]) -> bool:
    return "peft_type" in data or {"r", "lora_alpha", "target_modules"} <= data.keys()


def _is_adapterhub(data: Mapping[str, Any]) -> bool:
    return (
        {"config", "model_class"} <= data.keys()
        or "adapter_setup" in data
        or str(data.get("version", "")).startswith("adapters.")
    )


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
    "lora_exclude_modules": "exclude_modules",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_layer_replication": "layer_replication",
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


def _is_model(data: Mapping[str, Any]) -> bool:
    return "model_type" in data and ("architectures" in data or "transformers_version" in data)


def _from_weights(_: Mapping[str, Any]) -> str:
    return "what spec it becomes depends on its weights, which lie beside it"


def _from_axolotl(data: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return the configuration of PEFT that Axolotl makes, or why it makes none."""
    if data.get("adapter") not in ("lora", "qlora"):
        return _NO_LORA
    # It has no values of its own for these: PEFT is given None.
    if missing := [key for key in ("lora_r", "lora_alpha") if data.get(key) is None]:
        return f"it has no {' and no '.join(missing)}, which Axolotl and a spec of it need"
    config = {theirs: data[key] for key, theirs in _AXOLOTL.items() if data.get(key) is not None}
    if data.get("lora_target_linear"):
        config["target_modules"] = "all-linear"
    return {"peft_type": "LORA"} | config


def _from_llama_factory(data: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return the configuration of PEFT that LLaMA-Factory makes, or why it makes none."""
    if data.get("finetuning_type", "lora") != "lora":
        return _NO_LORA
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


_NO_LORA = "it trains no LoRA; a spec says which deltas change which modules"
_CONVERTED = ("PEFT", "AdapterHub", "OpenDelta")
"""Libraries whose adapters lie beside their configurations."""
_TOOLS: tuple[
    tuple[str, str, Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], dict[str, Any] | str]], ...
] = (
    ("PEFT", "a", _is_peft, dict),
    ("AdapterHub", "an", _is_adapterhub, _from_weights),
    ("OpenDelta", "an", _is_opendelta, _from_weights),
    ("Axolotl", "an", _is_axolotl, _from_axolotl),
    ("LLaMA-Factory", "a", _is_llama_factory, _from_llama_factory),
)
"""Name, its article, how a configuration of it is known, and how it is said in PEFT's words, or why it is not."""
