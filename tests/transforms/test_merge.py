"""Merging: a plain model that computes what the attached deltas do, and knows nothing of them."""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Any

import packed_bases
import pytest
import torch
from models import ARCHITECTURES, VOCABULARY, ids
from moved import moved
from packed_bases import UNREADABLE
from torch import Tensor, nn
from transformers import UMT5Config, UMT5ForConditionalGeneration

import deltaspec
from deltaspec.backbone.inputs import call_arguments
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import floats, same, storages
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.testing import check_method


def build(architecture: str, *deltas: dict[str, Any], model: nn.Module | None = None) -> CompiledModel:
    chosen = ARCHITECTURES[architecture]
    spec = {"deltaspec": 1, "deltas": list(deltas)}
    compiled = deltaspec.compile(model or chosen.model(), spec, capture=chosen.capture, example_inputs=chosen.inputs())
    return moved(compiled)


@torch.no_grad()
def run(model: nn.Module, architecture: str) -> list[Tensor]:
    args, kwargs = call_arguments(ARCHITECTURES[architecture].inputs())
    return floats(model(*args, **kwargs))


NORMS = {"name": "norms", "method": "full", "target": {"type": "LayerNorm"}}
LOW = {"name": "low", "method": "lora", "params": {"rank": 2}, "target": {"type": ["Linear", "Conv1D"]}}
BIAS = {"name": "bias", "method": "bitfit", "target": {"type": ["Linear", "Conv1D"]}}
WIDE = {"name": "wide", "method": "adapter", "params": {"width": 2}, "target": {"type": ["Linear", "Conv1D"]}}


def linears(architecture: str, delta: dict[str, Any]) -> dict[str, Any]:
    """Leave out the type that the architecture does not have."""
    if "type" not in delta["target"] or isinstance(delta["target"]["type"], str):
        return delta
    return {**delta, "target": {"type": "Conv1D" if architecture == "gpt2" else "Linear"}}


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("llama", "t5")])
def test_merged_is_close_to_attached_and_exact_where_nothing_is_added(architecture):
    compiled = build(architecture, NORMS, linears(architecture, LOW), linears(architecture, BIAS))
    for names in (("norms",), ("low",), ("bias",), ("norms", "low"), ("norms", "low", "bias")):
        compiled.only(*names)
        # Out of training, as the attached model is: torch picks kernels (a GRU's) by requires_grad.
        attached, merged = run(compiled, architecture), run(compiled.merge().requires_grad_(False), architecture)
        if names == ("norms",):
            assert same(attached, merged)
        for left, right in zip(attached, merged, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    compiled.only("low")
    by_name = run(compiled.detach().merge("low"), architecture)
    assert same(by_name, run(compiled.attach("low").merge(), architecture))


def test_a_merged_model_is_plain_and_owns_its_weights():
    model = ARCHITECTURES["bert"].model()
    compiled = build("bert", NORMS, linears("bert", LOW), linears("bert", BIAS), model=model)
    before = snapshot(compiled, identity=True)
    state = {key: value.clone() for key, value in compiled.state_dict().items()}
    merged = compiled.merge()
    assert type(merged) is type(model)
    assert differences(before, snapshot(compiled, identity=True)) == []
    assert all(torch.equal(value, state[key]) for key, value in compiled.state_dict().items())
    assert not storages(merged) & (storages(compiled) | storages(model))
    own, original = snapshot(merged), snapshot(model)
    changed = {line.split(": ")[0] for line in differences(original, own)}
    assert changed and all("_parameters." in place for place in changed)
    assert list(merged.state_dict()) == list(model.state_dict())
    stream = io.BytesIO()
    torch.save(merged, stream)
    assert b"deltaspec" not in stream.getvalue()


def test_nothing_to_merge():
    """With nothing attached, it is said; where the backbone was trained, that is what is merged."""
    model = ARCHITECTURES["bert"].model()
    with pytest.raises(DeltaSpecError, match="DS417"):
        build("bert", linears("bert", LOW), model=model).detach().merge()


def test_flags_of_the_merged_model_are_those_of_the_original():
    model = ARCHITECTURES["bert"].model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layer.1" in name
    compiled = build("bert", NORMS, linears("bert", LOW), model=model)
    merged = compiled.merge()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == wanted
    trained = model.train()
    assert build("bert", linears("bert", LOW), model=trained).merge().training


def test_a_merged_model_saves_and_loads_as_its_class_does(tmp_path):
    for architecture in ("gpt2", "bert"):
        merged = build(architecture, linears(architecture, LOW)).merge()
        merged.save_pretrained(tmp_path / architecture)
        back = type(merged).from_pretrained(tmp_path / architecture).eval()
        assert same(run(back, architecture), run(merged, architecture))


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "bart"])
def test_a_tied_head_that_is_changed_alone_is_untied_and_stays_so(architecture, tmp_path):
    model = ARCHITECTURES[architecture].model()
    compiled = build(
        architecture, {"name": "head", "method": "lora", "params": {"rank": 2}, "target": "lm_head"}, model=model
    )
    merged = compiled.merge()
    assert torch.equal(merged.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    for left, right in zip(run(merged, architecture), run(compiled, architecture), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    back = type(merged).from_pretrained(tmp_path).eval()
    assert same(run(back, architecture), run(merged, architecture))
    assert model.config.tie_word_embeddings is not False and compiled.config.tie_word_embeddings is not False


def test_a_forward_that_asks_whether_the_head_is_tied_computes_as_before(tmp_path):
    small = {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0}
    model = UMT5ForConditionalGeneration(UMT5Config(vocab_size=VOCABULARY, **small)).eval()
    compiled = build("t5", {"name": "head", "method": "lora", "params": {"rank": 2}, "target": "lm_head"}, model=model)
    merged = compiled.merge()
    for left, right in zip(run(merged, "t5"), run(compiled, "t5"), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert same(run(type(merged).from_pretrained(tmp_path).eval(), "t5"), run(merged, "t5"))


def test_a_tied_weight_trained_together_stays_tied():
    compiled = build("gpt2", {"name": "head", "method": "full", "target": "lm_head", "params": {"tied": "together"}})
    merged = compiled.merge()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert same(run(merged, "gpt2"), run(compiled, "gpt2"))


def test_what_cannot_be_merged_is_named_with_what_can():
    compiled = build("bert", linears("bert", LOW), linears("bert", WIDE))
    with pytest.raises(DeltaSpecError, match=r"(?s)DS435.*'wide' cannot be merged.*c\.merge\('low'\)"):
        compiled.merge()
    assert isinstance(compiled.merge("low"), type(compiled.backbone))
    norms = build("llama", {"name": "bias", "method": "bitfit", "target": {"role": "norm"}})
    with pytest.raises(DeltaSpecError, match=r"DS435.*no place for a bias"):
        norms.merge()


def test_a_missing_bias_is_added_where_the_module_has_a_place():
    compiled = build("llama", {"name": "bias", "method": "bitfit", "target": {"role": "attn.q"}})
    merged = compiled.merge()
    new = [key for key in merged.state_dict() if key not in compiled.backbone.state_dict()]
    assert new == [f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)]
    for left, right in zip(run(merged, "llama"), run(compiled, "llama"), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_rounded_once(dtype):
    model = ARCHITECTURES["llama"].model().to(dtype)
    target = "model.layers.0.self_attn.q_proj"
    compiled = build("llama", {"name": "low", "method": "lora", "params": {"rank": 3}, "target": target}, model=model)
    tensors = dict(compiled.deltas["low"].tensors())
    wide = torch.float32 if dtype is torch.bfloat16 else torch.float64
    assert {value.dtype for value in tensors.values()} == {wide}
    with torch.no_grad():
        update = tensors[f"{target}.up"] @ tensors[f"{target}.down"]
        exact = model.get_submodule(target).weight.to(wide) + 16 / 3 * update
    merged = compiled.merge().get_submodule(target).weight
    assert merged.dtype is dtype and torch.equal(merged, exact.to(dtype))


def test_a_chain_merges_in_its_order():
    target = "bert.encoder.layer.0.attention.self.query"
    deltas = (
        {"name": "copy", "method": "full", "target": target},
        {"name": "one", "method": "lora", "params": {"rank": 2}, "target": target},
        {"name": "two", "method": "lora", "params": {"rank": 3}, "target": target},
    )
    compiled = build("bert", *deltas)
    tensors = {name: dict(delta.tensors()) for name, delta in compiled.deltas.items()}
    with torch.no_grad():
        expected = tensors["copy"][f"{target}.weight"].clone()
        for name, rank in (("one", 2), ("two", 3)):
            expected += 16 / rank * tensors[name][f"{target}.up"] @ tensors[name][f"{target}.down"]
    torch.testing.assert_close(compiled.merge().get_submodule(target).weight, expected, rtol=1e-5, atol=1e-6)


def test_the_weights_of_a_chain_are_rounded_once():
    model = ARCHITECTURES["llama"].model().bfloat16()
    target = "model.layers.0.self_attn.q_proj"
    deltas = [{"name": n, "method": "lora", "params": {"rank": r}, "target": target} for n, r in (("a", 2), ("b", 4))]
    compiled = build("llama", *deltas, model=model)
    compiled.only({"a": 1.0, "b": 0.5})
    exact = model.get_submodule(target).weight.detach().float()
    for name, scale in (("a", 8.0), ("b", 2.0)):
        tensors = {key: value.detach() for key, value in compiled.deltas[name].tensors()}
        exact = exact + scale * tensors[f"{target}.up"] @ tensors[f"{target}.down"]
    merged = compiled.merge().get_submodule(target).weight
    assert float((merged != exact.bfloat16()).float().mean()) < 0.01  # two roundings: a fifth of them


def test_a_delta_named_twice_is_folded_once():
    compiled = build("bert", linears("bert", LOW))
    assert same(run(compiled.merge("low", "low"), "bert"), run(compiled.merge("low"), "bert"))


def test_deltas_that_exclude_each_other_do_not_merge():
    compiled = build("bert", NORMS, {**NORMS, "name": "others", "attached": False})
    with pytest.raises(DeltaSpecError, match="DS436"):
        compiled.merge("norms", "others")


def test_a_merged_model_can_be_compiled_again():
    merged = build("bert", linears("bert", LOW)).merge()
    again = build("bert", linears("bert", LOW), model=merged)
    assert not same(run(again, "bert"), run(merged, "bert"))
    assert same(run(again.detach(), "bert"), run(merged, "bert"))


def test_hooks_of_another_library_run_on_the_merged_weights():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = ARCHITECTURES["bert"].model()
    place = "bert.encoder.layer.0.intermediate.dense"
    add_hook_to_module(model.get_submodule(place), ModelHook())
    compiled = build("bert", {"name": "low", "method": "lora", "params": {"rank": 2}, "target": place}, model=model)
    with torch.no_grad():
        for parameter in compiled.deltas["low"].parameters():
            parameter.mul_(5)
    attached = run(compiled, "bert")
    merged = compiled.merge()
    for left, right in zip(run(merged, "bert"), attached, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attached[0], run(model, "bert")[0], atol=1e-3)


def test_generation_of_merged_and_attached_agrees():
    compiled = build("gpt2", linears("gpt2", LOW))
    options = {"input_ids": ids(2, 4), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(compiled.generate(**options), compiled.merge().generate(**options))


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("method", ["lora", "loha", "hira", "ia3"])
def test_embeddings_with_options_keep_the_contract(method, options):
    """Merged, a limit of the rows' norms would act on what a delta adds: refused there, but where it acts attached."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(9, 6, **options)).eval(), torch.tensor([[1, 2, 3], [4, 1, 2]])
    check_method(method, model, tokens, target="0")
    if "max_norm" in options:
        spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": "0"}]}
        merging = nullcontext() if method == "hira" else pytest.raises(DeltaSpecError, match="DS435.*limits its rows")
        with merging:
            deltaspec.compile(model, spec, example_inputs=tokens).merge()


@pytest.mark.parametrize("form", UNREADABLE)
def test_codes_that_only_their_class_can_read_stay_what_they_are(form: str) -> None:
    spec = {"deltaspec": 1, "deltas": [{**delta, "target": {"path": ["a", "b"]}} for delta in (LOW, BIAS)]}
    compiled = deltaspec.compile(packed_bases.net(UNREADABLE[form]), spec, example_inputs=packed_bases.inputs())
    with pytest.raises(DeltaSpecError, match="only its class can read") as error:
        compiled.merge("low")
    assert error.value.diagnostics[0].code == "DS435"
    with torch.no_grad():
        next(compiled.deltas["bias"].parameters()).add_(1.0)
    merged, _ = compiled.merge("bias"), compiled.only("bias")
    assert torch.allclose(merged(packed_bases.inputs()), compiled(packed_bases.inputs()), atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_merged(value):
    compiled = build("bert", {"name": "d", "method": "lora", "params": {"rank": 2}, "target": {"type": "Linear"}})
    parameter = next(compiled.trainable_parameters())
    with torch.no_grad():
        parameter[0, 0] = value
    with pytest.raises(DeltaSpecError, match="DS520.*NaN or infinite"):
        compiled.merge("d")


def test_a_weight_that_overflows_is_not_merged():
    model = nn.Sequential(nn.Linear(4, 4)).half()
    delta = {"name": "d", "method": "lora", "params": {"rank": 2}, "target": "0"}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})
    with torch.no_grad():
        for parameter in compiled.trainable_parameters():
            parameter.fill_(1e3)  # float32: the product fits there
    with pytest.raises(DeltaSpecError, match="DS520.*0.weight would have NaN or infinite values, in float16"):
        compiled.merge("d")
