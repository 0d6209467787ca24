"""Models, checks and the comparison with PEFT that the tests of the weight-changing methods share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import deltaspec
from deltaspec.deltas.modules import storage_key

Tensors = Mapping[str, Any]
"""Our tensor name -> PEFT's parameter, or (parameter, function from its layout to ours)."""


class Net(nn.Module):
    """One module of each kind: Embedding, Conv2d (plain, grouped), Conv1d, Linear (with and without bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 16)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.conv1 = nn.Conv1d(16, 12, 3, padding=1)
        self.fc, self.out = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        text = self.emb(ids)
        seen = self.grouped(self.conv(image)).mean((2, 3))
        told = self.conv1(text.transpose(1, 2)).mean((1, 2))
        return self.out(torch.tanh(self.fc(text))) + seen[:, None] + told[:, None, None]


class Attention(nn.Module):
    """A module that reads the weight of a Linear without calling it (`attn.out_proj`)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, x, x)[0]
        return out


def net() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), {"ids": torch.arange(10).reshape(2, 5), "image": torch.randn(2, 4, 9, 9)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50)
    return BertModel(config).eval(), {"input_ids": torch.arange(12).reshape(2, 6)}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # all zero in a fresh model, which would hide a lost bias
            nn.init.normal_(parameter, std=0.1)
    return model, {"input_ids": torch.arange(12).reshape(2, 6)}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(12).reshape(2, 6)}


def compiled(
    model: nn.Module, inputs: Any, method: str, params: dict[str, Any], target: Any, **options: Any
) -> deltaspec.CompiledModel:
    """Compile one delta `d`."""
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": params, "target": target}]}
    return deltaspec.compile(model, spec, example_inputs=inputs, **options)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def run(model: nn.Module, inputs: Any) -> Tensor:
    return first(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def stir(model: deltaspec.CompiledModel, std: float = 0.1, seed: int = 1) -> None:
    """Move every trainable tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.deltas["d"].parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)


def refusal(model: nn.Module, inputs: Any, method: str, params: dict[str, Any], target: Any) -> str:
    """Return the text of the DS4 findings; fails where the plan takes it."""
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        compiled(model, inputs, method, params, target)
    assert all(d.code.startswith("DS4") and d.suggestion for d in caught.value.diagnostics)
    return str(caught.value)


def check(
    made: tuple[nn.Module, Any],
    method: str,
    params: dict[str, Any],
    target: Any,
    identity: bool = True,
    std: float = 0.1,
) -> deltaspec.CompiledModel:
    """Check what weight methods promise: identity, reversal, gradients, merge, copies, half precision."""
    model, inputs = made
    before = copy.deepcopy(model.state_dict())
    plain = run(model, inputs)
    c = compiled(model, inputs, method, params, target)
    assert sum(p.numel() for p in c.trainable_parameters()) == c.plan.trainable
    assert torch.equal(run(c, inputs), plain) or not identity
    torch.testing.assert_close(run(c.merge("d"), inputs), run(c, inputs), atol=2e-5, rtol=1e-4)
    stir(c, std)
    changed = run(c, inputs)
    assert not torch.allclose(changed, plain, atol=1e-4)
    torch.testing.assert_close(run(c.merge("d"), inputs), changed, atol=2e-5, rtol=1e-4)
    changed.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.deltas["d"].parameters())
    assert all(p.grad is None for n, p in c.backbone.named_parameters() if not n.startswith("deltaspec."))
    with c.detached():
        assert torch.equal(run(c, inputs), plain)
    twin = copy.deepcopy(c)
    assert torch.equal(run(twin, inputs), changed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    half = compiled(copy.deepcopy(model).bfloat16(), _half(inputs), method, params, target)
    assert run(half, _half(inputs)).dtype == torch.bfloat16
    return c


def _half(inputs: Any) -> Any:
    def convert(value: Tensor) -> Tensor:
        return value.bfloat16() if value.is_floating_point() else value

    return {k: convert(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(map(convert, inputs))


def check_bypassed(method: str, params: dict[str, Any], identity: bool = True) -> None:
    """Check a site whose weight is read without a call: only `fold` reaches it."""
    torch.manual_seed(0)
    # Frozen, since torch picks attention kernels by what needs gradients, and they differ in the last bit.
    model, inputs = Attention().requires_grad_(False), (torch.randn(2, 3, 16),)
    c = compiled(model, inputs, method, params, "attn.out_proj")
    assert torch.allclose(run(c, inputs), run(model, inputs), atol=0 if identity else 1e-5)
    stir(c)
    assert not torch.allclose(run(c, inputs), run(model, inputs), atol=1e-4)
    torch.testing.assert_close(run(c.merge("d"), inputs), run(c, inputs), atol=1e-5, rtol=1e-4)


def check_training(method: str, params: dict[str, Any], target: Any, rate: float = 1e-2) -> None:
    """Check that a few steps lower the loss."""
    model, inputs = bert()
    c = compiled(model, inputs, method, params, target)
    goal = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(c.trainable_parameters(), rate)
    losses = []
    for _ in range(8):
        loss = (run(c, inputs) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3, losses


def agree(
    made: tuple[nn.Module, Any],
    method: str,
    params: dict[str, Any],
    target: Any,
    config: peft.PeftConfig,
    tensors: Callable[[Any], Tensors],
    std: float = 0.1,
    tolerance: float = 1e-5,
    gradients: bool = True,
) -> None:
    """Copy a delta's tensors into PEFT's model of the same method; outputs and gradients must agree."""
    model, inputs = made
    c = compiled(model, inputs, method, params, target)
    stir(c, std)
    other = peft.get_peft_model(copy.deepcopy(model), config).eval()
    places = []
    for site in c.plan.deltas[0].sites:
        theirs = tensors(other.base_model.model.get_submodule(site.site.row.fqn))
        for spec in site.tensors:
            ours = c.deltas["d"].tensor(storage_key(site.site.row.fqn, spec))
            if spec.name not in theirs:
                assert spec.buffer, spec.name
                continue
            found = theirs[spec.name]
            parameter, layout = found if isinstance(found, tuple) else (found, lambda value: value)
            with torch.no_grad():
                layout(parameter.data).copy_(ours.reshape(layout(parameter.data).shape))
            places.append((spec.name, ours, parameter, layout))
    mine, reference = run(c, inputs), run(other, inputs)
    torch.testing.assert_close(mine, reference, atol=tolerance, rtol=tolerance)
    if not gradients:
        return
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    (mine * weight).sum().backward()
    (reference * weight).sum().backward()
    for name, ours, parameter, layout in places:
        if ours.requires_grad:
            expected = layout(parameter.grad).reshape(ours.shape)
            scale = expected.abs().max().clamp_min(1.0).item()
            torch.testing.assert_close(
                ours.grad, expected, atol=2 * tolerance * scale, rtol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
