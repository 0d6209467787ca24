"""Write a LoRA or a VeRA as a PEFT LoRA directory (until `c.save_as("peft", …)` is there)."""

import json
from pathlib import Path

from safetensors.torch import save_file

import deltaspec


def write_peft(c: deltaspec.CompiledModel, delta: str, folder: Path) -> None:
    tensors = c.deltas[delta].state_dict()
    found, ranks, alphas, rslora = {}, {}, {}, False
    for planned in c.plan.alone(delta).sites:
        fqn, params = planned.site.row.fqn, planned.params
        key = fqn.replace(".", "~")
        if f"{key}~down" in tensors:
            down, up = tensors[f"{key}~down"], tensors[f"{key}~up"]
            rslora, alpha = params.scaling == "rslora", params.alpha
        elif f"{key}~inner_scale" in tensors:
            shared = {k: v for k, v in tensors.items() if k.startswith("shared~")}
            inner, outer = tensors[f"{key}~inner_scale"], tensors[f"{key}~outer_scale"]
            rank = params.rank
            down = inner[:, None] * shared[f"shared~down~{rank}x{planned.site.in_width}"]
            up = outer[:, None] * shared[f"shared~up~{planned.site.width}x{rank}"]
            alpha = rank
        else:
            continue
        found[f"base_model.model.{fqn}.lora_A.weight"] = down.detach().contiguous()
        found[f"base_model.model.{fqn}.lora_B.weight"] = up.detach().contiguous()
        ranks[fqn], alphas[fqn] = len(down), alpha
    r = max(ranks.values())
    alpha = next(iter(alphas.values()))
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "bias": "none",
        "target_modules": sorted({f.rpartition(".")[2] for f in ranks}),
        "base_model_name_or_path": None,
        "rank_pattern": {f: x for f, x in ranks.items() if x != r},
        "inference_mode": True,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    layers = sorted({int(f.split(".")[2]) for f in ranks})
    if layers != list(range(c.backbone.config.num_hidden_layers)):
        config["layers_to_transform"] = layers
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(found, folder / "adapter_model.safetensors")
