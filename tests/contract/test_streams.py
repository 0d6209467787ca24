"""The contract for deltas that read what enters another module, under both captures."""

from __future__ import annotations

from typing import Any

import pytest
from models import ARCHITECTURES

from deltaspec.testing import check_method

CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "behind the feed-forward": ("gpt2", "parallel_adapter", {"input_of": "ln_2"}, "**.mlp.c_proj"),
    "behind attention": ("gpt2", "adapter", {"residual_of": "ln_1", "norm_before": True}, "**.attn"),
    "from one projection to another": ("bert", "parallel_adapter", {"input_of": "intermediate", "gate": True},
                                       "**.layer.*.output.dense"),
    "inside the site": ("vit", "parallel_adapter", {"input_of": "mlp.fc1", "learn_scale": True}, "**.layers.*.mlp"),
    "traced": ("traceable-symbolic", "parallel_adapter", {"input_of": "norm"}, "head"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_contract(case: str) -> None:
    name, method, params, target = CASES[case]
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.model(), architecture.inputs()
    params = {"width": 3, **params}
    check_method(method, model, inputs, target={"path": target}, params=params, capture=architecture.capture)
