"""Passes over region graphs: the values stay, only what is proven new is overwritten, the host's code is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import deltaspec
from deltaspec.backbone.forwards import gives_new_tensor, own_forward
from deltaspec.graphs.passes.fuse_addition import add_low_rank, add_low_rank_, add_product, add_product_
from deltaspec.graphs.passes.run import run_passes
from deltaspec.graphs.passes.share_products import add_low_ranks, add_low_ranks_
from deltaspec.graphs.row_ops import toward

SHAPES = ((5,), (1, 5), (3, 5), (1, 1, 5), (2, 3, 5), (2, 1, 40, 5), (64, 5), (0, 5), (2, 0, 5))
ROUND_OFF = {
    torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3,
}  # fmt: skip


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    host = nn.Linear(5, 7)
    x = torch.randn(shape)
    tensors = (F.linear(x, host.weight, host.bias), x, torch.randn(2, 5), torch.randn(7, 2))
    return tuple(t.detach().to(dtype) for t in tensors)


def plain(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return torch.add(y, F.linear(F.linear(x, down), up), alpha=scale)


def product(function: Any) -> Any:
    return lambda y, x, down, up, *scale: function(y, F.linear(x, down), up, *scale)


FORMS = {
    "add_low_rank": add_low_rank,
    "add_low_rank_": add_low_rank_,
    "add_product": product(add_product),
    "add_product_": product(add_product_),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
@pytest.mark.parametrize("dtype", ROUND_OFF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_is_the_formula_within_round_off(form, shape, dtype):
    y, *rest = operands(shape, dtype)
    expected = plain(y, *rest, 1.5)
    with torch.no_grad():
        given = form(y.clone(), *rest, 1.5)
    assert given.shape == expected.shape and given.dtype == dtype
    torch.testing.assert_close(given, expected, rtol=ROUND_OFF[dtype], atol=ROUND_OFF[dtype])


@forms
@pytest.mark.parametrize("dtype", ROUND_OFF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_fresh_delta_adds_nothing_to_the_bit(form, shape, dtype):
    y, x, down, up = operands(shape, dtype)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(form(y.clone(), x, down, torch.zeros_like(up), 2.0), y)


@forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_the_formulas(form, shape):
    found = []
    for function in (plain, form):
        y, *rest = operands(shape, torch.float64)
        leaves = [t.requires_grad_() for t in (y, *rest)]
        function(y * 1.0, *rest, 1.5).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for expected, given in zip(*found, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


@forms
def test_only_what_may_be_overwritten_is(form):
    y, *rest = operands((2, 3, 5))
    kept = y.clone()
    with torch.no_grad():
        given = form(y, *rest, 1.5)
    in_place = form in (FORMS["add_low_rank_"], FORMS["add_product_"])
    assert (given is y) == in_place and torch.equal(y, kept) != in_place


@forms
def test_inputs_that_are_not_contiguous(form):
    y, x, down, up = operands((3, 4, 5))
    turned = x.transpose(0, 1)
    torch.testing.assert_close(
        form(y.transpose(0, 1), turned, down, up, 1.5), plain(y.transpose(0, 1), turned, down, up, 1.5)
    )
    with torch.no_grad():
        other = form(y.transpose(0, 1).clone(), turned, down, up, 1.5)
        torch.testing.assert_close(other, plain(y, x, down, up, 1.5).transpose(0, 1))


@forms
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 5)], ids=str)
def test_autocast_and_mixed_dtypes_fall_back_to_the_formula(form, shape):
    y, *rest = operands(shape)
    for given in (y.bfloat16(), y):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = plain(given.clone(), *rest, 1.5)
            found = form(given.clone(), *rest, 1.5)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    with torch.no_grad():  # torch promotes
        assert form(y.double(), *rest, 1.5).dtype == torch.float64


@forms
@pytest.mark.parametrize("shape", [(4, 1, 5), (4, 3, 5), (4, 2, 3, 5)], ids=str)
def test_mapped_over_a_batch(form, shape):
    _, x, down, up = operands(shape)
    weight = torch.randn(7, 5)

    def site(function: Any) -> Any:
        return lambda row: function(F.linear(row, weight), row, down, up, 1.5)

    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(site(form))(x), site(plain)(x))
    _, given = torch.func.jvp(site(form), (x,), (x,))
    torch.testing.assert_close(given, torch.func.jvp(site(plain), (x,), (x,))[1])


# The graphs


def graph_of(code: Any, *names: str) -> fx.Graph:
    """Trace a formula over `base` and placeholders."""

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(5, 7)

    space: dict[str, Any] = {"code": code}
    exec(f"def forward(self, {', '.join(names)}): return code(self.base, {', '.join(names)})", space)
    Root.forward = space["forward"]
    return Leaf().trace(Root())


def called(graph: fx.Graph) -> list[str]:
    return [
        getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op in ("call_function", "call_module")
    ]


def lora(base: Any, x: Any, down: Any, up: Any, *_: Any) -> Any:
    return torch.add(base(x), F.linear(F.linear(x, down), up), alpha=2.0)


def test_overwriting_needs_an_owned_value_that_nobody_reads_again():
    names = ("x", "down", "up")
    for owned, function in ((True, "add_low_rank_"), (False, "add_low_rank")):
        graph = graph_of(lora, *names)
        run_passes(graph, owned)
        graph.lint()
        assert called(graph) == ["base", function]

    def read_again(base: Any, x: Any, down: Any, up: Any) -> Any:
        y = base(x)
        return torch.lerp(y, torch.add(y, F.linear(F.linear(x, down), up), alpha=2.0), 0.5)

    graph = graph_of(read_again, *names)
    run_passes(graph, True)
    assert called(graph) == ["base", "add_low_rank", "lerp"]

    def narrow_is_read(base: Any, x: Any, down: Any, up: Any) -> Any:
        h = F.linear(x, down)
        return torch.add(base(x), F.linear(h, up)), h

    graph = graph_of(narrow_is_read, *names)
    run_passes(graph, True)
    assert called(graph) == ["linear", "base", "add_product_"]

    def of_the_host(base: Any, x: Any, weight: Any) -> Any:
        return torch.add(base(x), F.linear(x, x))

    graph = graph_of(of_the_host, "x", "weight")
    run_passes(graph, home="deltaspec")
    assert called(graph) == ["base", "linear", "add"]


def chained(base: Any, x: Any, down: Any, up: Any, down_2: Any, up_2: Any) -> Any:
    return torch.add(lora(base, x, down, up), F.linear(F.linear(x.to(torch.float32), down_2), up_2))


def test_a_chain_accumulates_into_one_tensor():
    graph = graph_of(chained, "x", "down", "up", "down_2", "up_2")
    run_passes(graph, True)
    assert called(graph) == ["base", "add_low_rank_", "add_low_rank_"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_that_share_their_products(shape, overwrite):
    function, one = (add_low_ranks_, add_low_rank_) if overwrite else (add_low_ranks, add_low_rank)
    y, x, down, up = operands(shape, torch.float64)
    downs, ups = (down, torch.randn(3, 5).double()), (up, torch.randn(7, 3).double())
    for strengths in ((None, None), (None, torch.tensor(0.3)), (torch.tensor(0.0), torch.tensor(1.0))):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                expected = y.clone()
                for each in zip(downs, ups, (1.5, 0.5), strengths, strict=True):
                    expected = one(expected, x, *each)
                given = function(y.clone(), x, downs, ups, (1.5, 0.5), strengths)
                torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    fresh = tuple(map(torch.zeros_like, ups))
    assert torch.equal(function(y.clone(), x, downs, fresh, (1.5, 0.5), (None, None)), y)


def test_only_updates_of_one_input_share():
    def twice(base: Any, x: Any, down: Any, up: Any, down_2: Any, up_2: Any) -> Any:
        return torch.add(lora(base, x, down, up), F.linear(F.linear(x, down_2), up_2))

    for owned, function in ((True, "add_low_ranks_"), (False, "add_low_ranks")):
        graph = graph_of(twice, "x", "down", "up", "down_2", "up_2")
        run_passes(graph, owned)
        graph.lint()
        assert called(graph) == ["base", function]


@forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strengths_are_exact_at_0_and_1(form, shape):
    y, x, down, up = operands(shape)

    def at(strength: float | None) -> Tensor:
        more = () if strength is None else (torch.tensor(strength),)
        return form(y.clone(), x, down, up, 1.5, *more)

    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(at(0.0), y) and torch.equal(at(1.0), at(None))
            torch.testing.assert_close(at(0.3), torch.lerp(y, plain(y, x, down, up, 1.5), 0.3))


def test_a_strength_is_applied_to_the_narrow_values():
    graph = graph_of(lora, "x", "down", "up", "strength")
    [result] = graph.find_nodes(op="call_function", target=torch.add)
    [strength] = [node for node in graph.find_nodes(op="placeholder") if node.target == "strength"]
    with graph.inserting_after(result):
        scaled = graph.call_function(toward, (result.args[0], result, strength))
    result.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    run_passes(graph, True)
    graph.lint()
    assert called(graph) == ["base", "add_low_rank_"]
    [fused] = graph.find_nodes(op="call_function", target=add_low_rank_)
    assert [str(arg) for arg in fused.args] == ["base", "x", "down", "up", "2.0", "strength"]


# In models


class Net(nn.Module):
    """Two linear layers, the first of which is told by a hook what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def compiled(capture: str = "modules", model: nn.Module | None = None, **params: Any) -> deltaspec.CompiledModel:
    deltas = [
        {"name": name, "method": "lora", "params": {"rank": 2, **params}, "target": {"type": "Linear"}}
        for name in ("a", "b")
    ]
    torch.manual_seed(0)
    model = (model or Net()).eval()
    made = deltaspec.compile(
        model, {"deltaspec": 1, "deltas": deltas}, capture=capture, example_inputs=torch.ones(2, 5)
    )
    for parameter in made.trainable_parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def reference(c: deltaspec.CompiledModel, x: Tensor, names: tuple[str, ...] = ("a", "b")) -> Tensor:
    for place, host in (("first", c.backbone.first), ("second", c.backbone.second)):
        y = F.linear(x, host.weight, host.bias)
        for name in names:
            delta = c.deltas[name]
            y = y + 8.0 * F.linear(F.linear(x, delta.tensor(f"{place}.down")), delta.tensor(f"{place}.up"))
        x = torch.tanh(y) if place == "first" else y
    return x


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize("shape", [(1, 5), (4, 5), (1, 1, 5), (2, 3, 5), (5,)], ids=str)
def test_two_deltas_on_one_site(capture, shape):
    c, x = compiled(capture), torch.randn(shape)
    assert "add_low_rank" in next(iter(c.regions.values())).code
    with torch.no_grad():
        torch.testing.assert_close(c(x), reference(c, x), rtol=1e-4, atol=1e-4)
        c.only("b")
        torch.testing.assert_close(c(x), reference(c, x, ("b",)), rtol=1e-4, atol=1e-4)
    c.attach()
    given = torch.autograd.grad(c(x).square().sum(), list(c.trainable_parameters()))
    expected = torch.autograd.grad(reference(c, x).square().sum(), list(c.trainable_parameters()))
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_what_hooks_keep_is_not_overwritten(capture):
    c, x = compiled(capture), torch.randn(2, 3, 5)
    kept: list[tuple[Tensor, Tensor]] = []
    c.backbone.first.register_forward_hook(lambda module, given, output: kept.append((output, output.clone())))
    with torch.no_grad():
        c(x)
    assert kept and all(torch.equal(held, copied) for held, copied in kept)


def test_a_forward_of_another_library_keeps_its_output():
    model = Net()
    held: list[Tensor] = []

    def keeping(x: Tensor) -> Tensor:
        held.append(nn.Linear.forward(model.first, x))
        return held[-1]

    model.first.forward = keeping  # type: ignore[method-assign]
    c, x = compiled(model=model), torch.randn(2, 3, 5)
    with torch.no_grad():
        c(x)
    assert torch.equal(held[-1], F.linear(x, model.first.weight, model.first.bias))


def test_both_ways_of_compiling_agree():
    c, x = compiled(), torch.randn(2, 3, 5)
    with torch.no_grad():
        expected = c(x)
        torch.testing.assert_close(torch.compile(c, fullgraph=True, backend="eager")(x), expected)
        program = c.export((x,), dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},))
        for size in ((1, 1), (2, 3), (9, 8)):
            if size != (1, 1):
                rows = torch.randn(*size, 5)
                torch.testing.assert_close(program.module()(rows), c(rows))


# The host's own forward


def test_a_linear_host_reads_its_parameters_in_every_call():
    linear, x = nn.Linear(5, 7), torch.randn(2, 5)
    forward = own_forward(linear)
    assert torch.equal(forward(x), linear(x))
    linear.weight = nn.Parameter(torch.randn(7, 5))
    assert torch.equal(forward(x), linear(x))
    linear.bias = None
    assert torch.equal(forward(x), linear(x))
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(forward(x), linear(x))
    linear.double()
    assert torch.equal(forward(x.double()), linear(x.double()))
    linear.__dict__["weight"] = torch.ones(7, 5).double()
    assert torch.equal(forward(x.double()), linear(x.double()))


def test_a_parameter_that_is_kept_elsewhere_is_found():
    x = torch.randn(2, 5)
    pruned = nn.Linear(5, 7)
    forward = own_forward(pruned)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    assert torch.equal(forward(x), pruned(x))
    parametrised = nn.Linear(5, 7)
    forward = own_forward(parametrised)
    parametrizations.weight_norm(parametrised)
    with torch.no_grad():
        parametrised.parametrizations.weight.original0.mul_(3)
    assert torch.equal(forward(x), parametrised(x))


def test_functional_call_reaches_a_linear_host():
    c, x = compiled(), torch.randn(2, 5)
    c.only("a")
    weight = torch.randn_like(c.backbone.first.weight)
    with torch.no_grad():
        given = torch.func.functional_call(c.backbone, {"first.weight": weight}, (x,))
        twin = copy.deepcopy(c)
        twin.backbone.first.weight.copy_(weight)
        assert torch.equal(given, twin(x)) and not torch.equal(given, c(x))


def test_only_plain_layers_are_known_to_give_new_tensors():
    class Cached(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.last = super().forward(input)
            return self.last

    assert gives_new_tensor(nn.Linear) and not gives_new_tensor(Cached) and not gives_new_tensor(nn.Identity)
    model = Net()
    model.first = Cached(5, 7)
    c, x = compiled(model=model), torch.randn(2, 3, 5)
    with torch.no_grad():
        c(x)
        host = c.backbone.first
        assert torch.equal(host.last, F.linear(x, host.weight, host.bias))


# Sites that read one input


class Attention(nn.Module):
    """One traceable attention: q, k and v read one input, and `spoil` may change it in between."""

    def __init__(self, spoil: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, width, bias=False) for width in (6, 6, 6, 4))
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        q = self.q(x).unflatten(-1, (2, 3)).transpose(-2, -3)
        if self.spoil:
            x.mul_(2.0)
        k = self.k(x).unflatten(-1, (2, 3)).transpose(-2, -3)
        v = self.v(x).unflatten(-1, (2, 3)).transpose(-2, -3)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


def attending(model: nn.Module, capture: str, *ranks: int) -> deltaspec.CompiledModel:
    deltas = [
        {"name": f"d{rank}", "method": "lora", "params": {"rank": rank}, "target": {"type": "Linear"}} for rank in ranks
    ]
    made = deltaspec.compile(
        model, {"deltaspec": 1, "deltas": deltas}, capture=capture, example_inputs=torch.ones(2, 5, 6)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in made.trainable_parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return made


@pytest.mark.parametrize("ranks", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 6), (1, 4, 6), (3, 40, 6), (0, 5, 6)], ids=str)
def test_sites_that_read_one_input_share_their_first_product(shape, ranks):
    torch.manual_seed(0)
    model = Attention().double()
    whole, apart = attending(model, "symbolic", *ranks), attending(model, "modules", *ranks)
    assert whole.regions[""].code.count("share_inputs_narrow_products(") == 1
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), apart(x), rtol=1e-12, atol=1e-12)
    given, expected = (torch.autograd.grad(c(x).square().sum(), list(c.trainable_parameters())) for c in (whole, apart))
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.compile(whole, fullgraph=True, backend="eager")(x), whole(x))
    whole.detach()
    assert torch.equal(whole(x), model(x))


def test_an_input_that_may_be_written_in_between_is_not_shared():
    torch.manual_seed(0)
    model = Attention(spoil=True).double()
    whole, apart = attending(model, "symbolic", 2), attending(model, "modules", 2)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), apart(x), rtol=1e-12, atol=1e-12)
    assert whole.regions[""].code.count("add_low_rank(") == 2  # q and o alone; k and v read what was written
