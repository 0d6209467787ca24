"""One step on tensors without values: what is alive at its fullest moment."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaspec.costs.step import run_step

ROWS, WIDTH, WIDER, LAYERS = 100, 64, 256, 6


class Layers(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDER), nn.ReLU(), nn.Linear(WIDER, WIDTH)) for _ in range(LAYERS))
        self.layers, self.again = nn.ModuleList(layers), again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return x.sum()


def test_what_is_computed_again_is_let_go_of_layer_by_layer() -> None:
    wide, narrow = 4 * ROWS * WIDER, 4 * ROWS * WIDTH
    weights = 4 * LAYERS * (2 * WIDTH * WIDER + WIDER + WIDTH)
    x = torch.zeros(ROWS, WIDTH)
    gc.disable()  # a step lets go of all by itself
    try:
        plain, again = (run_step(model, lambda model=model: model(x)) for model in (Layers(False), Layers(True)))  # type: ignore[misc]
    finally:
        gc.enable()
    inputs = narrow * (LAYERS - 1) + 4 * ROWS * WIDTH  # of each layer, the batch itself included
    assert plain.kept == inputs + LAYERS * wide and again.kept == inputs
    assert plain.peak < plain.kept + 3 * wide + weights and again.peak < again.kept + 4 * wide + weights
    assert plain.places == dict.fromkeys((f"layers.{i}.0" for i in range(LAYERS)), narrow) | dict.fromkeys(
        (f"layers.{i}.1" for i in range(LAYERS)), wide
    )
    # The second product of a layer is not computed again: nothing of the backward needs it.
    assert again.backward_flops == plain.backward_flops + plain.forward_flops // 2
