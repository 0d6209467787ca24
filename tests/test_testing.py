"""`deltaspec.testing`: what `check_method` gives authors of methods, and what it says of models that do not fit."""

from __future__ import annotations

import pytest
import torch
from broken_methods import Refusing
from torch import nn

from deltaspec.contract.trial import ContractError
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.testing import check_method


def test_the_built_in_net_serves_authors_without_a_model():
    assert check_method("lora", params={"rank": 2}).trainable == 2 * (8 + 16 + 16 + 16 + 16 + 4)


def test_a_refusal_and_an_unfit_model_are_not_failures_of_the_contract(register):
    register(Refusing)
    with pytest.raises(DeltaSpecError, match="DS402"):
        check_method("refusing")
    with pytest.raises(ValueError, match="evaluation mode"):
        check_method("lora", nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), target="0")

    class Noise(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    with pytest.raises(ValueError, match="other bits on a second run"):
        check_method("lora", nn.Sequential(Noise(2, 2)).eval(), torch.zeros(1, 2), target="0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "hra", "ia3", "ssf", "adapter", "bitfit"])
def test_the_tolerance_follows_the_dtype(method, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval().to(dtype)
    x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(3, 8)
    check_method(method, model, x, target={"type": "Linear"})
    if dtype is torch.bfloat16 and method == "lora":
        with pytest.raises(ContractError, match="merged .* differ from attached"):
            check_method(method, model, x, target={"type": "Linear"}, tolerance=1e-6)


@pytest.mark.parametrize("method", ["soft_prompt", "prefix", "fourierft", "norm", "trainable_tokens"])
def test_a_refusal_on_the_built_in_net_says_that_another_can_be_given(method):
    with pytest.raises(DeltaSpecError, match=r"pass params= and target= that fit them, or model= and example_inputs="):
        check_method(method)
    with pytest.raises(DeltaSpecError) as caught:
        check_method("norm", nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(1, 2), target="0")
    assert "own net" not in str(caught.value)
    assert check_method("norm", target={"type": "LayerNorm"}).trainable == 32
