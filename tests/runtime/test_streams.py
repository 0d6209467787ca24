"""Deltas that read what enters another module: the residual stream of models that normalise before."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from nets import spec
from torch import Tensor, nn
from torch.nn import functional as F
from weight_methods import gpt2, run

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

PARALLEL = {"name": "parallel", "method": "parallel_adapter", "params": {"width": 4, "input_of": "ln_2"},
            "target": {"path": "**.mlp.c_proj"}}  # fmt: skip
SERIAL = {"name": "serial", "method": "adapter", "params": {"width": 4, "residual_of": "ln_1"},
          "target": {"path": "**.attn.c_proj"}}  # fmt: skip


def stir(c: deltaspec.CompiledModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in c.trainable_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def compiled(*deltas: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor], deltaspec.CompiledModel]:
    model, inputs = gpt2()
    c = deltaspec.compile(model, spec(*(deltas or (PARALLEL, SERIAL))))
    stir(c)
    return model, inputs, c


def tensors(c: deltaspec.CompiledModel, name: str, layer: int) -> list[Tensor]:
    found = {key.rpartition(".")[2]: t for key, t in c.deltas[name].tensors() if f"h.{layer}." in key}
    return [found[key] for key in ("down", "down_bias", "up", "up_bias")]


def bottleneck(x: Tensor, act: Any, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return F.linear(act(F.linear(x, down, down_bias)), up, up_bias)


def by_hand(model: Any, inputs: dict[str, Tensor], c: deltaspec.CompiledModel) -> Tensor:
    """Compute GPT-2 with a bottleneck of h + x behind attention, and one of x beside the feed-forward."""
    ids, body = inputs["input_ids"], model.transformer
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    for layer, block in enumerate(body.h):
        h = block.attn(block.ln_1(x))[0]
        x = x + h + bottleneck(x + h, F.gelu, *tensors(c, "serial", layer))
        x = x + block.mlp(block.ln_2(x)) + 4 * bottleneck(x, F.relu, *tensors(c, "parallel", layer))
    found: Tensor = model.lm_head(body.ln_f(x))
    return found


def test_the_formula_on_the_residual_stream() -> None:
    model, _, c = compiled()
    inputs = {"input_ids": torch.arange(3, 17).reshape(2, 7)}
    torch.testing.assert_close(run(c, inputs), by_hand(model, inputs, c), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(c, inputs), run(model, inputs), atol=1e-2)


def test_rows_copies_and_threads() -> None:
    _, inputs, c = compiled()
    ids = inputs["input_ids"][:1].expand(3, -1)
    rows = c(input_ids=ids, deltas=["serial", None, {"parallel": 0.5}])[0]
    for row, names in enumerate([{"serial": 1.0}, {}, {"parallel": 0.5}]):
        with c.only(names):
            torch.testing.assert_close(c(input_ids=ids[:1])[0], rows[row : row + 1], atol=1e-6, rtol=1e-6)
    whole = run(c, inputs)
    assert torch.equal(run(copy.deepcopy(c), inputs), whole)
    assert torch.equal(run(pickle.loads(pickle.dumps(c)), inputs), whole)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, whole) for found in pool.map(lambda _: run(c, inputs), range(8)))


def test_torch_compile_keeps_one_graph_and_holds_nothing() -> None:
    _, inputs, c = compiled()
    fast = torch.compile(c.backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(fast, inputs), run(c, inputs))
    held = [stream.entered for stream in _streams(c)]
    assert held and all(value is None for value in held)


def _streams(c: deltaspec.CompiledModel) -> list[Any]:
    forwards = [m.__dict__["forward"].func for m in c.backbone.modules() if "forward" in m.__dict__]
    return [stream for forward in forwards for stream in getattr(forward, "streams", ())]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    _, inputs, c = compiled()
    c.train()

    def gradients() -> list[Tensor]:
        c.zero_grad()
        run(c, inputs).square().mean().backward()
        return [p.grad.clone() for p in c.trainable_parameters() if p.grad is not None]

    for module in c.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients()
    c.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        c.backbone.enable_input_require_grads()
    again = gradients()
    assert len(plain) == len(again) == 16
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_a_site_that_runs_alone_says_so() -> None:
    _, _, c = compiled(PARALLEL)
    with pytest.raises(DeltaSpecError, match=r"h\.0\.mlp\.c_proj runs without transformer\.h\.0\.ln_2"):
        c.backbone.transformer.h[0].mlp(torch.zeros(1, 2, 32))


@pytest.mark.parametrize("rows", [{}, {"deltas": ["parallel", None]}])
def test_a_forward_that_fails_leaves_nothing_to_read(rows: dict[str, Any]) -> None:
    _, inputs, c = compiled(PARALLEL)
    feed_forward = c.backbone.transformer.h[0].mlp

    def fail(*_: Any) -> None:
        raise ArithmeticError

    hook = feed_forward.act.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        c(**inputs, **rows)
    hook.remove()
    with pytest.raises(DeltaSpecError, match=r"h\.0\.mlp\.c_proj runs without transformer\.h\.0\.ln_2"):
        feed_forward(torch.zeros(*inputs["input_ids"].shape, 32))


def test_generate_passes_what_the_model_takes() -> None:
    _, inputs, c = compiled()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = c.backbone.generate(**inputs, **options)
    with torch.no_grad():
        again = c.backbone.generate(**inputs, **options, use_cache=False)
    assert torch.equal(found, again)


class Block(nn.Module):
    """A block that torch.fx can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Part(nn.Module):
    """Gives its norm some positions, before the layer that reads what enters that."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm(x[:, :1])
        out: Tensor = self.down(x) + first
        return out


class Twice(Part):
    """Runs its norm twice before that layer."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.norm(self.norm(x)))
        return out


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
@pytest.mark.parametrize(("kind", "said"), [(Part, "has other positions"), (Twice, "does not run once before")])
def test_where_no_forward_could_be_observed_the_first_one_tells(kind: type[Part], said: str, capture: Any) -> None:
    delta = {**PARALLEL, "params": {"width": 4, "input_of": "norm"}, "target": {"path": "down"}}
    c = deltaspec.compile(kind(), spec(delta), capture=capture)
    with pytest.raises(DeltaSpecError, match=said) as caught:
        c(torch.randn(2, 3, 8))
    assert {finding.code for finding in caught.value.diagnostics} == {"DS585"}


def test_both_captures_where_the_module_read_has_deltas_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(2, 3, 8)
    read = {"name": "read", "method": "parallel_adapter", "params": {"width": 4, "input_of": "norm"},
            "target": {"path": "*.down"}}  # fmt: skip
    others = [
        {"name": "before", "method": "adapter", "params": {"width": 2, "position": "before"},
         "target": {"path": "*.norm"}},
        {"name": "own", "method": "ssf", "target": {"path": "*.norm"}},
    ]  # fmt: skip
    found = []
    for capture in ("symbolic", "modules"):
        c = deltaspec.compile(model, spec(*others, read), capture=capture, example_inputs=x)
        assert c.capture == capture
        stir(c)
        found.append(c(x))
    y = x  # what enters the norm is read before its own deltas change it
    for layer in range(2):
        own = dict(c.deltas["read"].tensors())
        with c.only("before", "own"):
            h = c.backbone[layer](y)
        down = [own[f"{layer}.down.{name}"] for name in ("down", "down_bias", "up", "up_bias")]
        y = h + 4 * bottleneck(y, F.relu, *down)
    torch.testing.assert_close(found[1], y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*found)
