"""Groups of an optimizer: hints, LoRA+ beside PEFT's, and what is trained by them."""

import pytest
import torch
from blends import Net, X
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.nn.utils import parametrize

import deltaspec

TRAIN = {"lr": 1e-2, "weight_decay": 0.1, "lr_ratio": 4, "warmup": 3, "schedule": "linear", "seed": 1}


def compiled(train=TRAIN, method="lora", **more):
    delta = {"name": "d", "method": method, "target": "*", **({"train": train} if train else {}), **more}
    plain = {"name": "plain", "method": "lora", "target": "a", "params": {"rank": 2}}
    return deltaspec.compile(Net(), {"deltaspec": 1, "deltas": [delta, plain]})


def test_the_hints_become_groups():
    c = compiled()
    first, second, plain = c.parameter_groups()
    hints = {"weight_decay": 0.1, "warmup": 3, "schedule": "linear"}
    assert {key: value for key, value in first.items() if key != "params"} == {
        "name": "d A", "delta": "d", "lr": 1e-2, **hints,
    }  # fmt: skip
    assert (second["name"], second["lr"]) == ("d B", 4e-2)
    assert {key: value for key, value in plain.items() if key != "params"} == {"name": "plain", "delta": "plain"}
    named = {id(p): name for name, p in c.deltas["d"].named_parameters()}
    assert [named[id(p)] for p in first["params"]] == ["a~down", "b~down"]
    assert [named[id(p)] for p in second["params"]] == ["a~up", "b~up"]
    optimizer = torch.optim.AdamW(c.parameter_groups(), lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 4e-2, 0.5]
    assert [group["name"] for group in c.parameter_groups("plain")] == ["plain"]


def test_lora_plus_takes_the_steps_of_peft():
    torch.manual_seed(0)
    c = compiled({"lr": 1e-2, "lr_ratio": 8, "weight_decay": 0}, params={"rank": 2, "alpha": 2, "use_dora": True})
    c.only("d")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["a", "b"], use_dora=True)
    theirs = get_peft_model(Net(), config)
    with torch.no_grad():
        theirs.base_model.model.a.base_layer.weight.copy_(c.backbone.a.weight)
        theirs.base_model.model.a.base_layer.bias.copy_(c.backbone.a.bias)
        theirs.base_model.model.b.base_layer.weight.copy_(c.backbone.b.weight)
        theirs.base_model.model.b.base_layer.bias.copy_(c.backbone.b.bias)
        for name in "ab":
            layer = theirs.base_model.model.get_submodule(name)
            layer.lora_A.default.weight.copy_(c.deltas["d"].tensor(f"{name}.down"))
            magnitude = layer.lora_magnitude_vector.default.weight
            magnitude.copy_(layer.base_layer.weight.norm(dim=1))
    ours = torch.optim.AdamW(c.parameter_groups("d"))
    peft = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8)
    for _ in range(5):
        for model, optimizer in ((c, ours), (theirs, peft)):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert torch.allclose(c(X), theirs(X), atol=1e-5)
    moved = c.deltas["d"].tensor("a.up")
    assert torch.allclose(moved, theirs.base_model.model.a.lora_B.default.weight, atol=1e-5) and moved.any()


@pytest.mark.parametrize(
    ("method", "params"),
    [("adapter", {"width": 3}), ("compacter", {"width": 4, "divisions": 2}), ("hira", {"rank": 2})],
)
def test_other_methods_with_two_factors(method, params):
    first, second = compiled({"lr": 1.0, "lr_ratio": 2}, method, params=params).parameter_groups("d")
    names = {id(p): name for name, p in compiled(None, method, params=params).deltas["d"].named_parameters()}
    assert len(first["params"]) + len(second["params"]) == len(names) and second["params"]


def test_what_requires_no_gradients_is_left_out():
    c = compiled(None)
    for parameter in c.deltas["plain"].parameters():
        parameter.requires_grad = False
    assert [group["delta"] for group in c.parameter_groups()] == ["d"]
    with pytest.raises(deltaspec.DeltaSpecError, match="DS381.*'plain': it requires no gradients"):
        c.parameter_groups("plain")
    with pytest.raises(deltaspec.DeltaSpecError, match="DS434"):
        c.parameter_groups("nope")


class Doubled(torch.nn.Module):
    def forward(self, value):
        return 2 * value


def test_parameters_that_torch_computes_a_tensor_from():
    c = compiled()
    parametrize.register_parametrization(c.deltas["d"], "a~up", Doubled())
    _, second, _ = c.parameter_groups()
    assert {*map(id, second["params"])} >= {id(c.deltas["d"].parametrizations["a~up"].original)}
    assert len(second["params"]) == 2
