"""soft_prompt: against embeddings passed by hand, against PEFT, and in everything a model does with its input."""

import copy
import pickle
from typing import Any

import pytest
import torch
from prompt_models import DECODERS, bart, bert, build, gemma3, gpt2, llama, roberta, t5, tokens
from soft_prompts import by_hand, compiled, prompt
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import deltaspec
from deltaspec.compiler.restore import restore
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.diagnostics.findings import DeltaSpecError


@pytest.mark.parametrize("make", [*DECODERS, bert, roberta])
def test_equals_embeddings_passed_by_hand(make: Any) -> None:
    model = build(make)
    c, ids = compiled(model, 4, 3), tokens()
    assert torch.equal(c(input_ids=ids).logits, by_hand(model, prompt(c), ids).logits[:, 7:])
    c.detach("p0")
    assert torch.equal(c(input_ids=ids).logits, by_hand(model, prompt(c), ids).logits[:, 3:])
    c.detach()
    assert torch.equal(c(input_ids=ids).logits, model(input_ids=ids).logits)


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
