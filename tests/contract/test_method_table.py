"""Every method on every kind of module: it works there, or the plan refuses it there and says what to do instead.

`TABLE` is the promise. A new method needs a line of it: run this file to see what is observed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from models import VOCABULARY, ids
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import deltaspec
from deltaspec.contract.trial import disturb, floats, run, same
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import builtin_methods, methods

HEADER = "li su c1 k1 k2 k3 gr dw tr em te th ln rm bn gn mo mi ls at la ma st ve"
"""li Linear, su a subclass of it with code of its own, c1 transformers' Conv1D; k1 k2 k3 Conv1d, Conv2d, Conv3d,
gr grouped, dw depthwise, tr transposed; em Embedding, te an embedding tied to a head, th that head; ln LayerNorm,
rm RMSNorm, bn BatchNorm, gn GroupNorm; mo out_proj of nn.MultiheadAttention, mi its in_proj_weight; ls LSTM,
at an attention block, la a decoder layer; ma a bare matrix, st a bare stack of matrices, ve a bare vector."""

TABLE = """
adalora          +  +  +  +  +  +  +  +  -  +  +  +  -  -  -  -  +  +  -  -  -  +  +  -
adapter          +  +  +  -  -  -  -  -  -  +  +  +  +  +  -  -  -  -  +  +  +  -  -  -
bitfit           +  +  +  +  +  +  +  +  +  -  -  +  +  +  +  +  +  -  +  -  -  -  -  -
boft             +  +  +  +  +  +  +  +  -  -  -  +  -  -  -  -  +  +  -  -  -  +  +  -
c3a              +  +  +  -  -  -  -  -  -  -  -  +  -  -  -  -  +  +  -  -  -  +  +  -
compacter        +  +  +  -  -  -  -  -  -  +  +  +  +  +  -  -  -  -  +  +  +  -  -  -
delora           +  +  +  -  -  -  -  -  -  -  -  +  -  -  -  -  +  +  -  -  -  +  +  -
fourierft        +  +  +  -  -  -  -  -  -  -  -  +  -  -  -  -  +  +  -  -  -  +  +  -
full             +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +  +
hira             +  +  +  +  +  +  +  +  -  +  +  +  -  -  -  -  +  +  -  -  -  +  +  -
hra              +  +  +  +  +  +  +  +  -  -  -  +  -  -  -  -  +  +  -  -  -  +  +  -
ia3              +  +  +  +  +  +  +  +  -  +  +  +  -  -  -  -  +  -  -  -  -  -  -  -
loha             +  +  +  +  +  +  +  +  -  +  +  +  -  -  -  -  +  +  -  -  -  +  +  -
lokr             +  +  +  +  +  +  +  +  -  +  +  +  -  -  -  -  +  +  -  -  -  +  +  -
lora             +  +  +  +  +  +  +  +  -  +  +  +  -  -  -  -  +  +  -  -  -  +  +  -
low_rank_adapter +  +  +  -  -  -  -  -  -  +  +  +  +  +  -  -  -  -  +  +  +  -  -  -
miss             +  +  +  -  -  -  -  -  -  -  -  +  -  -  -  -  +  +  -  -  -  +  +  -
norm             -  -  -  -  -  -  -  -  -  -  -  -  +  +  +  +  -  -  -  -  -  -  -  -
oft              +  +  +  +  +  +  +  +  -  +  +  +  -  -  -  -  +  +  -  -  -  +  +  -
p_tuning         -  -  -  -  -  -  -  -  -  -  +  -  -  -  -  -  -  -  -  -  -  -  -  -
parallel_adapter +  +  +  -  -  -  -  -  -  -  -  +  +  +  -  -  -  -  +  +  +  -  -  -
prefix           -  -  -  -  -  -  -  -  -  -  -  -  -  -  -  -  -  -  -  +  +  -  -  -
reft             +  +  +  -  -  -  -  -  -  +  +  +  +  +  -  -  -  -  +  +  +  -  -  -
road             +  +  +  -  -  -  -  -  -  -  -  +  -  -  -  -  +  -  -  -  -  -  -  -
soft_prompt      -  -  -  -  -  -  -  -  -  -  +  -  -  -  -  -  -  -  -  -  -  -  -  -
ssf              +  +  +  +  +  +  +  +  -  -  -  +  +  +  +  +  +  -  -  -  -  -  -  -
trainable_tokens -  -  -  -  -  -  -  -  -  +  +  +  -  -  -  -  -  -  -  -  -  -  -  -
vera             +  +  +  -  -  -  -  -  -  -  -  +  -  -  -  -  +  +  -  -  -  +  +  -
"""


class Subclass(nn.Linear):
    """The same formula in code of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + self.bias


class Holder(nn.Module):
    """Runs one module, here named `site`, and looks at the first of what it gives."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, *args: Tensor) -> Tensor:
        output = self.site(*args)
        return output if isinstance(output, Tensor) else output[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Bare(nn.Module):
    """Owns parameters and no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(24, 16))
        self.stack = nn.Parameter(torch.randn(3, 16, 24))
        self.vector = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...eo", F.linear(x, self.matrix), self.stack) * self.vector


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def held(site: Callable[[], nn.Module], *shape: int) -> tuple[Any, Any, Any]:
    return lambda: Holder(site()), lambda: torch.randn(shape, generator=torch.Generator().manual_seed(2)), "site"


def in_llama(role: str) -> tuple[Any, Any, Any]:
    return llama, lambda: {"input_ids": ids()}, {"role": role}


SEQUENCE = (2, 5, 16)
BARE = held(Bare, *SEQUENCE)[:2]
SITES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any]] = {
    "li": held(lambda: nn.Linear(16, 24), *SEQUENCE),
    "su": held(lambda: Subclass(16, 24), *SEQUENCE),
    "c1": held(lambda: Conv1D(24, 16), *SEQUENCE),
    "k1": held(lambda: nn.Conv1d(16, 24, 3, padding=1), 2, 16, 5),
    "k2": held(lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), 2, 16, 5, 5),
    "k3": held(lambda: nn.Conv3d(16, 24, 2), 2, 16, 3, 3, 3),
    "gr": held(lambda: nn.Conv2d(16, 24, 3, groups=2), 2, 16, 5, 5),
    "dw": held(lambda: nn.Conv2d(16, 16, 2, groups=16), 2, 16, 5, 5),
    "tr": held(lambda: nn.ConvTranspose2d(16, 24, 3), 2, 16, 5, 5),
    "em": (lambda: Holder(nn.Embedding(VOCABULARY, 16)), ids, "site"),
    "te": in_llama("embed"),
    "th": in_llama("head"),
    "ln": held(lambda: nn.LayerNorm(16), *SEQUENCE),
    "rm": held(lambda: nn.RMSNorm(16), *SEQUENCE),
    "bn": held(lambda: nn.BatchNorm2d(16), 2, 16, 3, 3),
    "gn": held(lambda: nn.GroupNorm(4, 16), 2, 16, 3, 3),
    "mo": (Attention, BARE[1], "attention.out_proj"),
    "mi": (Attention, BARE[1], {"parameter": "attention.in_proj_weight"}),
    "ls": held(lambda: nn.LSTM(16, 24, batch_first=True), *SEQUENCE),
    "at": in_llama("attn"),
    "la": in_llama("block"),
    "ma": (*BARE, {"parameter": "**.matrix"}),
    "st": (*BARE, {"parameter": "**.stack"}),
    "ve": (*BARE, {"parameter": "**.vector"}),
}

ELSEWHERE: dict[tuple[str, str], dict[str, Any]] = {
    ("lora", "dw"): {"rank": 16},  # a multiple of the groups
    ("c3a", "th"): {"block_size": 2},  # the vocabulary's width
    ("road", "th"): {"group_size": 2},
}
"""Sizes for single places."""


@cache
def expected() -> dict[str, dict[str, bool]]:
    lines = [line.split() for line in TABLE.strip().splitlines()]
    return {
        name: {site: mark == "+" for site, mark in zip(HEADER.split(), marks, strict=True)} for name, *marks in lines
    }


def made(site: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SITES[site][0]().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases and norms that start at 0 or 1 hide mistakes
                nn.init.normal_(parameter, mean=float("norm" in name or parameter.mean() > 0.5), std=0.1)
    return model


def compiled(method: str, site: str) -> tuple[nn.Module, deltaspec.CompiledModel]:
    model, (_, inputs, target) = made(site), SITES[site]
    params = ELSEWHERE.get((method, site)) or methods()[method].small
    entry = {"name": "d", "method": method, "params": params, "target": target}
    return model, deltaspec.compile(model, {"deltaspec": 1, "deltas": [entry]}, example_inputs=inputs())


def observed(method: str, site: str) -> bool:
    """Return whether a method works at a site; False where the plan refuses it, with a way out."""
    try:
        model, c = compiled(method, site)
    except DeltaSpecError as error:
        for finding in error.diagnostics:
            assert finding.code in ("DS402", "DS403", "DS404"), finding
            assert finding.suggestion, finding
        return False
    inputs = SITES[site][1]()
    plain = run(model, inputs)
    disturb(c)
    attached = run(c, inputs)
    assert not same(attached, plain), "the delta changes nothing"
    output = floats(c(**inputs) if isinstance(inputs, dict) else c(inputs))[0]
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    without = [name for name, p in c.deltas["d"].named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without, f"no gradient for {without}"
    assert any(p.grad.count_nonzero() for p in c.deltas["d"].parameters())
    assert all(p.grad is None for p in model.parameters())
    try:
        merged = run(c.merge("d"), inputs)
    except DeltaSpecError as error:
        assert {finding.code for finding in error.diagnostics} == {"DS435"}
        assert methods()[method].promises.weight is None or "no place" in str(error), error
    else:
        assert methods()[method].promises.weight is not None
        for one, other in zip(floats(merged), floats(attached), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    c.detach()
    assert same(run(c, inputs), plain), "detaching is not exact"
    return True


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", builtin_methods())
def test_a_method_works_where_the_table_says_so_and_is_refused_elsewhere(method, site):
    seen = observed(method, site)
    assert method in expected(), f"add a line for {method!r} to TABLE in {__file__}"
    assert seen == expected()[method][site], f"{method} {'works' if seen else 'is refused'} at {site}: {HEADER}"


def test_the_table_names_methods_that_exist_in_order():
    assert list(expected()) == sorted(expected()) and set(expected()) <= set(builtin_methods())
    assert HEADER.split() == list(SITES)
