"""The words that rules of engines are written in: facts about adapters, outcomes, rewrites. A closed list of each.

A fact is what an adapter has that some engine may trip over; it is found by code here, whatever the engine. What an
engine does about it is a rule, in that engine's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OUTCOMES: Mapping[str, str] = {
    "rejected": "rejected by {}",  # it does not load
    "ignored": "ignored by {}",  # it loads, and this part of the adapter has no effect
    "wrong": "wrong under {}",  # it loads, and computes something else than PEFT
}
"""How a finding begins, by what an engine does."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that an adapter may have, the code of findings about it, and the usual way out."""

    code: str
    what: str
    """What it is, for the table in docs/engines.md."""
    way_out: str


_MERGE = 'merge it into a plain model: deltaspec.restore(model, "ADAPTER").merge()'
_APPROXIMATE = f"{_MERGE}; or approximate it by a LoRA: deltaspec export ADAPTER --to peft -o OUT --approximate RANK"
_AGAIN = "save the adapter again from the model that it was trained in"
_WITHOUT = f"train without it, or {_MERGE}"

FACTS: Mapping[str, Fact] = {
    "method": Fact("DS601", "another method than LoRA", _APPROXIMATE),
    "mislabelled": Fact(
        "DS601",
        "tensors of LoRA under another `peft_type`",
        "write peft_type: LORA into adapter_config.json, or save the adapter again",
    ),
    "rank": Fact("DS602", "rank above a limit", _APPROXIMATE),
    "rank_pattern": Fact("DS603", "ranks that differ", _MERGE),
    "alpha_pattern": Fact("DS603", "alphas that differ", _MERGE),
    "factors": Fact("DS603", "factors alpha / rank that differ", _MERGE),
    "rslora": Fact("DS604", "rsLoRA", _MERGE),
    "dora": Fact("DS605", "DoRA", _APPROXIMATE),
    "bias": Fact("DS606", "trained biases (`bias: all`, `lora_only`)", _WITHOUT),
    "lora_bias": Fact("DS606", "biases of lora_B (`lora_bias`)", _WITHOUT),
    "saved_module": Fact("DS607", "whole modules (`modules_to_save`)", _MERGE),
    "extra_weight": Fact("DS607", "whole weights that the configuration does not name", _MERGE),
    "base_weight": Fact("DS607", "resized tables of the base in the file", _MERGE),
    "init": Fact(
        "DS608",
        "starts that change the base (PiSSA, OLoRA, CorDA, LoftQ)",
        "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
    ),
    "tokens": Fact("DS609", "`trainable_token_indices`", _MERGE),
    "added_tokens": Fact("DS609", "added tokens beside the adapter", _MERGE),
    "parameters": Fact("DS610", "stacked experts (`target_parameters`)", _MERGE),
    "replication": Fact("DS611", "`layer_replication`", _MERGE),
    "alora": Fact("DS611", "aLoRA", "train without alora_invocation_tokens"),
    "option": Fact("DS611", "QALoRA, BD-LoRA and other variants", _WITHOUT),
    "unknown_key": Fact(
        "DS612", "keys that PEFT's LoRA does not have", "delete the key, or use the engine's version that knows it"
    ),
    "embedding": Fact("DS613", "LoRA of embeddings", _MERGE),
    "head": Fact("DS613", "LoRA of the output head", _MERGE),
    "kind": Fact("DS614", "LoRA of modules other than linear ones", _MERGE),
    "module": Fact("DS614", "names of modules", _MERGE),
    "some_layers": Fact("DS614", "updates on some layers alone", _MERGE),
    "prefix": Fact("DS615", "keys without `base_model.model.`", _AGAIN),
    "path": Fact(
        "DS615",
        "keys under a path that the base does not have",
        "name the base that it was trained on, or rename the keys",
    ),
    "layer": Fact(
        "DS616",
        "keys of layers that the base does not have",
        "name the base that it was trained on, or delete these keys",
    ),
    "shape": Fact(
        "DS617", "shapes that do not fit the base", "name the base that it was trained on; the file may be damaged"
    ),
    "other_rank": Fact(
        "DS618",
        "another rank in the configuration than in the tensors",
        "write into adapter_config.json the ranks that the tensors have",
    ),
    "unpaired": Fact("DS619", "one factor without the other", "restore the missing tensor, or delete its partner"),
    "empty": Fact("DS620", "no update at all", "train it on modules that the base has"),
    "key": Fact("DS621", "keys that are none of PEFT's", _AGAIN),
    "adapter_name": Fact(
        "DS621",
        "the adapter's name in keys",
        "take the adapter's name out of the keys: lora_A.weight, not lora_A.default.weight",
    ),
    "file": Fact("DS622", "weights that are no safetensors", "save it as safetensors"),
    "dtype": Fact("DS622", "dtypes", "save the tensors as float32, float16 or bfloat16"),
    "missing_key": Fact("DS623", "configuration without `r`, `lora_alpha` …", "write it into adapter_config.json"),
    "targets": Fact(
        "DS624",
        "`target_modules` as a pattern, or narrower than the tensors",
        "name in target_modules all modules that have tensors, or delete the tensors",
    ),
}
"""Every fact. Each file of rules decides all of them."""

EXPORT = "deltaspec export ADAPTER --for ENGINE -o OUT"
"""Command that writes what an engine reads."""
AS_LORA = f"{EXPORT} writes it as a LoRA, exactly"
"""Way out for methods that are low-rank updates."""
SERVE = "no weight can hold it: serve it with deltaspec, a delta for each row, or train lora"
"""Way out for methods that cannot be merged."""

REWRITES: Mapping[str, str] = {
    "low_rank": "writes low-rank updates of any method as LoRA",
    "rslora_to_alpha": "writes the factor alpha / sqrt(rank) as a plain alpha",
    "one_rank": "pads the ranks with zeros to one",
    "one_factor": "folds what differs in alpha into lora_B",
    "plain_init": "subtracts the start and writes a plain LoRA",
    "plain_names": "writes the keys that PEFT writes",
    "safetensors": "writes safetensors",
    "usual_dtype": "writes float32",
    "list_targets": "writes target_modules as a list of names",
    "every_layer": "writes zeros for the layers that have none",
    "gguf": "writes GGUF, with the names and the order of rows of llama.cpp",
    "onnx_adapter": "writes an .onnx_adapter, with alpha folded into lora_B",
}
"""What an export can do without loss, and how it is said: `deltaspec export` …."""
