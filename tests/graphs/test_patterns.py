"""Which tensors of a formula zeros may be appended to: seen on formulas whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
from mixed_rows import entry
from tiny_models import BUILDERS

import deltaspec
from deltaspec.graphs.links import Link
from deltaspec.graphs.patterns import pattern
from deltaspec.runtime.forms import form_of


def patterns(method: str, **params: Any) -> Any:
    model = BUILDERS["short llama"]().eval()
    spec = {"deltaspec": 1, "deltas": [entry("d", method, {"path": "**.q_proj"}, **params)]}
    planned = deltaspec.plan(model, spec)["d"].sites[0]
    form = form_of(planned.site, tuple(tensor.name for tensor in planned.tensors))
    link = Link(method, planned.params, form, per_row=True)
    return pattern(link, False, tuple((tensor.name, tensor.shape) for tensor in planned.tensors))


FREE: dict[str, dict[str, Any]] = {
    "lora": {"down": (None, 16), "up": (16, None)},
    "adapter": {"down": (None, 16), "down_bias": (None,), "up": (16, None), "up_bias": (16,)},
    "vera": {"inner_scale": (None,), "outer_scale": (16,), "down": (None, 16), "up": (16, None)},
    "loha": {"up_1": (16, None), "down_1": (None, 16), "up_2": (16, None), "down_2": (None, 16)},
    "bitfit": {"bias": (16,)},
}
DORA = {"down": (None, 16), "up": (16, None), "magnitude": (16,), "norm_squared": (16,)}


@pytest.mark.parametrize("method", FREE)
def test_ranks_and_widths_are_free_and_what_meets_the_host_is_not(method):
    assert dict(patterns(method).shapes) == FREE[method]


def test_norms_of_a_weight_with_an_update_leave_the_rank_free():
    assert dict(patterns("lora", use_dora=True).shapes) == DORA


@pytest.mark.parametrize("method", ["hra", "oft", "c3a"])
def test_what_zeros_would_change_is_not_free(method):
    assert all(None not in shape for _, shape in patterns(method).shapes)


def test_numbers_and_sizes_are_no_part_of_a_pattern_and_steps_are():
    one = patterns("lora", rank=2, alpha=1.0, init="normal")
    assert one == patterns("lora", rank=4, alpha=9.0, dropout=0.1, scaling="rslora")
    assert one != patterns("lora", use_dora=True) and one != patterns("lora", bias=True)
    assert patterns("adapter", activation="relu") != patterns("adapter", activation="gelu")
