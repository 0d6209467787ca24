"""Counts, shapes and values of weights that are kept as codes or computed, in forms that need no package."""

import pytest
import torch
from packed_bases import UNREADABLE, Offered, net
from torch import nn
from torch.nn.utils import parametrizations, prune

from deltaspec.backbone.tabulate import tabulate
from deltaspec.backbone.weight_forms import dtype_of_values, is_packed, own_values, packed_weight, values_of


@pytest.mark.parametrize("form", [*UNREADABLE.values(), Offered])
def test_a_packed_model_has_the_sizes_of_the_plain_one(form):
    plain, packed = tabulate(net()), tabulate(net(form))
    assert packed.parameters == plain.parameters
    for one, other in zip(plain.rows[1:], packed.rows[1:], strict=True):
        assert (one.fqn, one.kind, one.in_features, one.subtree_parameters) == (
            other.fqn, other.kind, other.in_features, other.subtree_parameters
        )  # fmt: skip
        assert [(p.name, p.shape) for p in one.parameters] == [(p.name, p.shape) for p in other.parameters]
    assert [row.packed is not None for row in packed.rows] == [False, True, True, False]
    assert all(row.packed.readable == (form is Offered) for row in packed.rows if row.packed)


def test_values_are_those_that_the_layer_computes_with():
    module = net(Offered).a
    given = torch.eye(module.in_features)
    assert torch.allclose(values_of(module), (module(given) - module.bias).t(), atol=1e-6)
    assert own_values(module).keys() == {"weight", "bias"} and dtype_of_values(module) == torch.float32
    hidden = net(UNREADABLE["parameter"]).a
    assert own_values(hidden).keys() == {"bias"}
    with pytest.raises(TypeError, match="packed uint8"):
        values_of(hidden)


def test_plain_modules_are_not_packed():
    for module in (nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.LayerNorm(3), nn.Conv1d(2, 2, 1), nn.LSTM(2, 2)):
        assert packed_weight(module) is None and not is_packed(module)
    counts = nn.Module()
    counts.weight = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert not is_packed(counts)  # no layer of which one knows what its weight is


@pytest.mark.parametrize("make", [
    nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm,
    lambda module: prune.l1_unstructured(module, "weight", 0.5),
], ids=["weight_norm", "spectral_norm", "parametrisation", "pruning"])  # fmt: skip
def test_a_computed_weight_is_computed_anew(make):
    module = make(nn.Linear(4, 4)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)  # as loading does: hooks compute at the next forward
        given = torch.eye(4)
        wanted = (module(given) - module(torch.zeros(4, 4))).t()
        assert torch.allclose(values_of(module), wanted, atol=1e-6)
    row = tabulate(nn.ModuleDict({"m": module})).rows[1]
    assert "weight" in (*row.computed, *row.parametrised)
