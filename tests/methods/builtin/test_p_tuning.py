"""p_tuning: against PEFT's PromptEncoder; its encoder folds away."""

import copy
from typing import Any

import pytest
import torch
from prompt_models import build, llama, t5, tokens
from torch import Tensor

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

ENCODERS = [{"encoder": "mlp"}, {"encoder": "lstm"}, {"encoder": "lstm", "layers": 1}]


def compiled(model: Any, **params: Any) -> Any:
    delta = {"name": "p", "method": "p_tuning", "params": {"tokens": 4, "width": 24, **params}}
    return deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})


def pairs(c: Any, encoder: Any) -> list[tuple[Tensor, Tensor]]:
    """Pair the delta's tensors with those of PEFT's PromptEncoder."""
    ours = {key.rpartition(".")[2]: value for key, value in c.deltas["p"].tensors()}
    found = [(ours.pop("prompt"), encoder.embedding.weight)]
    linear = [layer for layer in encoder.mlp_head if isinstance(layer, torch.nn.Linear)]
    for number, layer in enumerate(linear):
        found += [(ours.pop(f"linear_{number}"), layer.weight), (ours.pop(f"linear_{number}_bias"), layer.bias)]
    parts = {"input": "weight_ih", "hidden": "weight_hh", "input_bias": "bias_ih", "hidden_bias": "bias_hh"}
    for name in list(ours):
        _, layer, part = name.removesuffix("_reverse").split("_", 2)
        suffix = "_reverse" if name.endswith("_reverse") else ""
        found.append((ours.pop(name), getattr(encoder.lstm_head, f"{parts[part]}_l{layer}{suffix}")))
    return found


@pytest.mark.parametrize("make", [llama, t5])
@pytest.mark.parametrize("params", ENCODERS)
def test_equals_peft(make: Any, params: dict[str, Any]) -> None:
    from peft import PromptEncoderConfig, get_peft_model

    model = build(make)
    c, ids = compiled(model, **params), tokens()
    labels = ids.clone()
    labels[:, 0] = -100
    config = PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM" if make is t5 else "CAUSAL_LM",
        num_virtual_tokens=4,
        num_transformer_submodules=1,
        encoder_hidden_size=24,
        encoder_reparameterization_type=params["encoder"].upper(),
        encoder_num_layers=params.get("layers", 2),
    )
    reference = get_peft_model(copy.deepcopy(model), config).eval()
    both = pairs(c, reference.prompt_encoder["default"])
    assert len(both) == len(list(reference.prompt_encoder["default"].parameters()))
    with torch.no_grad():
        for ours, theirs in both:
            theirs.copy_(ours.normal_(0, 0.3))
    mask = torch.ones_like(ids)
    out = c(input_ids=ids, attention_mask=mask, labels=labels)
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels)
    logits = expected.logits if make is t5 else expected.logits[:, 4:]
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    expected.loss.backward()
    for ours, theirs in both:
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()  # torch runs an LSTM by another kernel where gradients are asked for
@pytest.mark.parametrize("params", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_folds_away(params: dict[str, Any], dtype: torch.dtype, tmp_path: Any) -> None:
    model = build(llama).to(dtype)
    c, ids = compiled(model, **params), tokens()
    simple = c.simplified()
    assert (simple.plan["p"].method, simple.plan.trainable) == ("soft_prompt", 4 * 32)
    assert torch.equal(simple(input_ids=ids).logits, c(input_ids=ids).logits)
    assert torch.equal(simple.generate(ids, max_new_tokens=4), c.generate(ids, max_new_tokens=4))
    simple.save(tmp_path)
    again = deltaspec.restore(model, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, c(input_ids=ids).logits)
    simple.detach()
    c.detach()
    assert torch.equal(simple(input_ids=ids).logits, c(input_ids=ids).logits)
    assert c.simplified().attached == ()


@pytest.mark.parametrize("params", ENCODERS)
def test_training_and_torch_compile(params: dict[str, Any]) -> None:
    c, ids = compiled(build(llama), **params), tokens()
    torch._dynamo.reset()
    fast = torch.compile(c.backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(input_ids=ids).logits, c(input_ids=ids).logits)
    optimizer = torch.optim.Adam(c.train().trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = c(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in c.deltas["p"].parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_dropout_between_the_layers_of_the_lstm() -> None:
    c, ids = compiled(build(llama), encoder="lstm", dropout=0.5), tokens()
    still = c(input_ids=ids).logits
    assert torch.equal(still, c(input_ids=ids).logits)
    assert torch.equal(still, c.simplified()(input_ids=ids).logits)
    c.train()
    assert not torch.equal(c(input_ids=ids).logits, c(input_ids=ids).logits)
    for params in ({"dropout": 0.5}, {"encoder": "lstm", "layers": 1, "dropout": 0.5}):
        with pytest.raises(DeltaSpecError, match="between layers of the LSTM"):
            compiled(build(llama), **params)
