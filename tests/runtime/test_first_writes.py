"""The first forward of a model with code of its own is seen, whatever runs it."""

import pytest
import torch
from inside import gate
from models import ARCHITECTURES
from torch import nn
from writers import LORA, Codebook, X, same, state

import deltaspec

SPEC = {"deltaspec": 1, "deltas": [LORA]}


def build(**options):
    model = Codebook().train()
    return model, deltaspec.compile(model, SPEC, example_inputs=(X,), capture="modules", **options)


def test_parameters_that_are_not_written_stay_shared():
    model, compiled = build()
    compiled(X)
    assert compiled.backbone.codes.data_ptr() != model.codes.data_ptr()
    assert compiled.backbone.linear.weight.data_ptr() == model.linear.weight.data_ptr()


@pytest.mark.parametrize("run", ["gradients", "functional", "vmap", "checkpoint", "compiled layer", "inference"])
def test_it_is_seen_in_every_kind_of_forward(run):
    model, compiled = build()
    before = state(model)
    if run == "gradients":
        compiled(X).sum().backward()
        assert all(p.grad is not None for p in compiled.trainable_parameters())
    elif run == "functional":
        named = {n: p for n, p in compiled.named_parameters() if p.requires_grad}
        compiled.eval()  # torch itself refuses to write to what a transform captures
        loss = lambda given: torch.func.functional_call(compiled, given, (X,)).sum()  # noqa: E731
        assert any(g.abs().sum() > 0 for g in torch.func.grad(loss)(named).values())
    elif run == "vmap":
        torch.vmap(compiled.eval())(X[None])
    elif run == "checkpoint":
        torch.utils.checkpoint.checkpoint(compiled, X, use_reentrant=False).sum().backward()
    elif run == "compiled layer":
        compiled.backbone.linear.compile(backend="eager")
        compiled(X)
    else:
        with torch.inference_mode():
            compiled(X)
    assert same(state(model), before)


def test_models_of_transformers_are_not_watched():
    model = ARCHITECTURES["llama"].model()
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{"name": "one", "method": "lora"}]})
    assert gate(compiled).first is None
    compiled = deltaspec.compile(nn.Sequential(nn.Linear(4, 4)), {"deltaspec": 1, "deltas": [LORA | {"target": "0"}]})
    assert gate(compiled).first is None
