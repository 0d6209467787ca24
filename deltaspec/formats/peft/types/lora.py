"""LoRA of PEFT: with its scales, ranks a module, DoRA, biases, embeddings, convolutions and packed attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.targets import by_pattern, check_targets

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

KEYS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
)  # fmt: skip
_TRAINING = (
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "runtime_config", "qalora_group_size",
    "fan_in_fan_out", "lora_ga_config",
)  # fmt: skip
_OURS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "bias", "lora_embedding_A": "down",
         "lora_embedding_B": "up", "lora_magnitude_vector": "magnitude"}  # fmt: skip


def read(adapter: Adapter) -> None:
    """Add the delta of a LoRA adapter."""
    adapter.ignore(*_TRAINING)
    for name in ("use_qalora", "velora_config", "alora_invocation_tokens", "monteclora_config", "layer_replication",
                 "use_bdlora", "arrow_config", "kasa_config"):  # fmt: skip
        adapter.refuse(name, "there is no method for this variant", "merge it with PEFT: model.merge_and_unload()")
    params = _params(adapter)
    modules = adapter.modules(*KEYS)
    places = adapter.places(modules)
    check_targets(adapter, places)
    rank, alpha = adapter.option("r", 8), adapter.option("lora_alpha", 8)
    ranks, alphas = adapter.option("rank_pattern") or {}, adapter.option("alpha_pattern") or {}
    sites = []
    for module, fqn in places.items():
        own = {"rank": by_pattern(module, ranks, rank), "alpha": float(by_pattern(module, alphas, alpha))}
        tensors = {
            _OURS[suffix]: value
            for suffix in KEYS
            if (value := adapter.tensor_of(module, suffix, f"{_OURS[suffix]} of {fqn}")) is not None
        }
        if not _fits(adapter, module, own["rank"], tensors):
            continue
        if "down" in tensors and (surplus := own["rank"] - tensors["down"].shape[0]):
            message = f"{module}: its rank is {own['rank']}, and lora_A has {surplus} rows fewer"
            adapter.find("DS543", message, "the configuration and the file are of two adapters", adapter.file)
            continue
        differs = {key: value for key, value in own.items() if value != params[key]}
        sites.append(IncomingSite(fqn, tensors, differs))
    adapter.add("lora", params, sites)


def _params(adapter: Adapter) -> dict[str, Any]:
    params: dict[str, Any] = {"rank": adapter.option("r", 8), "alpha": float(adapter.option("lora_alpha", 8))}
    if dropout := adapter.option("lora_dropout", 0.0):
        params["dropout"] = float(dropout)
    if adapter.option("use_rslora"):
        params["scaling"] = "rslora"
    if adapter.option("use_dora"):
        params["use_dora"] = True
    if adapter.option("lora_bias"):
        params["bias"] = True
    adapter.option("init_lora_weights")
    return params


def _fits(adapter: Adapter, module: str, rank: int, tensors: dict[str, Any]) -> bool:
    lacking = [name for name in ("down", "up") if name not in tensors]
    if lacking:
        message = f"{module}: {counted(len(lacking), 'factor')} of the pair is missing"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
    return not lacking
