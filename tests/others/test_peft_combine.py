"""Derived deltas beside PEFT: `add_weighted_adapter` on the same tensors gives the same."""

import copy

import pytest
import torch
from blends import spec, tensors, train
from models import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import deltaspec
from deltaspec.deltas.initial import seeded


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(torch.relu(self.wide(x)))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


PEFT_CASES = {
    "bert": (ARCHITECTURES["bert"].model, ["query", "value"]),
    "gpt2": (gpt2, ["c_attn", "wte"]),
    "pixels": (Pixels, ["wide", "one"]),
}


def peft_factors(module, name):
    if name in module.lora_A:
        return module.lora_A[name].weight, module.lora_B[name].weight
    return module.lora_embedding_A[name], module.lora_embedding_B[name]


def peft_blend(monkeypatch, model, targets, compiled, combine, weights, options, ranks):
    """Copy the sources into PEFT, let it combine them; give fqn -> (A, B, scale, update of the weight)."""
    configs = {
        name: LoraConfig(r=rank, lora_alpha=16, target_modules=targets, use_rslora=name == "legal")
        for name, rank in ranks.items()
    }
    peft = get_peft_model(copy.deepcopy(model), configs["french"], adapter_name="french")
    peft.add_adapter("legal", configs["legal"])
    sites = {fqn: module for fqn, module in peft.base_model.model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        for name in ranks:
            held = dict(compiled.deltas[name].tensors())
            for fqn, module in sites.items():
                a, b = peft_factors(module, name)
                a.copy_(held[f"{fqn}.down"])
                b.copy_(held[f"{fqn}.up"])
    names = {id(module): fqn for fqn, module in sites.items()}
    kind = type(peft.base_model)
    original = kind._generalized_task_arithmetic_weighted_adapter

    def same_draws(self, combination, adapters, weights, target, *rest):
        seed = options.get("seed", 0)
        torch.random.default_generator.set_state(seeded(f"{seed}\0blend\0{names[id(target)]}").get_state())
        return original(self, combination, adapters, weights, target, *rest)

    monkeypatch.setattr(kind, "_generalized_task_arithmetic_weighted_adapter", same_draws)
    theirs = {"majority_sign": "majority_sign_method", "rank": "svd_rank"}
    given = {theirs.get(key, key): value for key, value in options.items() if key != "seed"}
    peft.base_model.add_weighted_adapter(list(weights), list(weights.values()), "blend", combine, **given)
    return {
        fqn: (*peft_factors(m, "blend"), m.scaling["blend"], m.get_delta_weight("blend")) for fqn, m in sites.items()
    }


@pytest.mark.parametrize("model", PEFT_CASES)
@pytest.mark.parametrize(
    ("combine", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.6, "majority_sign": "frequency"}),
        ("ties", {"density": 1.0}),
        ("dare_linear", {"density": 0.5, "seed": 7}),
        ("dare_ties", {"density": 0.5, "majority_sign": "frequency"}),
    ],
)
def test_peft_combines_the_same_tensors_to_the_same(monkeypatch, model, combine, options):
    build, targets = PEFT_CASES[model]
    torch.manual_seed(0)
    backbone = build().eval()
    ranks = {"french": 4, "legal": 3 if combine in ("cat", "svd") else 4}
    weights = {"french": 0.7, "legal": -0.3}
    data = spec(combine, options, weights=weights, target=[f"**.{name}" for name in targets])
    for entry in data["deltas"][:2]:
        scaling = "rslora" if entry["name"] == "legal" else "standard"
        entry["params"] = {"rank": ranks[entry["name"]], "alpha": 16, "scaling": scaling}
    compiled = deltaspec.compile(backbone, data)
    train(compiled, "french", "legal")
    compiled.refresh()
    expected = peft_blend(monkeypatch, backbone, targets, compiled, combine, weights, options, ranks)
    held, merged = tensors(compiled), compiled.merge("blend")
    assert len(held) == 2 * len(expected) > 0
    for fqn, (a, b, scale, update) in expected.items():
        assert scale == 1
        if combine != "svd":  # the factors of a decomposition are free in their signs
            torch.testing.assert_close(held[f"{fqn}.down"], a, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(held[f"{fqn}.up"], b, atol=1e-6, rtol=1e-5)
        assert held[f"{fqn}.down"].shape == a.shape
        change = merged.get_submodule(fqn).weight - backbone.get_submodule(fqn).weight
        torch.testing.assert_close(change, update, atol=1e-5, rtol=1e-4)
