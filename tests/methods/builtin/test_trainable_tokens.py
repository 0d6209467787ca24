import copy

import peft
import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, T5Config, T5ForConditionalGeneration
from weight_methods import bert, compiled, gpt2, llama, net, refusal, run, stir

import deltaspec

IDS = [3, 1, 7]


def tied_gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=50,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval(), {"input_ids": torch.arange(12).reshape(2, 6)}


def tied_t5():
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    ids = torch.arange(12).reshape(2, 6)
    return T5ForConditionalGeneration(config).eval(), {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def made(model, inputs, **params):
    spec = {"name": "d", "method": "trainable_tokens", "params": {"token_ids": IDS, **params}}
    return deltaspec.compile(model, {"deltaspec": 1, "deltas": [spec]}, example_inputs=inputs)


def rows(c):
    (row,) = [tensor for _, tensor in c.deltas["d"].tensors()]
    return row


@pytest.mark.parametrize("build", [bert, gpt2, llama, tied_gemma, tied_t5])
def test_it_agrees_with_peft(build):
    model, inputs = build()
    c = made(model, inputs)
    config = peft.TrainableTokensConfig(token_indices=IDS)
    other = peft.get_peft_model(copy.deepcopy(model), config).eval()
    (theirs,) = [p for p in other.parameters() if p.requires_grad]
    torch.testing.assert_close(rows(c), theirs)
    stir(c)
    with torch.no_grad():
        theirs.copy_(rows(c))
    seen, expected = run(c, inputs), run(other, inputs)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen, run(model, inputs), atol=1e-3)
    seen.square().sum().backward()
    expected.square().sum().backward()
    scale = max(1, theirs.grad.abs().max().item())
    torch.testing.assert_close(rows(c).grad, theirs.grad, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("build", [bert, gpt2, llama, tied_t5])
def test_it_keeps_its_promises(build):
    model, inputs = build()
    model.requires_grad_(False)
    before, plain = copy.deepcopy(model.state_dict()), run(model, inputs)
    c = made(model, inputs)
    assert torch.equal(run(c, inputs), plain)
    stir(c)
    merged = c.merge("d")
    torch.testing.assert_close(run(merged, inputs), run(c, inputs), atol=1e-5, rtol=1e-4)
    table, own = merged.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert set((table != own).any(1).nonzero().flatten().tolist()) == set(IDS)
    with c.detached():
        assert torch.equal(run(c, inputs), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_head_stays_tied_when_merged():
    model, inputs = gpt2()
    c = made(model, inputs)
    stir(c)
    merged = c.merge("d")
    torch.testing.assert_close(merged.lm_head.weight, merged.transformer.wte.weight, rtol=0, atol=0)


def test_alone_leaves_the_head():
    model, inputs = gpt2()
    c = made(model, inputs, tied="alone")
    assert [site.fqn for site in c.plan.sites] == ["transformer.wte"]


def test_half_precision_tables_have_float32_rows():
    model, inputs = llama()
    model = model.bfloat16().requires_grad_(False)
    c = made(model, inputs)
    assert rows(c).dtype == torch.float32
    assert torch.equal(run(c, inputs), run(model, inputs))


def test_only_the_input_embeddings_by_default():
    assert [site.fqn for site in made(*bert()).plan.sites] == ["embeddings.word_embeddings"]


def test_other_deltas_on_the_same_table():
    tokens = {"name": "tokens", "method": "trainable_tokens", "params": {"token_ids": [1]}}
    lora = {"name": "lora", "method": "lora", "target": "emb"}
    model, inputs = net()
    with pytest.raises(deltaspec.DeltaSpecError, match="replaces weights"):
        deltaspec.compile(model, {"deltaspec": 1, "deltas": [lora, tokens | {"target": "emb"}]}, example_inputs=inputs)
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": [tokens | {"target": "emb"}, lora]}, example_inputs=inputs)
    with torch.no_grad():
        for delta in c.deltas.values():
            for parameter in delta.parameters():
                parameter += 0.1
    torch.testing.assert_close(run(c.merge(), inputs), run(c, inputs), atol=1e-4, rtol=1e-4)


def test_the_ids_are_checked():
    def findings(ids):
        spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "trainable_tokens", "params": {"token_ids": ids}}]}
        return [finding.message for finding in deltaspec.validate(spec)]

    assert findings([3, 1]) == []
    assert "there twice" in findings([3, 1, 3])[0]
    assert findings([]) and findings([-1])
    assert "token id 50 is outside of the table of 50 rows" in refusal(
        *llama(), "trainable_tokens", {"token_ids": [50]}, {"role": "embed"}
    )


def test_refusals():
    params = {"token_ids": [1]}
    assert "tied to no table" in refusal(*bert(), "trainable_tokens", params, {"role": "attn.q"})
    assert "LayerNorm" in refusal(*bert(), "trainable_tokens", params, {"role": "norm"})
    lone = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    assert compiled(lone, torch.tensor([[1, 2]]), "trainable_tokens", params, "0").plan.trainable == 2
