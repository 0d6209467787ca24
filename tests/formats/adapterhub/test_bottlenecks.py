"""Bottlenecks of AdapterHub in all their wirings, beside its formula in plain torch: equal to it, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
]
UNSAID = [
    {"ln_before": True},
    {"residual_before_ln": False},
    {"residual_before_ln": "post_add"},
    {"original_ln_after": False},
    {"original_ln_before": False, "original_ln_after": False},
    {"original_ln_before": False, "ln_after": True, "adapter_residual_before_ln": True},
    {"is_parallel": True},
    {"use_gating": True},
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


def computed(config: dict[str, Any], t: dict[str, Tensor], h: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
    """Compute what AdapterHub does with what leaves a sublayer, h, and the residual stream, x."""
    z = norm(h + x) if config["original_ln_before"] else h
    residual = h if config["residual_before_ln"] else z
    own = z
    if config.get("ln_before"):
        own = F.layer_norm(z, (HIDDEN,), t["adapter_norm_before.weight"], t["adapter_norm_before.bias"])
    lead = "adapter_down.1" if config.get("ln_before") else "adapter_down.0"
    inner = F.linear(own, t[f"{lead}.weight"], t[f"{lead}.bias"])
    inner = F.leaky_relu(inner) if config["non_linearity"] == "leakyrelu" else F.gelu(inner, approximate="tanh")
    u = F.linear(inner, t["adapter_up.weight"], t["adapter_up.bias"]) * t.get("scaling", config["scaling"])
    if config.get("ln_after"):
        u = F.layer_norm(u, (HIDDEN,), t["adapter_norm_after.weight"], t["adapter_norm_after.bias"])
    return norm(u + residual + x) if config["original_ln_after"] else u + residual


def written(config: dict[str, Any], folder: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Write an adapter for tiny BERT; return where, and its tensors by module."""
    torch.manual_seed(3)
    modules = [f"bert.encoder.layer.{layer}.{part}" for layer in range(2) if layer not in config.get("leave_out", [])
               for part in (["attention.output"] if config["mh_adapter"] else []) + ["output"]]  # fmt: skip
    made = {module: tensors_of(config) for module in modules}
    whole = {"config": config, "hidden_size": HIDDEN, "model_type": "bert", "name": "n", "version": "adapters.1.3.0"}
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


@pytest.mark.parametrize("changes", UNSAID, ids=str)
def test_refused_wirings(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = written(USUAL | changes, tmp_path)
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(base("adapterhub", "bert", "BertForSequenceClassification"), folder)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS549"}
