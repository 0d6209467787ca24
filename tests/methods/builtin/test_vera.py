from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    width, out = layer.in_features, layer.out_features
    return {
        "inner_scale": layer.vera_lambda_d["default"],
        "outer_scale": layer.vera_lambda_b["default"],
        "down": (layer.vera_A["default"], lambda a: a[:, :width]),
        "up": (layer.vera_B["default"], lambda b: b[:out]),
    }


@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [(bert, QV, ["query", "value"]), (gpt2, "**.attn.c_attn", ["c_attn"]), (llama, ["**.q_proj"], ["q_proj"])],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str]) -> None:
    agree(made(), "vera", {"rank": 12}, target, peft.VeraConfig(r=12, target_modules=modules), tensors)


def test_starts_as_peft_does() -> None:
    model, inputs = bert()
    other = peft.get_peft_model(bert()[0], peft.VeraConfig(r=64, target_modules=["query"]))
    theirs = tensors(other.base_model.model.encoder.layer[0].attention.self.query)
    c = compiled(model, inputs, "vera", {"rank": 64}, "**.query")
    for spec in c.plan.deltas[0].sites[0].tensors:
        found = theirs[spec.name]
        expected = found[1](found[0]) if isinstance(found, tuple) else found
        ours = c.deltas["d"].tensor(spec.key or f"encoder.layer.0.attention.self.query.{spec.name}")
        assert ours.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.02)
        assert ours.std().item() == pytest.approx(expected.std().item(), rel=0.1, abs=1e-6)


@pytest.mark.parametrize("made", [bert, gpt2, llama])
def test_promises(made: Any) -> None:
    c = check(
        made(), "vera", {"rank": 32, "dropout": 0.1}, {"role": ["attn.q", "attn.qkv", "mlp.down"], "optional": True}
    )
    names = [name for name, _ in c.deltas["d"].tensors() if name.startswith("shared.")]
    assert len(names) == len(set(names)) < 2 * len(c.plan.sites)  # one pair of matrices for each width


def test_bypassed_and_training() -> None:
    check_bypassed("vera", {"rank": 32})
    check_training("vera", {"rank": 32}, QV)


def test_matrices_are_kept_and_saved(tmp_path: Any) -> None:
    model, inputs = bert()
    c = compiled(model, inputs, "vera", {"rank": 8}, QV)
    shared = {n: t for n, t in c.deltas["d"].tensors() if n.startswith("shared.")}
    assert shared and not any(t.requires_grad for t in shared.values())
    c.save(tmp_path)
    twin = compiled(model, inputs, "vera", {"rank": 8}, QV)
    for _, value in twin.deltas["d"].tensors():
        value.data.zero_()
    twin.load(tmp_path)
    assert all(torch.equal(twin.deltas["d"].tensor(n), t) for n, t in shared.items())


def test_refusals() -> None:
    assert "Linear or Conv1D" in refusal(*net(), "vera", {}, "conv")
