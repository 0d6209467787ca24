"""Deltas that change a weight which is kept as codes: beside what the codes' kernel gives."""

import pytest
import torch
from packed_bases import UNREADABLE, Offered, inputs, net

import deltaspec
from deltaspec.methods.registry import methods

CHANGES = ("hira", "boft", "oft", "lora", "miss")


def compiled(form, method, params=None, dtype=torch.float32):
    target = {"path": ["a", "b"]}
    given = dict(methods()[method].small) if params is None else params
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": given, "target": target}]}
    return deltaspec.compile(net(form, dtype), spec, example_inputs=inputs(dtype))


def trained(made):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.deltas["d"].parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def plain_values():
    """Return the plain net with the values that the codes stand for."""
    packed, plain = net(Offered), net()
    with torch.no_grad():
        plain.a.weight.copy_(packed.a.weight)
        plain.b.weight.copy_(packed.b.weight)
    return plain


@pytest.mark.parametrize("method", CHANGES)
def test_attached_and_merged_compute_what_they_do_on_plain_values(method):
    params = {"rank": 2, "variant": "bat"} if method == "miss" else None
    made = compiled(Offered, method, params)
    assert torch.equal(made(inputs()), net(Offered)(inputs()))
    trained(made)
    spec = made.plan.specs[0]
    wanted = trained(deltaspec.compile(plain_values(), spec, example_inputs=inputs()))(inputs())
    assert not torch.allclose(wanted, plain_values()(inputs()), atol=1e-3)
    assert torch.allclose(made(inputs()), wanted, atol=1e-5)
    merged = made.merge()
    assert type(merged.a) is torch.nn.Linear and merged.a.weight.dtype == torch.float32
    assert torch.allclose(merged(inputs()), wanted, atol=1e-5)


def test_gradients_are_those_on_plain_values():
    made = trained(compiled(Offered, "hira"))
    other = trained(deltaspec.compile(plain_values(), made.plan.specs[0], example_inputs=inputs()))
    for one in (made, other):
        one(inputs()).square().sum().backward()
    for ours, theirs in zip(made.deltas["d"].parameters(), other.deltas["d"].parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5) and ours.grad.abs().sum() > 0


@pytest.mark.parametrize("form", UNREADABLE.values())
def test_a_layer_without_a_bias_takes_hidden_states_of_any_dtype(form):
    made = trained(compiled(form, "lora", dtype=torch.bfloat16))
    assert made(inputs(torch.bfloat16)).dtype == torch.bfloat16


def test_rows_of_a_batch_go_beside_the_codes_too():
    made = trained(compiled(Offered, "hira"))
    alone = made(inputs()[:2])
    bare = net(Offered)(inputs()[:2])
    mixed = made(inputs()[:2], deltas=["d", None])
    assert torch.allclose(mixed[0], alone[0], atol=1e-6) and torch.allclose(mixed[1], bare[1], atol=1e-6)
