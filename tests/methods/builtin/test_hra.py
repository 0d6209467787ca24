from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal, run

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    return {"directions": layer.hra_u["default"]}


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc"], ["fc"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], rank: int, orthogonal: bool) -> None:
    config = peft.HRAConfig(r=rank, apply_GS=orthogonal, target_modules=modules)
    agree(made(), "hra", {"rank": rank, "orthogonal": orthogonal}, target, config, tensors)


def test_convolution_agrees_with_peft() -> None:
    agree(net(), "hra", {"rank": 4}, "conv", peft.HRAConfig(r=4, target_modules=["conv"]), tensors)


@pytest.mark.parametrize(
    ("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, "conv"), (net, "grouped"), (net, "conv1")]
)
def test_promises(made: Any, target: Any) -> None:
    check(made(), "hra", {"rank": 4}, target, identity=False)
    check(made(), "hra", {"rank": 3, "orthogonal": True}, target, identity=False)


def test_pairs_undo_each_other_at_the_start() -> None:
    model, inputs = bert()
    c = compiled(model, inputs, "hra", {"rank": 4}, QV)
    torch.testing.assert_close(run(c, inputs), run(model, inputs), atol=1e-5, rtol=1e-5)
    directions = c.deltas["d"].tensor("encoder.layer.0.attention.self.query.directions")
    assert torch.equal(directions[:, 0], directions[:, 1]) and not torch.equal(directions[:, 1], directions[:, 2])


def test_bypassed_and_training() -> None:
    check_bypassed("hra", {"rank": 4}, identity=False)
    check_training("hra", {"rank": 4}, QV)


def test_more_directions_than_the_width_are_noted() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(2, 3)).eval(), torch.randn(4, 2)
    config = peft.HRAConfig(r=6, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    c = compiled(model, x, "hra", {"rank": 6}, "0")
    with torch.no_grad():
        c.deltas["d"].tensor("0.directions").copy_(theirs.base_model.model[0].hra_u["default"])
    torch.testing.assert_close(c(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c.merge("d")(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert "2 directions turn a weight of width 2 every way" in str(c.plan)


def test_refusals() -> None:
    assert "use rank: 16 or less" in refusal(*net(), "hra", {"rank": 17, "orthogonal": True}, "fc")
    assert "Embedding" in refusal(*net(), "hra", {}, "emb")
