"""Values as they lie: quantised, offloaded, on the meta device."""

from __future__ import annotations

import torch
from accelerate import cpu_offload
from quantised_weights import quantised
from torch import Tensor, nn

from deltaspec.backbone.values import known_values


def test_quantised_values_are_read_as_what_they_stand_for():
    module = nn.Linear(8, 8)
    before = module.weight.detach().clone()
    quantised(module)
    values = known_values(module, "weight", module.weight)
    assert values.bits == 8 and values.plain is not None and type(values.plain) is Tensor
    assert torch.allclose(values.plain, before, atol=0.01)


def test_offloaded_values_are_read_where_they_are():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    cpu_offload(module)
    assert module.weight.is_meta
    found = known_values(module, "weight", module.weight).plain
    assert found is not None and torch.equal(found, before)
    module = nn.Linear(3, 2, device="meta")
    assert known_values(module, "weight", module.weight).plain is None
