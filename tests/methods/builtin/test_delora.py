from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal, stir

import deltaspec
from deltaspec.contract.trial import ContractError
from deltaspec.testing import check_method

QV = ["**.query", "**.value"]
INITS = pytest.mark.parametrize("init", ["kept", "zeros", "random"])


def tensors(layer: Any) -> dict[str, Any]:
    return {
        "down": layer.delora_A["default"],
        "up": layer.delora_B["default"],
        "boundary": layer.delora_lambda["default"],
        "norm": layer.delora_w_norm["default"],
    }


@pytest.mark.parametrize("init", ["zeros", "random"])
@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], init: str) -> None:
    config = peft.DeloraConfig(r=4, delora_lambda=2, target_modules=modules, init_weights=init == "zeros")
    agree(made(), "delora", {"rank": 4, "boundary": 2.0, "init": init}, target, config, tensors)


@pytest.mark.parametrize("init", ["zeros", "random"])
def test_trains_as_peft_does(init: str) -> None:
    """From the same tensors, some steps of the same optimizer: λ moves, too."""
    model, inputs = bert()
    config = peft.DeloraConfig(r=4, delora_lambda=2, target_modules=["query"], init_weights=init == "zeros")
    c = compiled(model, inputs, "delora", {"rank": 4, "boundary": 2.0, "init": init}, "**.query")
    other = peft.get_peft_model(bert()[0], config).eval()
    places = [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    pairs = []
    for place in places:
        for name, theirs in tensors(other.base_model.model.get_submodule(place)).items():
            ours = c.deltas["d"].tensor(f"{place}.{name}")
            if name in ("boundary", "norm"):
                torch.testing.assert_close(ours, theirs)
            with torch.no_grad():
                theirs.copy_(ours)
            if name != "norm":
                pairs.append((ours, theirs))
    goal = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    starts = [ours.detach().clone() for ours, _ in pairs]
    for run, parameters in ((c, [o for o, _ in pairs]), (other, [t for _, t in pairs])):
        optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0, eps=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (run(**inputs)[0] - goal).square().mean().backward()
            optimizer.step()
    for (ours, theirs), start in zip(pairs, starts, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert not torch.equal(ours, start)
    torch.testing.assert_close(c(**inputs)[0], other(**inputs)[0], atol=1e-5, rtol=1e-5)


@INITS
def test_is_the_papers_formula(init: str) -> None:
    """W + λ/r · B Ξ A with the norms of W's columns, less the first of these updates where it is kept."""
    model, inputs = bert()
    c = compiled(model, inputs, "delora", {"rank": 4, "boundary": 2.0, "init": init}, "**.query")
    reference, _ = bert()
    weights = {site.fqn: reference.get_submodule(site.fqn).weight.detach() for site in c.plan.sites}

    def update(fqn: str) -> Tensor:
        a, b, bound = (c.deltas["d"].tensor(f"{fqn}.{name}").detach() for name in ("down", "up", "boundary"))
        pairs = zip(b.t(), a, strict=True)
        terms = [torch.outer(column, row) / max(column.norm() * row.norm(), 1e-8) for column, row in pairs]
        return bound / 4 * torch.stack(terms).sum(0) * weights[fqn].norm(dim=0)

    first = {fqn: update(fqn) if init == "kept" else 0.0 for fqn in weights}
    stir(c)
    last = {fqn: update(fqn) for fqn in weights}
    for fqn, weight in weights.items():
        weight += last[fqn] - first[fqn]
    torch.testing.assert_close(c(**inputs)[0], reference(**inputs)[0], atol=1e-5, rtol=1e-5)


@INITS
def test_the_contract_is_kept_with_every_start(init: str) -> None:
    if init == "zeros":  # no step length of the contract's suits its first gradients
        with pytest.raises(ContractError, match="learning"):
            check_method("delora", params={"rank": 2, "init": init})
    else:
        check_method("delora", params={"rank": 3, "init": init, "dropout": 0.1})


@pytest.mark.parametrize(("init", "bound"), [("random", 0.5), ("kept", 1.0)])  # a kept start is as far, and subtracted
def test_the_bound_holds_whatever_the_tensors_are(init: str, bound: float) -> None:
    model, inputs = bert()
    c = compiled(model, inputs, "delora", {"rank": 4, "boundary": 0.5, "init": init}, "**.query")
    stir(c, std=100.0)
    site = "encoder.layer.0.attention.self.query"
    with torch.no_grad():
        c.deltas["d"].tensor(f"{site}.boundary").fill_(0.5)
    weight = model.get_submodule(site).weight
    change = c.merge("d").get_submodule(site).weight - weight
    assert (change / weight.norm(dim=0)).norm() <= bound + 1e-4


@INITS
@pytest.mark.parametrize("made", [bert, gpt2, llama])
def test_promises(made: Any, init: str) -> None:
    target = {"role": ["attn.q", "attn.qkv", "mlp.down"], "optional": True}
    check(
        made(), "delora", {"rank": 4, "dropout": 0.1, "boundary": 2.0, "init": init}, target, identity=init != "random"
    )


@pytest.mark.parametrize("init", ["kept", "zeros"])
def test_bypassed(init: str) -> None:
    check_bypassed("delora", {"rank": 4, "boundary": 2.0, "init": init})


@INITS
def test_training(init: str) -> None:
    check_training("delora", {"rank": 4, "boundary": 2.0, "init": init}, QV)


def test_refusals_and_remarks() -> None:
    assert "Linear or Conv1D" in refusal(*net(), "delora", {}, "conv")
    plan = deltaspec.plan(bert()[0], {"deltaspec": 1, "deltas": [
        {"name": "d", "method": "delora", "params": {"rank": 64}, "target": "**.query"}
    ]})  # fmt: skip
    assert "rank 64 is more than the 32" in str(plan)


@pytest.mark.parametrize(
    ("key", "value", "suggestion"),
    [
        ("delora_lambda", 15, 'did you mean "boundary"?'),
        ("module_dropout", 0.1, 'did you mean "dropout"?'),
        ("init_weights", False, "write init: random instead"),
        ("lambda_pattern", {"q_proj": 2},
         'write beside params: overrides: [{match: "**.q_proj", params: {boundary: 2}}]'),
    ],
)  # fmt: skip
def test_the_names_of_peft(key: str, value: Any, suggestion: str) -> None:
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "delora", "params": {key: value}}]}
    [finding] = deltaspec.validate(spec)
    assert finding.suggestion == suggestion
