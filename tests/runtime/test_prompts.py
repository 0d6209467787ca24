"""Forwards with virtual tokens in front: padding, losses, pooling, caches, encoders."""

import copy
from typing import Any

import pytest
import torch
from prompt_models import BASIC, COMMON, DECODERS, bart, bert, build, gpt2, llama, t5, tokens
from soft_prompts import by_hand, compiled, prompt
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2ForSequenceClassification

from deltaspec.diagnostics.findings import DeltaSpecError


@pytest.mark.parametrize("make", [*DECODERS, bert])
def test_padding_on_the_right(make: Any) -> None:
    model = build(make)
    c, ids = compiled(model, 5), tokens()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    whole = torch.cat([mask.new_ones(2, 5), mask], dim=1)
    got = c(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(got, by_hand(model, prompt(c), ids, attention_mask=whole).logits[:, 5:])
    torch.testing.assert_close(got[:1, :4], c(input_ids=ids[:1, :4]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.parametrize("numbered", [True, False])
def test_padding_on_the_left(make: Any, numbered: bool) -> None:
    model = build(make)
    c, ids = compiled(model, 5), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if numbered or make is gpt2 else {}
    out = c(input_ids=ids, attention_mask=mask, output_hidden_states=True, **positions)
    alone = c(input_ids=ids[:1, 3:], output_hidden_states=True)
    torch.testing.assert_close(out.logits[:1, 3:], alone.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.hidden_states[1][:1, 3:], alone.hidden_states[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logits[1:], c(input_ids=ids[1:]).logits, atol=1e-5, rtol=1e-5)


def test_loss_and_shapes_are_those_of_the_real_tokens() -> None:
    model = build(llama)
    c, ids = compiled(model, 5), tokens()
    out = c(input_ids=ids, labels=ids, output_hidden_states=True)
    assert out.logits.shape == (2, 7, 90)
    assert [h.shape for h in out.hidden_states] == [(2, 7, 32)] * 3
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    torch.testing.assert_close(c(input_ids=ids, logits_to_keep=1).logits, out.logits[:, -1:])
    assert torch.equal(c(ids, torch.ones_like(ids)).logits, out.logits)
    assert torch.equal(c(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits)


def test_outputs_of_a_bare_encoder() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**BASIC, attn_implementation="eager")).eval()
    c, ids = compiled(model, 5), tokens()
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    out = c(input_ids=ids, token_type_ids=types, output_attentions=True)
    own = torch.cat([types.new_zeros(2, 5), types], dim=1)
    reference = by_hand(model, prompt(c), ids, token_type_ids=own, output_attentions=True)
    assert torch.equal(out.last_hidden_state, reference.last_hidden_state[:, 5:])
    assert torch.equal(out.pooler_output, reference.pooler_output)
    assert [a.shape for a in out.attentions] == [(2, 4, 7, 7)] * 2
    assert torch.equal(out.attentions[1], reference.attentions[1][:, :, 5:, 5:])
    first, pooled = c(input_ids=ids, token_type_ids=types, return_dict=False)
    assert torch.equal(first, out.last_hidden_state)
    assert torch.equal(pooled, out.pooler_output)


def test_pooling_by_the_last_real_token() -> None:
    torch.manual_seed(0)
    config = GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, num_labels=3)
    model = GPT2ForSequenceClassification(config).eval()
    c, ids = compiled(model, 4), tokens()
    padded = torch.cat([ids, ids.new_zeros(2, 3)], dim=1)
    mask = (padded != 0).long()
    labels = torch.tensor([0, 2])
    out = c(input_ids=padded, attention_mask=mask, labels=labels)
    assert out.logits.shape == (2, 3)
    torch.testing.assert_close(out.logits, c(input_ids=ids).logits, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoder(make: Any) -> None:
    model = build(make)
    c, ids, labels = compiled(model, 5), tokens(), tokens(2, 4)
    assert next(site.fqn for site in c.plan.sites).endswith("encoder.embed_tokens")
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    encoder_embeds = model.get_encoder().get_input_embeddings()
    embeds = torch.cat([prompt(c).expand(2, -1, -1), encoder_embeds(ids)], dim=1)
    whole = torch.cat([mask.new_ones(2, 5), mask], dim=1)
    reference = model(inputs_embeds=embeds, attention_mask=whole, labels=labels)
    out = c(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(out.logits, reference.logits)
    assert torch.equal(out.loss, reference.loss)
    # Computing the encoder's output first, as generate does, is the same.
    states = c.get_encoder()(input_ids=ids, attention_mask=mask)
    again = c(encoder_outputs=states, attention_mask=mask, labels=labels)
    assert torch.equal(again.logits, reference.logits)


@torch.no_grad()
def test_padding_on_the_left_of_an_encoder() -> None:
    c, ids, labels = compiled(build(t5), 5), tokens(), tokens(2, 4)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = c(input_ids=ids, attention_mask=mask, labels=labels).logits
    alone = c(input_ids=ids[:1, 3:], labels=labels[:1]).logits
    torch.testing.assert_close(out[:1], alone, atol=1e-5, rtol=1e-5)


def test_going_on_from_a_cache() -> None:
    c, ids = compiled(build(llama), 4), tokens(1, 12)
    out = c.generate(ids[:, :5], max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    history = torch.cat([out.sequences, ids[:, 5:]], dim=1)
    settings = {"max_new_tokens": 4, "do_sample": False}
    whole = c.generate(history, **settings)
    with pytest.raises(DeltaSpecError, match="DS439"):  # generate would cut the input by the length of the cache
        c.generate(history, past_key_values=copy.deepcopy(out.past_key_values), **settings)
    new = history[:, out.past_key_values.get_seq_length() - 4 :]
    rest = c.generate(new, attention_mask=torch.ones_like(history), past_key_values=out.past_key_values, **settings)
    assert torch.equal(rest[:, new.shape[1] :], whole[:, history.shape[1] :])


def test_inputs_that_do_not_fit() -> None:
    c, ids = compiled(build(llama), 4), tokens()
    with pytest.raises(DeltaSpecError, match="static cache"):
        c.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(DeltaSpecError, match="attention_mask covers 3 positions"):
        c(input_ids=ids, attention_mask=torch.ones(2, 3))
    whole = c(input_ids=ids, attention_mask=torch.ones(2, 11)).logits  # a mask that counts the prompt
    assert torch.equal(whole, c(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
