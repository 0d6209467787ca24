"""reft: against the paper's formula, on the tokens it is to edit, in everything a model does."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bottlenecks import keeps_promises
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from weight_methods import bert, check_training, compiled, gpt2, llama, refusal, run, stir

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

CASES = [{"first": 2}, {"last": 2}, {"first": 2, "last": 1}, {"first": 1, "last": 2, "tied": False}]
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])
IDS = torch.randint(3, 50, REAL.shape, generator=torch.Generator().manual_seed(4))


def sizes():
    return {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "hidden_size": 32}


def opt():
    return OPTForCausalLM(OPTConfig(**sizes(), ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64))


def gemma():
    rest = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes(), **rest))


DECODERS = {"llama": lambda: llama()[0], "gpt2": lambda: gpt2()[0], "opt": opt, "gemma3": gemma}


def made(model, **params):
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "reft", "params": {"rank": 3, **params}}]}
    c = deltaspec.compile(model.eval(), spec)
    stir(c, std=0.5)
    return c


def rows(a):
    """Orthonormal rows that span what the rows of `a` do, first row first: Gram and Schmidt, step by step."""
    basis = []
    for row in a:
        for unit in basis:
            row = row - (row @ unit) * unit
        basis.append(row / row.norm())
    return torch.stack(basis)


def edited(t, h, form, end=""):
    r, w, b = t[f"{end}rotation"], t[f"{end}source"], t[f"{end}bias"]
    if form == "direft":
        return h + (h @ w.T + b) @ r
    return h + (h @ w.T + b - h @ rows(r).T) @ rows(r)


def test_positions_all_is_the_papers_formula():
    model, inputs = llama()
    for form in ("loreft", "direft"):
        c = compiled(model, inputs, "reft", {"rank": 3, "form": form}, {"path": "model.layers.1"})
        stir(c, std=0.5)
        seen = []
        norm = c.backbone.model.norm.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        run(c, inputs)
        with c.detached():
            run(c, inputs)
        norm.remove()
        t = {n: c.deltas["d"].tensor(f"model.layers.1.{n}") for n in ("rotation", "source", "bias")}
        torch.testing.assert_close(seen[0], edited(t, seen[1], form), atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_formula():
    class Block(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    model, x = nn.Sequential(Block(), nn.Linear(6, 2)), torch.randn(2, 4, 6)
    c = compiled(model, x, "reft", {"rank": 3}, "0")
    stir(c, std=0.5)
    t = {n: c.deltas["d"].tensor(f"0.{n}") for n in ("rotation", "source", "bias")}
    twins = {n: v.detach().clone().requires_grad_() for n, v in t.items()}
    c(x).square().sum().backward()
    model[1](edited(twins, x, "loreft")).square().sum().backward()
    for name, tensor in t.items():
        torch.testing.assert_close(tensor.grad, twins[name].grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("params", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_only_the_chosen_tokens_are_edited(name, attention, params):
    """Row by row, whatever stands in front of a prompt or behind it, the same tokens are edited by the formula."""
    torch.manual_seed(0)
    model = DECODERS[name]()
    model.set_attn_implementation(attention)
    c = made(model, **params)
    blocks = [m for n, m in c.backbone.named_modules() if n.endswith((".layers.0", ".h.0"))]
    tensors = {key.rpartition(".")[2]: v for key, v in c.deltas["d"].tensors() if ".0." in key}
    seen = []
    handle = blocks[0].register_forward_hook(lambda m, a, out: seen.append(out if torch.is_tensor(out) else out[0]))
    for mask in (REAL, REAL.flip(1)):
        seen.clear()
        inputs = {"input_ids": IDS, "attention_mask": mask}
        run(c, inputs)
        with c.detached():
            run(c, inputs)
        after, before = seen
        for row, real in enumerate(mask.bool()):
            places = real.nonzero().flatten().tolist()
            first = places[: params.get("first", 0)]
            last = [p for p in places[len(places) - params.get("last", 0) :] if p not in first]
            for place in places:
                h = before[row, place]
                if place in first:
                    h = edited(tensors, h, "loreft", "" if params.get("tied", True) else "first_")
                elif place in last:
                    h = edited(tensors, h, "loreft", "" if params.get("tied", True) else "last_")
                torch.testing.assert_close(after[row, place], h, atol=1e-5, rtol=1e-4)
    handle.remove()


@pytest.mark.parametrize("params", CASES)
def test_padding_does_not_matter_to_an_encoder(params):
    model, _ = bert()
    c = made(model, **params)
    alone = run(c, {"input_ids": IDS[1:2, 3:]})
    padded = run(c, {"input_ids": IDS.flip(1)[1:2], "attention_mask": REAL.flip(1)[1:2]})
    turned = IDS[1:2, 3:].flip(1)
    torch.testing.assert_close(padded[:, :4], run(c, {"input_ids": turned}), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone, run(model, {"input_ids": IDS[1:2, 3:]}), atol=1e-3)


def seq2seq(kind):
    torch.manual_seed(0)
    if kind == "bart":
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        config = BartConfig(vocab_size=50, d_model=32, max_position_embeddings=64, **layers, **heads)
        return BartForConditionalGeneration(config)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("params", CASES)
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_encoder_and_decoder_each_have_their_own_padding(kind, params):
    c = made(seq2seq(kind), **params)
    ids, out = IDS[1:2, 3:], torch.tensor([[0, 8, 9]])
    alone = c(input_ids=ids, decoder_input_ids=out).logits
    behind = torch.cat([ids, torch.full((1, 2), 1)], 1)
    told = torch.tensor([[1, 1, 1, 1, 0, 0]])
    longer = torch.cat([out, torch.full((1, 2), 1)], 1)
    padded = c(
        input_ids=behind, attention_mask=told, decoder_input_ids=longer,
        decoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
    ).logits  # fmt: skip
    torch.testing.assert_close(padded[:, :3], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("params", CASES)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_edits_the_prompt_only(name, params):
    torch.manual_seed(0)
    c = made(DECODERS[name](), **params)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = c.generate(input_ids=IDS, attention_mask=REAL, **options)
    for row in range(len(IDS)):
        ids = IDS[row : row + 1, int((REAL[row] == 0).sum()) :]
        alone = c.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(alone[0, ids.shape[1] :], batch[row, IDS.shape[1] :])
    assert torch.equal(c.generate(input_ids=IDS, attention_mask=REAL, use_cache=False, **options), batch)
    beams = {**options, "num_beams": 3}
    one = c.generate(input_ids=IDS, attention_mask=REAL, **beams)
    assert torch.equal(c.generate(input_ids=IDS, attention_mask=REAL, use_cache=False, **beams), one)


def test_generation_without_a_cache_behind_a_soft_prompt_and_in_threads():
    deltas = [
        {"name": "d", "method": "reft", "params": {"rank": 3, "last": 2}},
        {"name": "p", "method": "soft_prompt", "params": {"tokens": 4}},
    ]
    c = deltaspec.compile(llama()[0], {"deltaspec": 1, "deltas": deltas})
    stir(c, std=0.5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [IDS[:1, :3], IDS[1:, 2:], IDS]
    expected = [c.generate(input_ids=ids, **options) for ids in prompts]
    with ThreadPoolExecutor(3) as pool:  # each remembers its own prompt
        together = [pool.submit(c.generate, input_ids=ids, use_cache=False, **options) for ids in prompts * 2]
    for ids, future in zip(expected * 2, together, strict=True):
        assert torch.equal(future.result(), ids)


def test_generation_that_hides_the_end_of_the_prompt_is_refused_at_once():
    c, ends = made(llama()[0], last=1), {"input_ids": IDS, "max_new_tokens": 3, "pad_token_id": 0}
    refusals = {
        "prefill_chunk_size": {"prefill_chunk_size": 3},
        "assisted generation": {"prompt_lookup_num_tokens": 2},
        "in pieces": {"generation_config": GenerationConfig(prefill_chunk_size=2)},
    }
    for says, options in refusals.items():
        with pytest.raises(DeltaSpecError, match=f"DS450.*{says}"):
            c.generate(**ends, **options)
    with pytest.raises(DeltaSpecError, match=r"DS450[\s\S]*c.generate"):  # where nothing remembers the prompt
        c.backbone.generate(**ends, use_cache=False)
    with pytest.raises(DeltaSpecError, match="DS450.*continues one of 3 tokens by 3"):
        c.backbone.generate(**ends, prefill_chunk_size=3)
    assert torch.equal(c.backbone.generate(**ends), c.generate(**ends))
    both = made(seq2seq("t5"), last=1)
    with pytest.raises(DeltaSpecError, match="DS450.*only a plain decoder"):
        both.generate(**ends, use_cache=False)
    assert both.generate(**ends).shape == both.backbone.generate(**ends).shape
    c.detach()
    assert c.generate(**ends, use_cache=False).shape == c.generate(**ends, prefill_chunk_size=3).shape


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_static_cache_is_understood(name):
    torch.manual_seed(0)
    c = made(DECODERS[name](), first=2, last=2)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    usual = c.generate(input_ids=IDS, attention_mask=REAL, **options)
    static = c.generate(
        input_ids=IDS, attention_mask=REAL, cache_implementation="static", disable_compile=True, **options
    )
    assert torch.equal(usual, static)


def test_a_prompt_in_two_pieces_is_refused_where_its_end_matters():
    model, _ = llama()
    c = made(model, last=1)
    with torch.no_grad():
        past = c(input_ids=IDS[:, :3], use_cache=True).past_key_values
        with pytest.raises(DeltaSpecError, match=r"DS450[\s\S]*the whole prompt in one forward"):
            c(input_ids=IDS[:, 3:], past_key_values=past)
    c = made(llama()[0], first=5)
    with torch.no_grad():
        past = c(input_ids=IDS[:, :3], use_cache=True).past_key_values
        pieces = c(input_ids=IDS[:, 3:], past_key_values=past).logits
        torch.testing.assert_close(pieces, c(input_ids=IDS).logits[:, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_edit(reentrant):
    gradients = []
    for checkpointing in (False, True):
        c = made(llama()[0], first=1, last=2).train()
        if checkpointing:
            c.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
            c.backbone.enable_input_require_grads()
        first = c(input_ids=IDS, attention_mask=REAL).logits[:, -1].square().sum()
        second = c(input_ids=IDS, attention_mask=REAL.flip(1)).logits[:, 0].square().sum()
        (first + second).backward()
        gradients.append([p.grad.clone() for p in c.trainable_parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_torch_compile_gives_the_same():
    c = made(llama()[0], first=2, last=1)
    inputs = {"input_ids": IDS, "attention_mask": REAL, "use_cache": False}
    expected = c(**inputs).logits
    torch.testing.assert_close(torch.compile(c.backbone)(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("params", [{}, {"first": 1, "last": 1, "dropout": 0.1}, {"form": "direft", "last": 1}])
@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_it_keeps_its_promises(build, params):
    keeps_promises(build(), "reft", {"rank": 2, **params}, {"role": "block"}, identity=False)


@pytest.mark.parametrize("params", [{}, {"form": "direft"}, {"first": 1, "last": 1, "tied": False}])
def test_it_learns(params):
    check_training("reft", {"rank": 4, **params}, {"role": "block"})


def test_rotations_start_orthonormal():
    c = compiled(*llama(), "reft", {"rank": 4}, {"role": "block"})
    rotation = c.deltas["d"].tensor("model.layers.0.rotation")
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), atol=1e-5, rtol=0)


def test_refusals_where_padding_cannot_be_seen():
    text = refusal(*llama(), "reft", {"rank": 2, "last": 1}, {"role": "mlp"})
    assert "not called with an attention_mask" in text and "padding: none" in text
    c = compiled(*llama(), "reft", {"rank": 2, "last": 1, "padding": "none"}, {"role": "mlp"})
    assert c.plan.trainable > 0
    assert "rank 33" in refusal(*llama(), "reft", {"rank": 33}, {"role": "block"})
    flat = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    text = refusal(flat, torch.ones(3, 4), "reft", {"rank": 2, "last": 1, "padding": "none"}, "0")
    assert "2 dimensions" in text
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "reft", "params": {"tied": False, "first": 1}}]}
    assert "needs both" in deltaspec.validate(spec)[0].message
