"""prefix with positions counted: beside plain transformers with the same numbers, in all that a model does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from prefixes import cache_of, compiled, own, qwen3, vit
from prompt_models import DECODERS, bart, build, gpt2, llama, roberta, t5, tokens
from transformers import MistralConfig, MistralForCausalLM

import deltaspec
from deltaspec.compiler.restore import restore
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.diagnostics.findings import DeltaSpecError

COUNTED = {"tokens": 3, "positions": "counted"}


def of_decoder(model: Any) -> dict[str, Any]:
    """Return the target that leaves an encoder out."""
    path = {"t5": "decoder.**", "bart": "model.decoder.**"}.get(model.config.model_type)
    return {"target": {"path": path, "role": "attn"}} if path else {}


def counted(model: Any, *more: dict[str, Any]) -> Any:
    return compiled(model, {"params": COUNTED, **of_decoder(model)}, *more)


@torch.no_grad()
@pytest.mark.parametrize(("make", "heads"), [(gpt2, 4), (llama, 2), (qwen3, 2)])
def test_tokens_are_numbered_behind_the_prefix(make: Any, heads: int) -> None:
    model = build(make)
    c, plain, ids = counted(model), compiled(model, tokens=3), tokens()
    plain.deltas["p0"].load_state_dict(c.deltas["p0"].state_dict())
    positions = torch.arange(3, 10).expand(2, -1)
    assert torch.equal(c(input_ids=ids).logits, plain(input_ids=ids, position_ids=positions).logits)
    assert not torch.allclose(c(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4)
    cache = cache_of(c, model, 2, heads)
    torch.testing.assert_close(c(input_ids=ids).logits, model(input_ids=ids, past_key_values=cache).logits)
    mine = torch.tensor([[0, 1, 2, 5, 6, 7, 9]]).expand(2, -1)
    expected = plain(input_ids=ids, position_ids=mine + 3).logits
    assert torch.equal(c(input_ids=ids, position_ids=mine).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True])
def test_a_window_moves_past_the_prefix(implementation: str, left: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = MistralConfig(**sizes, vocab_size=90, num_key_value_heads=2, sliding_window=4, pad_token_id=0)
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    c, ids = counted(model), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if left else 1
    long = torch.cat([mask.new_ones(2, 3), mask], dim=1)
    out = c(input_ids=ids, attention_mask=mask).logits
    reference = model(input_ids=ids, attention_mask=long, past_key_values=cache_of(c, model, 2, 2)).logits
    torch.testing.assert_close(out[mask == 1], reference[mask == 1], atol=1e-5, rtol=1e-5)
    steps = c(input_ids=ids[:, :1], attention_mask=mask[:, :1], use_cache=True)
    for place in range(1, 9):
        past = steps.past_key_values
        steps = c(input_ids=ids[:, place : place + 1], attention_mask=mask[:, : place + 1], past_key_values=past)
    torch.testing.assert_close(steps.logits[:, 0], out[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [*DECODERS, roberta, t5, bart])
def test_detaching_leaves_no_trace(make: Any) -> None:
    model = build(make)
    before = snapshot(model, identity=True)
    c = counted(model)
    inputs = {"input_ids": tokens()} | ({"decoder_input_ids": tokens(2, 4)} if make in (t5, bart) else {})
    bare, out = model(**inputs)[0], c(**inputs)[0]
    assert not torch.allclose(out, bare, atol=1e-4)
    with c.detached():
        assert torch.equal(c(**inputs)[0], bare)
    assert torch.equal(c(**inputs)[0], out)
    c.detach()
    assert not any("forward" in module.__dict__ for module in c.backbone.modules())
    assert not differences(before, snapshot(model, identity=True))


@pytest.mark.parametrize("make", [*DECODERS, t5, bart])
def test_generation_with_a_cache_equals_without(make: Any) -> None:
    uncounted = {"params": {"tokens": 2}}
    c, ids = counted(build(make), uncounted, {"method": "soft_prompt", "params": {"tokens": 2}}), tokens()
    ids[0, :3] = 0
    settings = {"attention_mask": (ids != 0).long(), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = [c.generate(ids, **settings, **cache) for cache in ({}, {"use_cache": False})]
    assert torch.equal(*found)
    c.only("p0", "p1")
    found = [c.generate(ids, **settings, **cache) for cache in ({}, {"use_cache": False})]
    assert torch.equal(*found)
    assert torch.equal(found[0], c.generate(ids, **settings, cache_implementation="static"))


@torch.no_grad()
def test_two_counts_add_up_and_the_bias_of_t5_goes_with_them() -> None:
    for make in (llama, t5):
        model = build(make)
        c = counted(model, {"params": {"tokens": 2, "positions": "counted"}, **of_decoder(model)})
        whole = compiled(model, {"params": {"tokens": 5, "positions": "counted"}, **of_decoder(model)})
        for site in (site.fqn for site in whole.plan.sites):
            parts = [own(c, site, name) for name in ("p0", "p1")]
            for name, tensor in own(whole, site).items():
                tensor.copy_(torch.cat([part[name] for part in parts]))
        inputs = {"input_ids": tokens()} | ({"decoder_input_ids": tokens(2, 4)} if make is t5 else {})
        torch.testing.assert_close(c(**inputs).logits, whole(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_copies_files_and_the_reparametrisation(tmp_path: Path) -> None:
    model, ids = build(llama), tokens()
    c = compiled(model, {"params": COUNTED | {"reparametrisation": "mlp", "width": 8}})
    out = c(input_ids=ids).logits
    for twin in (copy.deepcopy(c), pickle.loads(pickle.dumps(c)), c.simplified("p0")):
        assert torch.equal(twin(input_ids=ids).logits, out)
    c.save(tmp_path)
    assert torch.equal(restore(model, tmp_path)(input_ids=ids).logits, out)


def test_torch_compile_makes_one_graph() -> None:
    c, ids = counted(build(llama)), tokens()
    torch._dynamo.reset()
    fast = torch.compile(c.backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(input_ids=ids).logits, c(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("make", "delta", "match"),
    [
        (bart, {"target": {"role": "cross_attn"}}, "attends to what an encoder gives"),
        (vit, {}, "no model of transformers that takes input_ids"),
        (gpt2, {"params": {"tokens": 64, "positions": "counted"}}, "64 tokens leave no room in the 64 positions"),
        (gpt2, {"overrides": [{"match": "**.h.1.attn", "params": {"tokens": 2}}]}, "its modules have 2 and 3 tokens"),
        (t5, {"target": "decoder.block.0"}, "decoder has one count of positions, in a bias"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(make: Any, delta: dict[str, Any], match: str) -> None:
    spec = {"name": "p", "method": "prefix", "params": COUNTED, **delta}
    with pytest.raises(DeltaSpecError, match=match) as caught:
        deltaspec.plan(build(make), {"deltaspec": 1, "deltas": [spec]})
    assert {finding.code for finding in caught.value.diagnostics} == {"DS402"}


def test_a_strength_between_none_and_all_is_refused() -> None:
    c = counted(build(gpt2))
    with pytest.raises(DeltaSpecError, match=r"DS446.*moves the positions of the tokens"):
        c.attach("p0", strength=0.5)


@torch.no_grad()
def test_rows_are_refused_and_other_rows_keep_their_positions() -> None:
    model, ids = build(llama), tokens()
    c = counted(model, {"params": {"tokens": 2}})
    c.only("p1")
    alone = c(input_ids=ids).logits
    c.only("p0")
    torch.testing.assert_close(c(input_ids=ids, deltas=["p1", "p1"]).logits, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(DeltaSpecError, match=r"DS441.*takes positions in front of the tokens"):
        c(input_ids=ids, deltas=["p0", None])
