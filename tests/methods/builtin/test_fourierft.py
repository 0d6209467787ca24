from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal

QV = ["**.query", "**.value"]


@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (gpt2, "**.attn.c_attn", ["attn.c_attn"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str]) -> None:
    # Only the coefficients are copied: the frequencies must be the same by their seed.
    config = peft.FourierFTConfig(n_frequency=100, scaling=60.0, target_modules=modules)
    params = {"frequencies": 100, "scale": 60.0}
    agree(made(), "fourierft", params, target, config, lambda m: {"coefficients": m.fourierft_spectrum["default"]})


@pytest.mark.parametrize(("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, ["fc", "out"])])
def test_promises(made: Any, target: Any) -> None:
    check(made(), "fourierft", {"frequencies": 50}, target, identity=False)
    check(made(), "fourierft", {"frequencies": 50, "init": "zeros"}, target, std=1.0)


def test_bypassed_and_training() -> None:
    check_bypassed("fourierft", {"frequencies": 50, "init": "zeros"})
    check_training("fourierft", {"frequencies": 200}, QV)


def test_sites_of_one_shape_share_frequencies_until_a_seed_differs() -> None:
    model, inputs = bert()
    c = compiled(model, inputs, "fourierft", {"frequencies": 50}, QV)
    buffers = dict(c.deltas["d"].named_buffers())
    assert [b.shape for b in buffers.values()] == [(50,)]
    other = compiled(model, inputs, "fourierft", {"frequencies": 50, "frequency_seed": 1}, QV)
    assert not torch.equal(*buffers.values(), *dict(other.deltas["d"].named_buffers()).values())


def test_refusals() -> None:
    assert "384 or less" in refusal(*net(), "fourierft", {}, "fc")
    assert "Linear or Conv1D" in refusal(*net(), "fourierft", {}, "emb")
