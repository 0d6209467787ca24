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
    """Something that an adapter may have: the code of findings about it, and the usual way out."""

    code: str
    way_out: str


_MERGE = "merge it into a plain model: deltaspec.restore(model, ADAPTER).merge()"
_APPROXIMATE = f"{_MERGE}; or approximate it by a LoRA: deltaspec export ADAPTER --to peft -o OUT --approximate RANK"
_AGAIN = "save the adapter again from the model that it was trained in"
_WITHOUT = f"train without it, or {_MERGE}"

FACTS: Mapping[str, Fact] = {
    "method": Fact("DS601", _APPROXIMATE),
    "mislabelled": Fact("DS601", "write peft_type: LORA into adapter_config.json, or save the adapter again"),
    "rank": Fact("DS602", _APPROXIMATE),
    "rank_pattern": Fact("DS603", _MERGE),
    "alpha_pattern": Fact("DS603", _MERGE),
    "factors": Fact("DS603", _MERGE),
    "rslora": Fact("DS604", _MERGE),
    "dora": Fact("DS605", _APPROXIMATE),
    "bias": Fact("DS606", _WITHOUT),
    "lora_bias": Fact("DS606", _WITHOUT),
    "saved_module": Fact("DS607", _MERGE),
    "extra_weight": Fact("DS607", _MERGE),
    "base_weight": Fact("DS607", _MERGE),
    "init": Fact("DS608", "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"),
    "tokens": Fact("DS609", _MERGE),
    "added_tokens": Fact("DS609", _MERGE),
    "parameters": Fact("DS610", _MERGE),
    "replication": Fact("DS611", _MERGE),
    "alora": Fact("DS611", "train without alora_invocation_tokens"),
    "option": Fact("DS611", _WITHOUT),
    "unknown_key": Fact("DS612", "delete the key, or use the engine's version that knows it"),
    "embedding": Fact("DS613", _MERGE),
    "head": Fact("DS613", _MERGE),
    "kind": Fact("DS614", _MERGE),
    "module": Fact("DS614", _MERGE),
    "some_layers": Fact("DS614", _MERGE),
    "prefix": Fact("DS615", _AGAIN),
    "path": Fact("DS615", "name the base that it was trained on, or rename the keys"),
    "layer": Fact("DS616", "name the base that it was trained on, or delete these keys"),
    "shape": Fact("DS617", "name the base that it was trained on; the file may be damaged"),
    "other_rank": Fact("DS618", "write into adapter_config.json the ranks that the tensors have"),
    "unpaired": Fact("DS619", "restore the missing tensor, or delete its partner"),
    "empty": Fact("DS620", "train it on modules that the base has"),
    "key": Fact("DS621", _AGAIN),
    "adapter_name": Fact("DS621", "take the adapter's name out of the keys: lora_A.weight, not lora_A.default.weight"),
    "file": Fact("DS622", "save it as safetensors"),
    "dtype": Fact("DS622", "save the tensors as float32, float16 or bfloat16"),
    "missing_key": Fact("DS623", "write it into adapter_config.json"),
    "targets": Fact("DS624", "name in target_modules all modules that have tensors, or delete the tensors"),
}
"""Every fact. Each file of rules decides all of them."""

SERVE = "no weight can hold it: serve it with deltaspec, a delta for each row, or train lora"
"""Way out for methods that cannot be merged."""

REWRITES: Mapping[str, str] = {
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
