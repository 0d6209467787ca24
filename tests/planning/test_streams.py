"""Inputs of other modules that deltas read: found from the site outwards, or refused before anything is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import refused, spec
from torch import Tensor, nn
from weight_methods import gpt2

import deltaspec
from deltaspec.planning.streams import meant, path_to

NAMES = ["a", "a.dense", "a.b", "a.b.c", "a.b.dense", "dense"]


def reading(path: str, target: str = "**.mlp.c_proj") -> dict[str, Any]:
    params = {"width": 4, "input_of": path}
    return {"name": "d", "method": "parallel_adapter", "params": params, "target": {"path": target}}


def test_a_path_means_the_nearest_module_outwards() -> None:
    assert meant("a.b.c", "dense", NAMES) == "a.b.dense"
    assert meant("a.b", "dense", NAMES) == "a.dense"
    assert meant("a.b", "b.c", NAMES) == "a.b.c"
    assert meant("a.b.c", "x", NAMES) is None


@pytest.mark.parametrize("read", NAMES)
@pytest.mark.parametrize("fqn", ["a.b.c", "a.dense", "dense"])
def test_the_shortest_path_comes_back(read: str, fqn: str) -> None:
    found = meant(fqn, path_to(read, fqn, NAMES), NAMES)
    assert found == read or read == fqn or (read == "dense" and fqn == "a.b.c")  # hidden by the nearer ones


def test_widths_are_those_of_what_is_read() -> None:
    found = deltaspec.plan(gpt2()[0], spec(reading("mlp.c_proj", "**.mlp")))
    assert [t.shape for t in found.sites[0].tensors if t.name == "down"] == [(4, 128)]


@pytest.mark.parametrize(
    ("path", "said", "way_out"),
    [
        ("ln_3", "nothing beside or around", "did you mean 'ln_"),
        ("ln_f", "does not run once before each end", "as often as"),
        ("h.1.ln_2", "does not run once before each end", "as often as"),
        ("wte", "other positions", "[..., width]"),
    ],
)
def test_refusals(path: str, said: str, way_out: str) -> None:
    (finding,) = refused(gpt2()[0], spec(reading(path)))
    assert finding.code == "DS585"
    assert said in finding.message
    assert finding.suggestion is not None and way_out in finding.suggestion


class Twice(nn.Module):
    """Calls one layer twice, and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.out, self.idle = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.fc(self.fc(self.norm(x))))
        return out


@pytest.mark.parametrize(("path", "site"), [("norm", "fc"), ("fc", "out"), ("idle", "out")])
def test_modules_of_other_counts(path: str, site: str) -> None:
    (finding,) = refused(Twice(), spec(reading(path, site)), example_inputs=torch.zeros(1, 2, 8))
    assert finding.code == "DS585"


def test_a_residual_of_another_width_or_before_a_module() -> None:
    delta = {"name": "d", "method": "adapter", "params": {"width": 4, "residual_of": "mlp.c_proj"},
             "target": {"path": "**.mlp"}}  # fmt: skip
    (finding,) = refused(gpt2()[0], spec(delta))
    assert "128 wide" in finding.message
    delta = {**delta, "params": {"residual_of": "ln_1", "position": "before"}}
    (finding,) = refused(gpt2()[0], spec(delta))
    assert "set position: after" in str(finding.suggestion)


@pytest.mark.parametrize("path", ["", "a b", ".x", "x.", "h.*.ln_1", "a[0]"])
def test_a_path_is_own_names_with_dots(path: str) -> None:
    assert {finding.code for finding in deltaspec.validate(spec(reading(path)))} == {"DS208"}
