from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from weight_methods import (
    agree,
    bert,
    check,
    check_bypassed,
    check_training,
    compiled,
    gpt2,
    llama,
    net,
    refusal,
    run,
    stir,
)

import deltaspec
from deltaspec.testing import check_method

QV = ["**.query", "**.value"]


def lora_tensors(layer: Any) -> dict[str, Any]:
    embedding = "default" in layer.lora_embedding_A
    found: dict[str, Any] = {
        "down": layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight,
        "up": layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight,
    }
    if layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


def config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, **options)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (gpt2, ["**.c_attn", "**.c_proj"], ["c_attn", "c_proj"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
        (net, "conv", ["conv"]),
        (net, "conv1", ["conv1"]),
        (net, "emb", ["emb"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], dora: bool) -> None:
    params = {"rank": 4, "alpha": 6.0, "use_dora": dora}
    agree(made(), "lora", params, target, config(target_modules=modules, use_dora=dora), lora_tensors)


@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [(bert, QV, ["query", "value"]), (gpt2, ["**.c_attn"], ["c_attn"]), (net, "conv", ["conv"])],
)
def test_bias_agrees_with_peft(made: Any, target: Any, modules: list[str]) -> None:
    def tensors(layer: Any) -> dict[str, Any]:
        return {**lora_tensors(layer), "bias": layer.lora_B["default"].bias}

    params = {"rank": 4, "alpha": 6.0, "bias": True}
    agree(made(), "lora", params, target, config(target_modules=modules, lora_bias=True), tensors)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 3)], ids=["linear", "conv"])
def test_dora_of_an_output_without_weight_is_a_number(layer: nn.Module) -> None:
    """PEFT divides 0 by 0 there."""
    model, x = (
        nn.Sequential(copy.deepcopy(layer)),
        torch.randn(3, 4, 5) if isinstance(layer, nn.Conv1d) else torch.ones(3, 4),
    )
    with torch.no_grad():
        model[0].weight[2] = 0
    delta = {"name": "d", "method": "lora", "target": "0", "params": {"rank": 2, "use_dora": True}}
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})
    torch.testing.assert_close(c(x), model(x))
    c(x).square().sum().backward()
    with torch.no_grad():
        for parameter in c.deltas["d"].parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(c.merge("d")(x), c(x))


def test_dora_with_dropout_agrees_with_peft() -> None:
    model, inputs = bert()
    c = compiled(model, inputs, "lora", {"rank": 4, "alpha": 6.0, "use_dora": True, "dropout": 0.3}, "**.query")
    stir(c)
    other = peft.get_peft_model(copy.deepcopy(model), config(target_modules=["query"], use_dora=True, lora_dropout=0.3))
    for site in c.plan.deltas[0].sites:
        for name, parameter in lora_tensors(other.base_model.model.get_submodule(site.fqn)).items():
            parameter.data.copy_(c.deltas["d"].tensor(f"{site.fqn}.{name}"))
        query = site.fqn
    x = torch.randn(3, 32)
    c.train()
    other.train()
    torch.manual_seed(5)
    mine = c.backbone.get_submodule(query)(x)
    torch.manual_seed(5)
    torch.testing.assert_close(mine, other.base_model.model.get_submodule(query)(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine, c.eval().backbone.get_submodule(query)(x))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"use_dora": True},
        {"use_dora": True, "bias": True},
        {"init": "pissa"},
        {"init": "pissa", "svd_iterations": 4, "scaling": "rslora"},
        {"init": "orthogonal"},
        {"init": "pissa", "use_dora": True},
        {"init": "olora"},
        {"init": "normal", "dropout": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("made", [bert, gpt2], ids=["bert", "gpt2"])
def test_promises(made: Any, params: dict[str, Any]) -> None:
    check(
        made(), "lora", {"rank": 4, **params}, {"role": ["attn.q", "attn.v", "attn.qkv", "mlp.down"], "optional": True}
    )


@pytest.mark.parametrize(
    "params",
    [{"use_dora": True, "dropout": 0.4, "rank": 3}, {"init": "pissa", "svd_iterations": 3, "rank": 4}],
    ids=str,
)
def test_keeps_the_contract(params: dict[str, Any]) -> None:
    check_method("lora", params=params)


@pytest.mark.parametrize("start", [{}, {"init": "pissa", "svd_iterations": 3}], ids=str)
def test_dora_in_float64_is_as_exact_as_that(start: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20)).double(), torch.randn(4, 12).double()
    c = compiled(model, x, "lora", {"rank": 3, "use_dora": True, **start}, "0")
    stir(c)
    torch.testing.assert_close(c.merge("d")(x), c(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", ["emb", "conv", "grouped", "conv1", ["fc", "out"]])
def test_dora_takes_every_kind(target: Any) -> None:
    c = check(net(), "lora", {"rank": 4, "use_dora": True}, target)
    assert c.plan.deltas[0].sites[0].tensors[2].name == "magnitude"


@pytest.mark.parametrize("params", [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "orthogonal"}], ids=str)
def test_bypassed_and_training(params: dict[str, Any]) -> None:
    check_bypassed("lora", {"rank": 4, **params})
    check_training("lora", {"rank": 4, **params}, QV)


def test_pissa_starts_and_computes_as_peft_does() -> None:
    model, inputs = bert()
    other = peft.get_peft_model(copy.deepcopy(model), config(target_modules=["query"], init_lora_weights="pissa"))
    c = compiled(model, inputs, "lora", {"rank": 4, "alpha": 6.0, "init": "pissa"}, "**.query")
    fqn = "encoder.layer.1.attention.self.query"
    theirs = other.base_model.model.get_submodule(fqn)
    down, up = c.deltas["d"].tensor(f"{fqn}.down"), c.deltas["d"].tensor(f"{fqn}.up")
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(up @ down, product, atol=1e-5, rtol=1e-4)
    singular = torch.linalg.svdvals(model.get_submodule(fqn).weight)
    torch.testing.assert_close(torch.linalg.svdvals(1.5 * up @ down)[:4], singular[:4], atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # the same step in both: the signs of singular vectors are free, so ours are copied over
        for site in c.plan.deltas[0].sites:
            layer = other.base_model.model.get_submodule(site.fqn)
            generator = torch.Generator().manual_seed(7)
            for name, parameter in (("down", layer.lora_A), ("up", layer.lora_B)):
                ours = c.deltas["d"].tensor(f"{site.fqn}.{name}")
                ours += 0.1 * torch.randn(ours.shape, generator=generator)
                parameter["default"].weight.copy_(ours)
    torch.testing.assert_close(run(c, inputs), run(other.eval(), inputs), atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in c.trainable_parameters()) == 2 * 2 * 4 * 32


def test_fast_decomposition_finds_the_same_part() -> None:
    model, inputs = bert()
    product = []
    for extra in ({}, {"svd_iterations": 20}):
        c = compiled(model, inputs, "lora", {"rank": 4, "init": "pissa", **extra}, "**.query")
        fqn = c.plan.deltas[0].sites[0].fqn
        product.append(c.deltas["d"].tensor(f"{fqn}.up") @ c.deltas["d"].tensor(f"{fqn}.down"))
    torch.testing.assert_close(product[0], product[1], atol=1e-4, rtol=1e-3)


def test_orthogonal_factors_have_no_product() -> None:
    model, inputs = bert()
    c = compiled(model, inputs, "lora", {"rank": 6, "init": "orthogonal"}, "**.query")
    fqn = c.plan.deltas[0].sites[0].fqn
    up, down = c.deltas["d"].tensor(f"{fqn}.up"), c.deltas["d"].tensor(f"{fqn}.down")
    assert (up @ down).abs().max() < 1e-7 and up.abs().max() > 0.05 and down.abs().max() > 0.05


def test_dora_norm_follows_the_direction() -> None:
    model, inputs = net()
    c = compiled(model, inputs, "lora", {"rank": 4, "use_dora": True}, "fc")
    stir(c, 0.5)
    norms = c.merge("d").fc.weight.norm(dim=1)
    torch.testing.assert_close(norms, c.deltas["d"].tensor("fc.magnitude").detach().abs(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(8, 12, 3, groups=4, padding=1),
        nn.Conv2d(8, 12, (3, 2), groups=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(8, 8, 3, groups=8, padding="same", padding_mode="reflect", bias=False),
        nn.Conv3d(8, 4, 2, groups=4),
    ],
    ids=str,
)
def test_a_over_the_channels_of_all_groups(convolution: Any) -> None:
    groups, dims = convolution.groups, convolution.weight.dim() - 2
    params = {"rank": 8, "alpha": 4.0, "channels": "all", "bias": True}
    model, x = nn.Sequential(convolution).eval(), torch.randn(3, 8, *(6,) * dims)
    c = compiled(model, x, "lora", params, "0")
    stir(c)
    down, up, bias = (c.deltas["d"].tensor(f"0.{name}").detach() for name in ("down", "up", "bias"))
    assert down.shape == (8, 8, *convolution.kernel_size)
    assert up.shape[:2] == (convolution.out_channels, 8 // groups)
    whole = copy.deepcopy(convolution)
    whole.weight, whole.bias, whole.groups = nn.Parameter(down), None, 1
    pointwise = getattr(torch.nn.functional, f"conv{dims}d")(whole(x), up, groups=groups)
    expected = convolution(x) + 0.5 * (pointwise + bias.reshape(-1, *(1,) * dims))
    torch.testing.assert_close(c(x), expected, atol=1e-5, rtol=1e-5)
    rows = c(x, deltas=["d", None, "d"])
    torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[1], convolution(x)[1])
    with pytest.raises(deltaspec.DeltaSpecError, match="channels of all groups"):
        c.merge("d")


def test_channels_matter_in_grouped_convolutions_alone() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 1)), torch.randn(1, 4, 3, 3)
    c = compiled(model, x, "lora", {"rank": 2, "channels": "all"}, "0")
    stir(c)
    torch.testing.assert_close(c.merge("d")(x), c(x))


def test_refusals() -> None:
    made = net()
    assert "set channels: group" in refusal(*made, "lora", {"rank": 2, "use_dora": True, "channels": "all"}, "grouped")
    assert "even rank, not 3" in refusal(*made, "lora", {"rank": 3, "init": "orthogonal"}, "fc")
    assert "use rank: 8" in refusal(*made, "lora", {"rank": 9, "init": "pissa"}, "out")
    assert "linear layers, not Conv2d" in refusal(*made, "lora", {"rank": 2, "init": "pissa"}, "conv")
    assert "dropout: 0" in refusal(*made, "lora", {"rank": 2, "use_dora": True, "dropout": 0.1}, "conv")
    assert "multiple of the 2 groups" in refusal(*made, "lora", {"rank": 3}, "grouped")
    assert "adds no bias" in refusal(*made, "lora", {"rank": 2, "bias": True}, "emb")


@pytest.mark.parametrize(("method", "params"), [("lora", {"rank": 9}), ("adalora", {"rank": 4, "initial_rank": 9})])
def test_ranks_above_the_weights_are_noted(method: str, params: dict[str, int]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 12)), torch.ones(1, 8)
    target = {"type": "Linear"}
    plan = compiled(model, x, method, params, target).plan
    assert plan.deltas[0].notes == ("rank 9 is more than the 8 that this Linear can use (3 sites: {0..2})",)
    assert "can use" in str(plan)
    key = "initial_rank" if method == "adalora" else "rank"
    assert not compiled(model, x, method, params | {key: 8}, target).plan.deltas[0].notes


def test_start_survives_saving(tmp_path: Any) -> None:
    model, inputs = bert()
    c = compiled(model, inputs, "lora", {"rank": 4, "init": "pissa", "use_dora": True}, QV)
    stir(c)
    c.save(tmp_path)
    again = compiled(model, inputs, "lora", {"rank": 4, "init": "pissa", "use_dora": True}, QV).load(tmp_path)
    restored: Tensor = run(again, inputs)
    assert torch.equal(restored, run(c, inputs))
