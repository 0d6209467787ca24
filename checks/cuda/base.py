"""What a check is, and the models that checks run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltaspec

Outcome = str
"""What a check saw, in words; one that does not hold raises."""


class Skipped(Exception):
    """A check has no meaning here; its text says why."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    group: str
    name: str
    run: Callable[[torch.device], Outcome]


VOCABULARY = 96
LINEAR = {"type": "Linear", "not": {"path": "lm_head"}}


def llama(
    device: torch.device, *, hidden: int = 64, layers: int = 2, dtype: torch.dtype = torch.float32, heads: int = 4
) -> LlamaForCausalLM:
    """Return a small Llama, the same numbers on every device."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device, dtype).eval()


def ids(device: torch.device, rows: int = 4, length: int = 16) -> Tensor:
    """Return the ids of a batch."""
    drawn = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return drawn.to(device)


def spec(*names: str, method: str = "lora", target: Any = LINEAR, **params: Any) -> dict[str, Any]:
    """Return a spec of deltas that differ by their names."""
    delta = {"method": method, "params": params, **({} if target is None else {"target": target})}
    return {"deltaspec": 1, "deltas": [{"name": name, **delta} for name in names or ("d",)]}


@torch.no_grad()
def moved(c: deltaspec.CompiledModel, by: float = 0.05) -> deltaspec.CompiledModel:
    """Move all deltas away from their initial values, by the same numbers on every device."""
    generator = torch.Generator().manual_seed(2)
    for delta in c.deltas.values():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * by).to(parameter))
    return c


def trained(c: deltaspec.CompiledModel, x: Tensor, steps: int) -> list[float]:
    """Train all deltas on one batch; return the losses."""
    optimizer, losses = torch.optim.AdamW(c.trainable_parameters(), lr=1e-2), list[float]()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = c(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def require(holds: bool, otherwise: str) -> None:
    """Raise AssertionError, saying what was seen, unless this holds."""
    if not holds:
        raise AssertionError(otherwise)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the largest value, on the CPU."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters that have one."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def plain_float32() -> Iterator[None]:
    """Compute in whole float32 inside, as a CPU does."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
