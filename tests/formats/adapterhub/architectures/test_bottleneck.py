"""Bottlenecks of AdapterHub in all their wirings, beside its formula in plain torch: equal to it, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from written_elsewhere import base

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

WIDTH, HIDDEN = 4, 32
USUAL: dict[str, Any] = {
    "mh_adapter": True, "output_adapter": True, "reduction_factor": 8, "non_linearity": "leakyrelu",
    "original_ln_before": True, "original_ln_after": True, "residual_before_ln": True, "scaling": 1.0,
}  # fmt: skip
SAID = [
    {},
    {"scaling": 2.5, "leave_out": [1]},
    {"scaling": -0.5, "mh_adapter": False},
    {"scaling": "learned"},
    {"scaling": "channel", "original_ln_before": False},
    {"original_ln_before": False, "ln_before": True, "ln_after": True, "scaling": 3.0},
    {"original_ln_before": False, "residual_before_ln": False, "non_linearity": "gelu_new"},
    {"original_ln_after": False, "residual_before_ln": False, "ln_before": True},
    {"original_ln_after": False, "residual_before_ln": False, "ln_after": True, "scaling": "channel"},
    {"use_gating": True, "scaling": -2.0},
    {"use_gating": True, "original_ln_before": False, "scaling": "channel"},
    {"is_parallel": True},
    {"is_parallel": True, "scaling": "learned", "mh_adapter": False},
    {"is_parallel": True, "use_gating": True, "scaling": -2.0},
]
BEFORE = [
    {},
    {"is_parallel": True},
    {"is_parallel": True, "output_adapter": False, "scaling": "channel", "leave_out": [0]},
    {"ln_before": True, "ln_after": True},
    {"original_ln_after": False, "residual_before_ln": False},
    {"original_ln_before": False},
    {"use_gating": True, "scaling": 2.0},
    {"reduction_factor": {"0": 8, "default": 8}, "phm_layer": False},
]
"""Wirings on a model that normalises before."""
UNSAID = [
    {"ln_before": True},
    {"residual_before_ln": False},
    {"residual_before_ln": "post_add"},
    {"original_ln_after": False},
    {"original_ln_before": False, "original_ln_after": False},
    {"original_ln_before": False, "ln_after": True, "adapter_residual_before_ln": True},
    {"is_parallel": True, "original_ln_after": False},
    {"is_parallel": True, "ln_after": True},
    {"use_gating": True, "original_ln_before": False, "ln_after": True},
    {"ln_after": True},
]


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """Draw the tensors of one bottleneck, by the names of AdapterHub."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape) * 0.3

    found = {}
    if config.get("ln_before"):
        norm = {"weight": 1 + drawn(HIDDEN), "bias": drawn(HIDDEN)}
        found |= {f"{name}.{k}": v for k, v in norm.items() for name in ("adapter_norm_before", "adapter_down.0")}
    lead = "adapter_down.1" if config.get("ln_before") else "adapter_down.0"
    found |= {f"{lead}.weight": drawn(WIDTH, HIDDEN), f"{lead}.bias": drawn(WIDTH)}
    found |= {"adapter_up.weight": drawn(HIDDEN, WIDTH), "adapter_up.bias": drawn(HIDDEN)}
    if config.get("ln_after"):
        found |= {"adapter_norm_after.weight": drawn(HIDDEN), "adapter_norm_after.bias": drawn(HIDDEN)}
    if isinstance(config["scaling"], str):
        found["scaling"] = 1 + drawn(1 if config["scaling"] == "learned" else HIDDEN)
    if config.get("use_gating"):
        found |= {"gate.weight": drawn(1, HIDDEN), "gate.bias": drawn(1)}
    return found


def computed(config: dict[str, Any], t: dict[str, Tensor], h: Tensor, x: Tensor, norm: Callable[..., Any]) -> Tensor:
    """Compute what AdapterHub does with what leaves a sublayer, h, and the residual stream, x."""
    z = norm(h + x) if config["original_ln_before"] else h
    residual = h if config["residual_before_ln"] or config.get("is_parallel") else z
    z = x if config.get("is_parallel") else z
    own = z
    if config.get("ln_before"):
        own = F.layer_norm(z, (HIDDEN,), t["adapter_norm_before.weight"], t["adapter_norm_before.bias"])
    lead = "adapter_down.1" if config.get("ln_before") else "adapter_down.0"
    inner = F.linear(own, t[f"{lead}.weight"], t[f"{lead}.bias"])
    inner = F.leaky_relu(inner) if config["non_linearity"] == "leakyrelu" else F.gelu(inner, approximate="tanh")
    u = F.linear(inner, t["adapter_up.weight"], t["adapter_up.bias"]) * t.get("scaling", config["scaling"])
    if config.get("use_gating"):
        u = u * torch.sigmoid(F.linear(z, t["gate.weight"], t["gate.bias"])).mean(1, keepdim=True)
    if config.get("ln_after"):
        u = F.layer_norm(u, (HIDDEN,), t["adapter_norm_after.weight"], t["adapter_norm_after.bias"])
    return norm(u + residual + x) if config["original_ln_after"] else u + residual


PLACES = {
    "bert": ("bert.encoder.layer", "attention.output", "output"),
    "gpt2": ("transformer.h", "attention_adapters", "output_adapters"),
}
"""What AdapterHub calls layers and places, by model type."""


def written(config: dict[str, Any], folder: Path, kind: str = "bert") -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Write an adapter for a tiny model; return where, and its tensors by module."""
    torch.manual_seed(3)
    stack, mh, output = PLACES[kind]
    parts = [mh] * config["mh_adapter"] + [output] * config.get("output_adapter", True)
    layers = [layer for layer in range(2) if layer not in config.get("leave_out", [])]
    made = {f"{stack}.{layer}.{part}": tensors_of(config) for layer in layers for part in parts}
    whole = {"config": config, "hidden_size": HIDDEN, "model_type": kind, "name": "n", "version": "adapters.1.3.0"}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    keys = {f"{module}.adapters.n.{name}": value for module, own in made.items() for name, value in own.items()}
    torch.save(keys, folder / "pytorch_adapter.bin")
    return folder, made


def theirs(model: Any, config: dict[str, Any], made: dict[str, dict[str, Tensor]]) -> Any:
    """Return a copy of the model whose sublayers compute AdapterHub's formula."""
    copied = copy.deepcopy(model)
    for name, own in made.items():
        module = copied.get_submodule(name)

        def forward(h: Tensor, x: Tensor, module: Any = module, own: dict[str, Tensor] = own) -> Tensor:
            return computed(config, own, module.dense(h), x, module.LayerNorm)

        module.forward = forward
    return copied


def run(model: Callable[..., Any]) -> Tensor:
    ids = torch.arange(3, 21).reshape(2, 9)
    found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("changes", SAID, ids=str)
def test_wirings(changes: dict[str, Any], tmp_path: Path) -> None:
    config, model = USUAL | changes, base("adapterhub", "bert", "BertForSequenceClassification")
    folder, made = written(config, tmp_path)
    with torch.no_grad():
        found, expected = run(deltaspec.restore(model, folder)), run(theirs(model, config, made))
        assert not torch.allclose(run(model), expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", BEFORE, ids=str)
def test_wirings_of_models_that_normalise_before(changes: dict[str, Any], tmp_path: Path) -> None:
    config, model = USUAL | changes, base("adapterhub", "gpt2", "GPT2LMHeadModel")
    folder, made = written(config, tmp_path, "gpt2")
    ids = torch.arange(3, 21).reshape(2, 9)
    body, causal = model.transformer, torch.full((1, 1, 9, 9), -torch.inf).triu(1)
    with torch.no_grad():
        found, x = deltaspec.restore(model, folder)(input_ids=ids).logits, body.wte(ids) + body.wpe(torch.arange(9))
        for layer, block in enumerate(body.h):
            for part in ("attention", "output"):
                attends = part == "attention"
                h = block.attn(block.ln_1(x), attention_mask=causal)[0] if attends else block.mlp(block.ln_2(x))
                own = made.get(f"transformer.h.{layer}.{part}_adapters")
                x = h + x if own is None else computed(config, own, h, x, lambda s: s)
        expected = model.lm_head(body.ln_f(x))
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", UNSAID, ids=str)
def test_refused_wirings(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = written(USUAL | changes, tmp_path)
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(base("adapterhub", "bert", "BertForSequenceClassification"), folder)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS549"}
