"""Hosts in which every row has tensors of its own: convolutions, norms, weights that are read without a call."""

from __future__ import annotations

import itertools

import pytest
import torch
from inside import left
from mixed_rows import ROWS, alone, batch, build, close, entry, ids
from models import Traceable
from tiny_models import BUILDERS, base
from torch import nn

import deltaspec
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError


def test_half_precision_backbones_mix_float32_deltas():
    compiled = build(BUILDERS["llama"]().eval().bfloat16(), entry("a", "lora"), entry("b", "adapter"))
    given = batch("llama")
    with torch.no_grad():
        mixed = compiled(**given, deltas=["a", "b", None, ("a", "b"), "b"]).logits
        assert mixed.dtype is torch.bfloat16
        for row, deltas in enumerate(["a", "b", None, ("a", "b"), "b"]):
            assert close(mixed[row].float(), alone(compiled, given, row, deltas).float(), 5e-2)


def test_images_convolutions_and_norms_mix():
    model = Traceable().eval()
    pairs = itertools.product(["lora", "bitfit", "ssf", "ia3", "loha", "oft", "hira", "full"], "ab")
    places = {"lora": ["conv", "up", "head"], "bitfit": ["conv", "bn", "norm"], "ssf": ["conv", "bn", "norm", "up"],
              "oft": ["up"], "full": ["conv", "norm"]}  # fmt: skip
    compiled = build(model, *(entry(f"{m}_{n}", m, places.get(m, ["conv"])) for m, n in pairs))
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for method in places.keys() | {"ia3", "loha", "hira"}:
            rows = [f"{method}_a", None, f"{method}_b", f"{method}_b", None, f"{method}_a"]
            mixed = compiled(x, deltas=rows)
            for row, name in enumerate(rows):
                with compiled.only(name) if name else compiled.detached():
                    assert close(mixed[row], compiled(x[row : row + 1])[0]), (method, name)


@pytest.mark.parametrize("site", ["layers.0.linear1", "layers.1.self_attn.out_proj"])
def test_hosts_that_read_weights_without_a_call_take_rows(site):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(4, 5, 16)
    deltas = [entry(name, "lora", site) for name in "ab"]
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, example_inputs=x)
    disturb(compiled)
    rows = ["a", None, {"b": 0.5}, ("a", "b")]
    with torch.no_grad():
        mixed = compiled(x, deltas=rows)
        for row, names in enumerate([("a",), (), {"b": 0.5}, ("a", "b")]):
            with compiled.only(names) if isinstance(names, dict) else compiled.only(*names):
                assert close(mixed[row], compiled(x[row : row + 1])[0])


def test_statistics_of_a_batch_are_refused():
    compiled = build(Traceable().eval(), entry("a", "full", "bn"))
    with pytest.raises(DeltaSpecError, match="DS441.*statistics"):
        compiled(torch.randn(2, 3, 8, 8), deltas=["a", None])


def test_hosts_that_run_once_a_delta_must_write_no_cache():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    compiled = build(model, entry("a", "lora", "**.dt_proj"))
    with torch.no_grad():
        with pytest.raises(DeltaSpecError, match="DS442.*cache"):
            compiled(ids(), deltas=["a", None, "a", None, "a"])
        mixed = compiled(ids(), deltas=["a", None, "a", None, "a"], use_cache=False).logits
        for row, deltas in enumerate(["a", None]):
            assert close(mixed[row], alone(compiled, {"input_ids": ids()}, row, deltas))


def test_rows_first_used_in_inference_mode_train_afterwards():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    with torch.inference_mode():
        compiled(ids(), deltas=["a", None, "b", "a", None])
    compiled(ids(), deltas=["a", None, "b", "a", None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.trainable_parameters("a", "b"))


def test_rows_under_autocast():
    compiled = build(base("llama"), entry("a", "adapter"), entry("b", "lora"))
    rows = ["a", None, "b", "a", None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = compiled(ids(), deltas=rows).logits
        for row, deltas in enumerate(rows):
            assert close(mixed[row].float(), alone(compiled, {"input_ids": ids()}, row, deltas).float(), 5e-2)


@pytest.mark.parametrize("method", ["lora", "full", "loha", "trainable_tokens"])
def test_padding_has_no_gradient_in_a_mixed_batch_either(method):
    model = nn.Sequential(nn.Embedding(40, 8, padding_idx=0), nn.Linear(8, 8)).eval()
    compiled = build(model, entry("a", method, "0"), entry("b", "lora", "1"))
    tokens = torch.randint(0, 3, (4, 6), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(4, 6, 8)
    (compiled(tokens, deltas=["a", "b", ("a", "b"), None]) * weights).sum().backward()
    mixed = [p.grad for p in compiled.trainable_parameters("a")]
    compiled.zero_grad()
    for row, names in ((0, ("a",)), (2, ("a", "b"))):
        with compiled.only(*names):
            (compiled(tokens[row : row + 1])[0] * weights[row]).sum().backward()
    for found, right in zip(mixed, compiled.trainable_parameters("a"), strict=True):
        torch.testing.assert_close(found, right.grad)


def test_stacking_leaves_no_second_copy_of_the_deltas():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    compiled(ids(), deltas=ROWS)
    assert left(compiled) == 0
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    view = compiled.view()
    view(ids(), deltas=ROWS)
    view(ids(), deltas=ROWS)  # no kernel can still be reading what was left
    assert left(compiled) == 0
