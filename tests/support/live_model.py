"""Small models with LoRA of moved tensors, for what others do to them: what each set of deltas gives is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltaspec
from deltaspec.compiler.compiled import CompiledModel

IDS = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(3))
QV = {"role": ["attn.q", "attn.v"]}


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, use_cache=False, **sizes)).eval()


class Net(nn.Module):
    """Two layers that torch.fx traces."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(x)))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def lora(name: str = "a", target: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "method": "lora", "params": {"rank": 2}, "target": target or QV, **more}


def moved(compiled: CompiledModel, scale: float = 0.3) -> CompiledModel:
    """Give all deltas the values that a training might."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in compiled.deltas.values():
            for parameter in delta.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return compiled


def build(*deltas: dict[str, Any], model: nn.Module | None = None, **how: Any) -> CompiledModel:
    spec = {"deltaspec": 1, "deltas": list(deltas)}
    return moved(deltaspec.compile(llama() if model is None else model, spec, **how))


def two(*more: dict[str, Any]) -> CompiledModel:
    """A Llama with `french` and `german`, nothing attached."""
    return build(lora("french", attached=False), lora("german", attached=False), *more)


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **more).logits
    return found


class Acting:
    """Tells which set of deltas gave an output."""

    def __init__(self, compiled: CompiledModel, *names: str) -> None:
        with compiled.detached():
            self.known = {"base": logits(compiled)}
        for name in names:
            with compiled.only(name):
                self.known[name] = logits(compiled)

    def __call__(self, output: Tensor) -> str:
        width = self.known["base"].shape[-1]
        near = [n for n, known in self.known.items() if torch.allclose(output[..., :width], known, atol=1e-5)]
        assert len(near) == 1, near
        return near[0]
