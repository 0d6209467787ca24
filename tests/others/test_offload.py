"""Backbones whose weights accelerate keeps elsewhere: deltas start, run, merge and save as beside plain weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from models import ARCHITECTURES
from torch import nn

import deltaspec
from deltaspec.deltas.modules import Delta

LLAMA = ARCHITECTURES["llama"]
PLACES = {
    "lora": {"role": "attn.q"}, "hira": {"role": "attn.o"}, "full": {"role": "attn.k"}, "bitfit": {"path": "lm_head"},
    "adapter": {"role": "mlp"}, "norm": {"role": "norm.attn"}, "oft": {"role": "mlp.down"}, "ia3": {"role": "mlp.up"},
}  # fmt: skip
PARAMS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "init": "pissa"},
    "hira": {"rank": 2},
    "oft": {"block_size": 4},
}
SPEC = {
    "deltaspec": 1,
    "deltas": [
        *({"name": m, "method": m, "params": PARAMS.get(m, {}), "target": target} for m, target in PLACES.items()),
        {"name": "dora", "method": "lora", "params": {"rank": 2, "use_dora": True}, "target": {"role": "attn.v"}},
        {"name": "rows", "method": "lora", "params": {"rank": 2}, "target": {"path": "model.embed_tokens"}},
    ],
}


def to_cpu(model: Any, folder: Path) -> Any:
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def to_disk(model: Any, folder: Path) -> Any:
    accelerate.disk_offload(model, folder / "weights", execution_device="cpu")
    return model


def by_map(model: Any, folder: Path) -> Any:
    places = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {f"layers.{index}": ("cpu", "disk")[index % 2] for index in range(len(model.model.layers))}
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "disk"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder / "weights")


def trained(compiled: Any) -> Any:
    torch.manual_seed(1)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            nn.init.normal_(parameter, parameter.detach().float().mean().item(), 0.2)
    return compiled


def gradients(compiled: Any) -> list[torch.Tensor]:
    compiled(**LLAMA.inputs()).logits.square().mean().backward()
    return [parameter.grad for parameter in compiled.trainable_parameters()]


@pytest.mark.parametrize("offload", [to_cpu, to_disk, by_map])
def test_offloaded_weights(offload: Callable[[Any, Path], Any], tmp_path: Path):
    inputs, plain = LLAMA.inputs(), deltaspec.compile(LLAMA.model().eval(), SPEC)
    model = offload(LLAMA.model().eval(), tmp_path)
    bare = model(**inputs).logits
    compiled = deltaspec.compile(model, SPEC)
    for name, delta in compiled.deltas.items():
        for (_, found), (_, expected) in zip(delta.tensors(), plain.deltas[name].tensors(), strict=True):
            assert not found.is_meta and torch.allclose(found, expected, atol=1e-6)
    with torch.no_grad():
        for found, expected in zip(trained(compiled).parameters(), trained(plain).parameters(), strict=True):
            assert found.is_meta or torch.equal(found, expected)
    expected = plain(**inputs).logits
    assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-5)
    for found, wanted in zip(gradients(compiled), gradients(plain), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-3)
    for made in (compiled.view(), copy.deepcopy(compiled)):
        assert torch.allclose(made(**inputs).logits, expected, atol=1e-5)
    names = [name for name in PLACES if name not in ("adapter", "bitfit")]
    merged = compiled.merge(*names)(**inputs).logits
    assert torch.allclose(merged, plain.merge(*names)(**inputs).logits, atol=1e-5)
    compiled.save(tmp_path / "saved")
    again = deltaspec.restore(offload(LLAMA.model().eval(), tmp_path), tmp_path / "saved")
    assert torch.allclose(again(**inputs).logits, expected, atol=1e-5)
    assert torch.equal(compiled.detach()(**inputs).logits, bare) and torch.equal(model(**inputs).logits, bare)
    if offload is to_cpu:  # no weight is held twice
        hooks = [each.model.layers[0].self_attn.q_proj._hf_hook for each in (compiled.backbone, model)]
        assert hooks[0].weights_map["weight"].data_ptr() == hooks[1].weights_map["weight"].data_ptr()
    remove_hook_from_submodules(model)


def test_deltas_without_values_are_told(tmp_path: Path):
    loaded = LLAMA.model()
    with accelerate.init_empty_weights():
        model = type(loaded)(loaded.config)
    compiled = deltaspec.compile(model, SPEC).eval()
    compiled.backbone.load_state_dict(loaded.state_dict(), assign=True, strict=False)
    ways = [
        lambda: compiled(**LLAMA.inputs()), lambda: compiled.detach().attach("lora"), lambda: compiled.merge("lora"),
        lambda: compiled.save(tmp_path), lambda: compiled.only("hira"),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(deltaspec.DeltaSpecError, match="DS534.*meta device"):
            way()
    compiled.detach()
    assert torch.equal(compiled(**LLAMA.inputs()).logits, LLAMA.model().eval()(**LLAMA.inputs()).logits)
    home = compiled.backbone.deltaspec
    values = deltaspec.compile(LLAMA.model(), SPEC).backbone.deltaspec.state_dict()
    home.load_state_dict(values, assign=True)
    assert all(isinstance(delta, Delta) for delta in compiled.deltas.values())
    expected = deltaspec.compile(LLAMA.model().eval(), SPEC)(**LLAMA.inputs()).logits
    assert torch.allclose(compiled.attach()(**LLAMA.inputs()).logits, expected, atol=1e-5)
