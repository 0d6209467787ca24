"""Beside torch: compilation, export, casts, state dicts and pickles of compiled transformers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import ARCHITECTURES, TRANSFORMERS
from two_deltas import build, disturb, logits, spec

import deltaspec
from deltaspec.compiler.compiled import CompiledModel


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_torch_compile_follows_the_active_set(architecture):
    torch._dynamo.reset()
    compiled = build(architecture)
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    for names in (("low", "wide"), (), ("wide",), ("low", "wide"), ()):
        compiled.only(*names)
        torch.testing.assert_close(logits(fast, architecture), logits(compiled, architecture), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_torch_compile_of_the_backbone_trains():
    torch._dynamo.reset()
    compiled = build("bert")
    fast = torch.compile(compiled.backbone, fullgraph=True, backend="aot_eager")
    grads = []
    for which in (compiled.backbone, fast):
        compiled.zero_grad()
        which(**ARCHITECTURES["bert"].inputs()).logits.pow(2).sum().backward()
        grads.append([p.grad.clone() for p in compiled.trainable_parameters()])
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_export(architecture):
    inputs = ARCHITECTURES[architecture].inputs()
    cache = {} if architecture in ("bert", "vit") else {"use_cache": False}
    compiled = build(architecture)
    results = []
    for names in (("low", "wide"), ()):
        compiled.only(*names)
        program = compiled.export((), {**inputs, **cache}, strict=False)
        with torch.no_grad():
            out = program.module()(**inputs, **cache).logits
        torch.testing.assert_close(out, logits(compiled, architecture, **cache), rtol=1e-5, atol=1e-6)
        results.append(out)
    assert not torch.allclose(*results, atol=1e-5)


# Dtypes and states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_half_precision_backbones_give_half_precision_and_keep_float32_deltas(architecture, dtype, tmp_path):
    model = ARCHITECTURES[architecture].model().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[architecture].inputs().items()}
    compiled = deltaspec.compile(model, spec(architecture))
    with torch.no_grad():
        reference = model(**inputs).logits
        assert torch.equal(compiled(**inputs).logits, reference)
        disturb(compiled)
        out = compiled(**inputs).logits
        assert out.dtype is dtype and not torch.equal(out, reference)
        assert {p.dtype for p in compiled.trainable_parameters()} == {torch.float32}
        compiled.save(tmp_path)
        assert torch.equal(deltaspec.restore(model, tmp_path)(**inputs).logits, out)
    compiled(**inputs).logits.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in compiled.trainable_parameters())


@pytest.mark.parametrize("cast", [lambda c: c.half(), lambda c: c.to(torch.bfloat16), lambda c: c.double()])
def test_casting_a_compiled_model_casts_all_of_it(cast):
    model = ARCHITECTURES["bert"].model()
    compiled = build("bert", model)
    wanted = logits(compiled, "bert")
    assert cast(compiled) is compiled
    dtype = compiled.backbone.dtype
    assert {p.dtype for p in compiled.parameters()} == {dtype}
    out = logits(compiled, "bert")
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), wanted, rtol=0.1, atol=0.05)
    assert model.dtype is torch.float32
    compiled.detach()
    assert torch.equal(logits(compiled, "bert"), logits(cast(copy.deepcopy(model)), "bert"))


def test_casting_the_backbone_is_followed_too():
    compiled = build("gpt2")
    compiled.backbone.to(torch.float64)
    assert logits(compiled, "gpt2").dtype is torch.float64
    assert {p.dtype for p in compiled.parameters()} == {torch.float64}


def test_autocast():
    compiled = build("llama")
    plain = logits(compiled, "llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = compiled(**ARCHITECTURES["llama"].inputs()).logits
        cast.float().pow(2).sum().backward()
    assert cast.dtype is torch.bfloat16
    torch.testing.assert_close(cast.float(), plain, rtol=0.1, atol=0.05)
    assert all(p.grad is not None for p in compiled.trainable_parameters())


def test_inference_mode_leaves_the_model_fit_for_training():
    compiled = build("llama")
    with torch.inference_mode():
        compiled.detach()
        first = compiled(**ARCHITECTURES["llama"].inputs()).logits
        compiled.attach()
        second = compiled(**ARCHITECTURES["llama"].inputs()).logits
        assert first.is_inference() and not torch.equal(first, second)
    compiled(**ARCHITECTURES["llama"].inputs()).logits.sum().backward()
    assert all(p.grad is not None for p in compiled.trainable_parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_strict_and_followed(assign):
    compiled, other = build("bert"), build("bert")
    disturb(other, 0.5)
    wanted = logits(other, "bert")
    assert not torch.equal(logits(compiled, "bert"), wanted)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    result = compiled.load_state_dict(state, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(logits(compiled, "bert"), wanted)
    compiled.detach("low")
    other.detach("low")
    assert torch.equal(logits(compiled, "bert"), logits(other, "bert"))
    key = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        compiled.load_state_dict({k: v for k, v in state.items() if k != key}, strict=True)


def test_the_keys_of_the_state_do_not_depend_on_what_is_attached():
    compiled = build("t5")
    attached = list(compiled.state_dict())
    backbone = list(compiled.backbone.state_dict())
    compiled.detach()
    assert list(compiled.state_dict()) == attached and list(compiled.backbone.state_dict()) == backbone
    original = list(ARCHITECTURES["t5"].model().state_dict())
    assert [key for key in backbone if "deltaspec" not in key] == original
    assert attached == [f"backbone.{key}" for key in backbone]


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_pickling(architecture, way):
    compiled = build(architecture)
    compiled.only("wide")
    expected = logits(compiled, architecture)
    if way == "pickle":
        back = pickle.loads(pickle.dumps(compiled))
    else:
        stream = io.BytesIO()
        torch.save(compiled, stream)
        stream.seek(0)
        back = torch.load(stream, weights_only=False)
    assert isinstance(back, CompiledModel) and back.attached == ("wide",) and back.capture == compiled.capture
    assert torch.equal(logits(back, architecture), expected)
    for names in ((), ("low",), ("low", "wide")):
        back.only(*names)
        compiled.only(*names)
        assert torch.equal(logits(back, architecture), logits(compiled, architecture))
    flags = {n: p.requires_grad for n, p in compiled.detach().named_parameters()}
    assert {n: p.requires_grad for n, p in back.detach().named_parameters()} == flags
