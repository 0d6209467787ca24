"""prefix: against PEFT's, against the formula in plain torch, and in everything a model does with its attention."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from prefixes import cache_of, compiled, distilbert, own, qwen3, vit
from prompt_models import BASIC, DECODERS, bart, bert, build, gpt2, llama, roberta, t5, tokens
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
)

import deltaspec
from deltaspec.compiler.restore import restore
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.diagnostics.findings import DeltaSpecError


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("make", "heads"), [(gpt2, 4), (llama, 2), (qwen3, 2)])
def test_equals_a_cache_that_was_there_before(make: Any, heads: int, implementation: str) -> None:
    model = build(make)
    model.set_attn_implementation(implementation)
    c, ids = compiled(model, tokens=3), tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = torch.arange(7).expand(2, -1)
    reference = model(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(2, 3), mask], dim=1),
        position_ids=positions,
        past_key_values=cache_of(c, model, 2, heads),
    )
    out = c(input_ids=ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(out.logits[mask == 1], reference.logits[mask == 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out.logits, model(input_ids=ids, attention_mask=mask).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "heads", "reparametrised"), [(gpt2, 4, False), (gpt2, 4, True), (llama, 2, False), (llama, 2, True)]
)
def test_equals_peft(make: Any, heads: int, reparametrised: bool) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = build(make)
    ids = tokens()
    params: dict[str, Any] = {"reparametrisation": "mlp", "width": 16} if reparametrised else {}
    if reparametrised and make is llama:  # the width of grouped keys
        params["prefix_width"] = 16
    c = compiled(model, tokens=3, **params)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=reparametrised, encoder_hidden_size=16
    )
    peft_model = get_peft_model(copy.deepcopy(model), config).eval()
    encoder = peft_model.prompt_encoder["default"]
    names = ("key", "value")
    size = heads * 8
    shared = {key.rpartition(".")[2]: value for key, value in c.deltas["p0"].tensors()}
    with torch.no_grad():
        if reparametrised:
            encoder.embedding.weight.copy_(c.deltas["p0"].tensor(f"prefix_3x{heads * 8}x16"))
            encoder.transform[0].weight.copy_(shared["down"])
            encoder.transform[0].bias.copy_(shared["down_bias"].normal_())
        for layer, planned in enumerate(c.plan.sites):
            tensors = own(c, planned.fqn)
            for number, name in enumerate(names):
                part = slice((2 * layer + number) * size, (2 * layer + number + 1) * size)
                if reparametrised:
                    encoder.transform[2].weight[part] = tensors[f"{name}_up"]
                    encoder.transform[2].bias[part] = tensors[f"{name}_bias"].normal_()
                else:
                    encoder.embedding.weight[:, part] = tensors[name]
    # PEFT's prefix takes the first positions; ours takes none.
    positions = torch.arange(3, 10).expand(2, -1)
    mask = torch.ones_like(ids)
    out = c(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids)
    reference = peft_model(input_ids=ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(out.logits, reference.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, reference.loss, atol=1e-6, rtol=1e-5)
    out.loss.backward()
    reference.loss.backward()
    theirs = encoder.transform[2].weight.grad if reparametrised else encoder.embedding.weight.grad.T
    ours = [own(c, p.fqn)[f"{n}_up" if reparametrised else n].grad for p in c.plan.sites for n in names]
    expected = torch.cat(ours) if reparametrised else torch.cat([g.T for g in ours])
    torch.testing.assert_close(expected, theirs, atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_the_formula_on_bert(implementation: str) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**BASIC, attn_implementation=implementation)).eval()
    c, ids = compiled(model, {"target": "encoder.layer.0", "params": {"tokens": 3}}), tokens()
    assert [site.fqn for site in c.plan.sites] == ["encoder.layer.0.attention.self"]
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    layer = model.encoder.layer[0]
    x = model.embeddings(input_ids=ids)
    tensors = own(c, "encoder.layer.0.attention.self")

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (4, 8)).transpose(1, 2)

    q = heads(layer.attention.self.query(x))
    k = heads(torch.cat([tensors["key"].expand(2, -1, -1), layer.attention.self.key(x)], dim=1))
    v = heads(torch.cat([tensors["value"].expand(2, -1, -1), layer.attention.self.value(x)], dim=1))
    seen = torch.cat([mask.new_ones(2, 3), mask], dim=1)[:, None, None]
    weights = (q @ k.mT / math.sqrt(8)).masked_fill(seen == 0, -math.inf).softmax(-1)
    context = (weights @ v).transpose(1, 2).flatten(-2)
    hidden = layer.attention.output(context, x)
    hidden = layer.output(layer.intermediate(hidden), hidden)
    wanted = c(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(wanted, hidden, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_equals_the_formula_on_t5_with_its_position_bias() -> None:
    model = build(t5)
    model.set_attn_implementation("eager")
    site = "encoder.block.0.layer.0.SelfAttention"
    c = compiled(model, {"target": site, "params": {"tokens": 3}})
    attention, x = model.get_submodule(site), torch.randn(2, 7, 32)
    tensors = own(c, site)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (4, 8)).transpose(1, 2)

    k = heads(torch.cat([tensors["key"].expand(2, -1, -1), attention.k(x)], dim=1))
    v = heads(torch.cat([tensors["value"].expand(2, -1, -1), attention.v(x)], dim=1))
    scores = heads(attention.q(x)) @ k.mT
    scores[..., 3:] += attention.compute_bias(7, 7)
    expected = attention.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    out, _, weights = c.get_submodule(f"backbone.{site}")(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert weights.shape == (2, 4, 7, 7)


@torch.no_grad()
@pytest.mark.parametrize("make", [*DECODERS, qwen3, bert, roberta, distilbert, t5, bart, vit])
def test_acts_everywhere_and_leaves_without_a_trace(make: Any) -> None:
    model = build(make)
    before = snapshot(model, identity=True)
    c = compiled(model, {"params": {"tokens": 3}}, {"params": {"tokens": 2, "reparametrisation": "mlp", "width": 8}})
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 16, 16)} if make is vit else {"input_ids": tokens()}
    if make in (t5, bart):
        inputs["decoder_input_ids"] = tokens(2, 4)
    bare = model(**inputs)[0]
    seen: dict[tuple[str, ...], Tensor] = {}
    for active in (("p0", "p1"), ("p1",), (), ("p0",), ("p1", "p0"), ()):
        c.only(*active)
        out = c(**inputs)[0]
        assert torch.equal(out, seen.setdefault(tuple(sorted(active)), out))
        assert torch.equal(out, bare) == (not active)
        assert c.config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert len({out.abs().sum().item() for out in seen.values()}) == 4
    assert not any({"forward", "_deltaspec_route"} & set(module.__dict__) for module in c.backbone.modules())
    assert not differences(before, snapshot(model, identity=True))


@torch.no_grad()
def test_self_and_cross_attention_by_role() -> None:
    for make in (t5, bart):
        model = build(make)
        inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 4)}
        bare = model(**inputs)
        own_roles = {"self": "attn", "cross": "cross_attn"}
        for name, role in own_roles.items():
            c = compiled(model, {"target": {"role": role}, "params": {"tokens": 3}})
            assert len(c.plan.sites) == (4 if name == "self" else 2)
            out = c(**inputs)
            assert not torch.allclose(out.logits, bare.logits, atol=1e-4)
            same = torch.equal(out.encoder_last_hidden_state, bare.encoder_last_hidden_state)
            assert same == (name == "cross")


@pytest.mark.parametrize("make", [*DECODERS, t5, bart])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generation_with_a_cache_equals_without(make: Any, how: dict[str, Any]) -> None:
    c, ids = compiled(build(make), {"params": {"tokens": 3}}, {"params": {"tokens": 2}}), tokens()
    ids[0, :3] = 0
    mask = (ids != 0).long()
    settings = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **how}
    found = []
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        found.append(c.generate(ids, **settings, **cache))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    if not how:  # padding does not matter
        alone = c.generate(ids[:1, 3:], **{**settings, "attention_mask": mask[:1, 3:]})
        assert torch.equal(found[0][:1, -5:], alone[:, -5:])


@torch.no_grad()
def test_padding_on_the_right_and_outputs() -> None:
    model = build(llama)
    model.set_attn_implementation("eager")
    c, ids = compiled(model, tokens=3), tokens()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    out = c(input_ids=ids, attention_mask=mask, labels=ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits[:1, :4], c(input_ids=ids[:1, :4]).logits, atol=1e-5, rtol=1e-5)
    assert out.logits.shape == (2, 7, 90)
    assert [weights.shape for weights in out.attentions] == [(2, 4, 7, 7)] * 2
    assert (out.attentions[0].sum(-1) < 1).all()  # the rest is on the prefix
    assert out.past_key_values.get_seq_length() == 7


@pytest.mark.parametrize("make", [llama, bert, t5])
def test_training_reaches_the_prefix_alone(make: Any) -> None:
    model = build(make)
    c, ids = compiled(model, tokens=3, reparametrisation="mlp", width=8), tokens()
    c.train()
    for module in c.backbone.modules():  # recomputation draws anew
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    plain = _gradients(c, ids)
    assert set(plain) == {name for name, _ in c.named_parameters() if "deltaspec" in name}
    for reentrant in (True, False):
        c.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, gradient in _gradients(c, ids).items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)
    optimizer = torch.optim.Adam(c.trainable_parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = c(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def _gradients(c: Any, ids: Tensor) -> dict[str, Tensor]:
    c.zero_grad()
    c(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in c.named_parameters() if p.grad is not None}


def test_the_reparametrisation_folds_away(tmp_path: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(gpt2).to(dtype)
        override = [{"match": "transformer.h.1.attn", "params": {"tokens": 2}}]
        params = {"tokens": 4, "reparametrisation": "mlp", "width": 8}
        c, ids = compiled(model, {"params": params, "overrides": override}, {"params": {"tokens": 1}}), tokens()
        simple = c.simplified("p0")
        assert [site.tensors[0].shape for site in simple.plan["p0"].sites] == [(4, 32), (2, 32)]
        assert simple.plan["p0"].trainable == 2 * 32 * (4 + 2)
        assert torch.equal(simple(input_ids=ids).logits, c(input_ids=ids).logits)
        assert c(input_ids=ids).logits.dtype == dtype
        simple.save(tmp_path)
        assert torch.equal(restore(model, tmp_path)(input_ids=ids).logits, c(input_ids=ids).logits)


def test_copies_and_files(tmp_path: Any) -> None:
    model = build(llama)
    c, ids = compiled(model, tokens=3, reparametrisation="mlp", width=8), tokens()
    out = c(input_ids=ids).logits
    for twin in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        assert torch.equal(twin(input_ids=ids).logits, out)
        with torch.no_grad():
            for parameter in twin.trainable_parameters():
                parameter.zero_()
        assert torch.equal(c(input_ids=ids).logits, out)
    c.save(tmp_path)
    assert torch.equal(restore(model, tmp_path)(input_ids=ids).logits, out)


def test_torch_compile_makes_one_graph() -> None:
    c, ids = compiled(build(llama), {"params": {"tokens": 3}}, {"params": {"tokens": 2}}), tokens()
    torch._dynamo.reset()
    fast = torch.compile(c.backbone, fullgraph=True, backend="aot_eager")
    for active in (("p0", "p1"), ("p1",), ()):
        c.only(*active)
        torch.testing.assert_close(fast(input_ids=ids).logits, c(input_ids=ids).logits)


@torch.no_grad()
def test_together_with_other_methods() -> None:
    model, ids = build(gpt2), tokens()
    lora = {"name": "l", "method": "lora", "target": {"role": "attn.qkv"}}
    deltas = [{"name": "p", "method": "prefix", "params": {"tokens": 3}}, lora, {"name": "s", "method": "soft_prompt"}]
    deltas[2]["params"] = {"tokens": 4}
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas})
    for parameter in c.deltas["l"].parameters():
        parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    out = c(input_ids=ids).logits
    merged = deltaspec.compile(c.merge("l"), {"deltaspec": 1, "deltas": [deltas[0], deltas[2]]})
    for name in ("p", "s"):
        merged.deltas[name].load_state_dict(c.deltas[name].state_dict())
    torch.testing.assert_close(merged(input_ids=ids).logits, out, atol=1e-5, rtol=1e-5)
    assert torch.equal(c.generate(ids, max_new_tokens=4), c.generate(ids, max_new_tokens=4, use_cache=False))


def test_a_model_without_a_role_map_has_its_attention_for_a_target() -> None:
    model = build(llama)
    model.config.model_type = "nobody-knows-this"
    plan = deltaspec.plan(model, {"deltaspec": 1, "deltas": [{"name": "p", "method": "prefix"}]})
    assert [site.fqn for site in plan.sites] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    with pytest.raises(DeltaSpecError, match=r"DS350.*roles of nobody-knows-this are not known"):
        deltaspec.plan(model, {"deltaspec": 1, "deltas": [{"name": "p", "method": "lora"}]})
