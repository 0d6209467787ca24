"""LoRA beside PEFT: the same tensors in both libraries give the same outputs and the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Branching, Traceable
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.inputs import call_arguments
from deltaspec.compiler.compiled import CompiledModel

RANK, ALPHA = 4, 7.0
SUFFIXES = {
    "bert": (["query", "value"], {"role": ["attn.q", "attn.v"]}),
    "gpt2": (["c_attn", "c_proj", "c_fc"], {"type": "Conv1D"}),
    "llama": (["q_proj", "v_proj", "down_proj"], {"role": ["attn.q", "attn.v", "mlp.down"]}),
    "t5": (["q", "wi", "wo"], {"role": ["attn.q", "cross_attn.q", "mlp.up", "mlp.down"]}),
    "bart": (["fc1", "out_proj"], {"role": ["mlp.up", "attn.o", "cross_attn.o"]}),
    "vit": (["q_proj", "projection"], [{"role": "attn.q"}, "**.projection"]),
    "traceable-modules": (["conv", "up", "head"], ["conv", "up", "head"]),
    "traceable-symbolic": (["conv", "up", "head"], ["conv", "up", "head"]),
    "branching": (["embed", "head", "up"], ["embed", "head", "block.up"]),
}


def peft_name(fqn: str, which: str, embedding: bool) -> str:
    side = "A" if which == "down" else "B"
    end = f"lora_embedding_{side}.default" if embedding else f"lora_{side}.default.weight"
    return f"base_model.model.{fqn}.{end}"


def both(
    model: nn.Module, suffixes: list[str], target: Any, capture: str, rslora: bool, inputs: Any
) -> tuple[CompiledModel, nn.Module, dict[str, str]]:
    """Build both, copy our (disturbed) tensors over to PEFT; also give our keys with PEFT's names."""
    params = {"rank": RANK, "alpha": ALPHA, "scaling": "rslora" if rslora else "standard"}
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "params": params, "target": target}]}
    ours = deltaspec.compile(model, spec, capture=capture, example_inputs=inputs)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=suffixes, lora_dropout=0.0, use_rslora=rslora, init_lora_weights=False
    )
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    named = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(3)
    pairs = {}
    with torch.no_grad():
        for planned in ours.plan["d"].sites:
            for which in ("down", "up"):
                tensor = ours.deltas["d"].tensor(f"{planned.fqn}.{which}")
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
                name = peft_name(planned.fqn, which, planned.site.kind == "embedding")
                assert named[name].shape == tensor.shape
                named[name].copy_(tensor)
                pairs[f"{planned.fqn}.{which}"] = name
    assert len(pairs) == sum("lora_" in name for name in named)
    return ours, theirs, pairs


def loss(model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    args, kwargs = call_arguments(inputs)
    output = model(*args, **kwargs)
    first = output if isinstance(output, Tensor) else output["logits"]
    return first, (first * torch.linspace(-1, 1, first.numel()).reshape(first.shape)).sum()


@pytest.mark.parametrize("rslora", [False, True], ids=["standard", "rslora"])
@pytest.mark.parametrize("architecture", SUFFIXES)
def test_outputs_and_gradients_agree_with_peft(architecture, rslora):
    chosen = ARCHITECTURES[architecture]
    suffixes, target = SUFFIXES[architecture]
    inputs = chosen.inputs()
    ours, theirs, pairs = both(chosen.model(), suffixes, target, chosen.capture, rslora, inputs)
    mine, my_loss = loss(ours, inputs)
    yours, your_loss = loss(theirs, inputs)
    torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-5)
    my_loss.backward()
    your_loss.backward()
    named = dict(theirs.named_parameters())
    for key, name in pairs.items():
        grad = ours.deltas["d"].tensor(key).grad
        scale = named[name].grad.abs().max().item()
        torch.testing.assert_close(grad, named[name].grad, rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=key)
    # And the backbone alone, so that the agreement is not one of two idle deltas.
    with ours.detached():
        assert (loss(ours, inputs)[0] - yours).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [Traceable, Branching])
def test_merged_weights_agree_with_peft(kind):
    architecture = "traceable-modules" if kind is Traceable else "branching"
    chosen = ARCHITECTURES[architecture]
    suffixes, target = SUFFIXES[architecture]
    ours, theirs, _ = both(chosen.model(), suffixes, target, "modules", False, chosen.inputs())
    mine, yours = ours.merge().state_dict(), theirs.merge_and_unload().state_dict()
    assert mine.keys() == yours.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, yours[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, (3, 2), padding=(1, 0)),
        nn.Conv3d(2, 4, 2),
        nn.Embedding(20, 6, padding_idx=0),
        nn.Embedding(20, 6, max_norm=1.0, scale_grad_by_freq=True),
        nn.Linear(5, 7, bias=False),
    ],
    ids=lambda module: str(module)[:60],
)
def test_single_modules_agree_with_peft(module):
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, nn.Embedding):
        inputs = torch.randint(0, 20, (3, 4), generator=generator)
    elif isinstance(module, nn.Linear):
        inputs = torch.randn(3, 5, generator=generator)
    else:
        dims = module.weight.dim() - 2
        inputs = torch.randn(2, module.in_channels, *(9,) * dims, generator=generator)
    model = nn.Sequential(module).eval()
    ours, theirs, pairs = both(model, ["0"], "0", "modules", False, inputs)
    mine, yours = ours(inputs), theirs(inputs)
    torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 1, mine.numel()).reshape(mine.shape)
    (mine * weight).sum().backward()
    (yours * weight).sum().backward()
    named = dict(theirs.named_parameters())
    for key, name in pairs.items():
        torch.testing.assert_close(ours.deltas["d"].tensor(key).grad, named[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=4, bias=False),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", stride=2),
        nn.Conv3d(4, 4, 2, groups=2),
    ],
    ids=lambda module: str(module)[:60],
)
def test_convolutions_that_peft_has_no_form_for_follow_the_formula(module):
    """Dilation, padding modes, and groups: what PEFT 0.21 crashes on, ignores, or gives another meaning."""
    spec = {
        "deltaspec": 1,
        "deltas": [{"name": "d", "method": "lora", "params": {"rank": 4, "alpha": 6}, "target": "0"}],
    }
    ours = deltaspec.compile(nn.Sequential(module).eval(), spec)
    tensors = dict(ours.deltas["d"].tensors())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        down, up = tensors["0.down"], tensors["0.up"]
        expected = copy.deepcopy(module)
        per_group, rank = module.out_channels // module.groups, 4 // module.groups
        for channel in range(module.out_channels):
            first = channel // per_group * rank
            for r in range(rank):
                expected.weight[channel] += 6 / 4 * up[channel, r].reshape(()) * down[first + r]
        inputs = torch.randn(2, module.in_channels, *(9,) * (module.weight.dim() - 2), generator=generator)
        torch.testing.assert_close(ours(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours(inputs), module(inputs), atol=1e-2)
        torch.testing.assert_close(ours.merge()[0].weight, expected.weight, rtol=1e-5, atol=1e-6)
