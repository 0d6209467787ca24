"""Parameters as weights: expert stacks of real mixtures, projections of nn.MultiheadAttention, bare matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixtures import IDS, gpt_oss, mixtral, qwen3_moe
from torch import Tensor, nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods
from deltaspec.testing import check_method

MIXTURES = [mixtral, qwen3_moe, gpt_oss]


class Bare(nn.Module):
    """Owns a matrix, a stack, a vector and a kernel with four dimensions, and uses them all."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8))
        self.stack = nn.Parameter(torch.randn(3, 8, 6))
        self.vector = nn.Parameter(torch.randn(8))
        self.kernel = nn.Parameter(torch.randn(2, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x @ self.matrix.t(), self.stack) * self.vector + self.kernel.sum()


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def made(build: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval().requires_grad_(False)


def spec(parameter: Any, method: str = "lora", **params: Any) -> dict[str, Any]:
    target = {"parameter": parameter}
    return {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": params, "target": target}]}


def stirred(compiled: deltaspec.CompiledModel) -> deltaspec.CompiledModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in compiled.deltas["d"].parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return compiled


@pytest.mark.parametrize("build", MIXTURES)
def test_lora_per_expert_is_the_formula_on_each_expert(build):
    model = made(build)
    plain = model(IDS).logits
    compiled = deltaspec.compile(model, spec(["**.experts.gate_up_proj", "**.experts.down_proj"], rank=3, alpha=6.0))
    assert torch.equal(compiled(IDS).logits, plain)
    names = [site.fqn for site in compiled.plan.sites]
    assert names == [f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("down_proj", "gate_up_proj")]
    turned = build is gpt_oss
    expected = 0
    for site in compiled.plan.sites:
        experts, *widths = model.get_parameter(site.fqn).shape
        out, into = reversed(widths) if turned else widths
        shapes = {t.name: t.shape for t in site.tensors}
        assert shapes == {"down": (experts, 3, into), "up": (experts, out, 3)}
        expected += experts * 3 * (into + out)
    assert compiled.plan.trainable == expected == sum(p.numel() for p in compiled.trainable_parameters())
    # All experts start apart, each within the bounds of its own width.
    down = compiled.deltas["d"].tensor(f"{names[0]}.down")
    assert len({expert.sum().item() for expert in down}) == 4
    assert 0.9 / down.shape[-1] ** 0.5 < down.abs().max() <= 1 / down.shape[-1] ** 0.5
    stirred(compiled)

    reference = made(build)
    leaves = {}
    for site in compiled.plan.sites:
        weight = reference.get_parameter(site.fqn)
        down, up = (
            compiled.deltas["d"].tensor(f"{site.fqn}.{n}").detach().clone().requires_grad_() for n in ("down", "up")
        )
        leaves[site.fqn] = down, up
        each = []
        for expert in range(4):
            update = 2.0 * up[expert] @ down[expert]
            each.append(weight[expert] + (update.t() if turned else update))
        owner = reference.get_submodule(site.site.row.fqn)
        del owner._parameters[site.site.parameter]
        setattr(owner, site.site.parameter, torch.stack(each))
    ours, theirs = compiled(IDS).logits, reference(IDS).logits
    assert not torch.allclose(ours, plain, atol=1e-3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for fqn, (down, up) in leaves.items():
        for name, leaf in (("down", down), ("up", up)):
            torch.testing.assert_close(
                compiled.deltas["d"].tensor(f"{fqn}.{name}").grad, leaf.grad, atol=1e-4, rtol=1e-4
            )
    merged = compiled.merge("d")
    torch.testing.assert_close(merged(IDS).logits, theirs, atol=1e-5, rtol=1e-5)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in model.named_parameters()]
    compiled.detach()
    assert torch.equal(compiled(IDS).logits, plain)


@pytest.mark.parametrize("build", MIXTURES)
def test_a_plan_on_the_meta_device_proves_that_the_experts_are_reached(build):
    with torch.device("meta"):
        model = build()
    before = model.config._experts_implementation
    plan = deltaspec.plan(model, spec("**.experts.*_proj", rank=2))
    assert plan.proven and not plan.notes
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_sees_the_changed_weights(implementation):
    model = made(mixtral)
    model.set_experts_implementation(implementation)
    compiled = stirred(deltaspec.compile(model, spec("**.experts.*_proj", rank=2)))
    torch.testing.assert_close(compiled.merge("d")(IDS).logits, compiled(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-3)


MATRIX = sorted(name for name, method in methods().items() if method.matrices)


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("parameter", ["inner.matrix", "inner.stack"])
def test_every_method_for_matrices_keeps_its_contract_on_them(method, parameter):
    check_method(
        method, made(lambda: Outer(Bare())), torch.linspace(-1, 1, 16).reshape(2, 8),
        target={"parameter": parameter}, params=methods()[method].small,
    )  # fmt: skip


@pytest.mark.parametrize("method", MATRIX)
def test_a_stack_is_folded_as_its_matrices_are_one_by_one(method):
    """Each expert alone, as the weight of a Linear with the same tensors, gives the same weight."""
    from deltaspec.deltas.modules import storage_key

    stack = made(lambda: Outer(Bare()))
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    compiled = stirred(deltaspec.compile(stack, spec("**.stack", method, **methods()[method].small), example_inputs=x))
    folded = compiled.merge("d").inner.stack
    for expert in range(3):
        layer = nn.Sequential(nn.Linear(6, 8, bias=False)).requires_grad_(False)
        layer[0].weight.copy_(stack.inner.stack[expert])
        alone = deltaspec.compile(
            layer,
            {"deltaspec": 1, "deltas": [
                {"name": "d", "method": method, "params": methods()[method].small, "target": "0"}
            ]},
            example_inputs=torch.ones(1, 6),
        )  # fmt: skip
        [ours], [theirs] = alone.plan.sites, compiled.plan.sites
        with torch.no_grad():
            for one, many in zip(ours.tensors, theirs.tensors, strict=True):
                value = compiled.deltas["d"].tensor(storage_key(theirs.site.row.fqn, many))
                alone.deltas["d"].tensor(storage_key("0", one)).copy_(value[expert] if many.stack else value)
        torch.testing.assert_close(alone.merge("d")[0].weight, folded[expert], atol=1e-5, rtol=1e-5)


STARTS_AS_IDENTITY = [m for m in MATRIX if methods()[m].promises.identity_at_start]


@pytest.mark.parametrize("build", MIXTURES)
@pytest.mark.parametrize("method", STARTS_AS_IDENTITY)
def test_a_fresh_delta_on_experts_changes_no_bit(method, build):
    model = made(build)
    params = methods()[method].small
    compiled = deltaspec.compile(model, spec("**.experts.*_proj", method, **params))
    assert torch.equal(compiled(IDS).logits, model(IDS).logits)


def test_the_fused_projection_of_multihead_attention():
    model, x = made(Attention), torch.randn(2, 5, 16)
    plan = check_method("lora", model, x, target={"parameter": "attn.in_proj_weight"}, params={"rank": 2})
    assert plan.trainable == 2 * (16 + 48)
    compiled = stirred(deltaspec.compile(model, spec("**.in_proj_weight", rank=2), example_inputs=x))
    down, up = (compiled.deltas["d"].tensor(f"attn.in_proj_weight.{n}") for n in ("down", "up"))
    reference = made(Attention)
    with torch.no_grad():
        reference.attn.in_proj_weight += 8.0 * up @ down
    torch.testing.assert_close(compiled(x), reference(x), atol=1e-5, rtol=1e-5)


def test_a_routers_matrix_and_the_weight_of_a_called_module():
    model = made(mixtral)
    for parameter in ("**.gate.weight", "**.q_proj.weight", "**.embed_tokens.weight"):
        compiled = stirred(deltaspec.compile(model, spec(parameter, rank=2)))
        assert not torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-4)
        torch.testing.assert_close(compiled.merge("d")(IDS).logits, compiled(IDS).logits, atol=1e-5, rtol=1e-5)


def test_two_parameters_of_one_module_are_saved_apart(tmp_path):
    model, x = made(lambda: Outer(Bare())), torch.linspace(-1, 1, 16).reshape(2, 8)
    compiled = stirred(deltaspec.compile(model, spec(["**.matrix", "**.stack"], rank=2), example_inputs=x))
    keys = [key for key, _ in compiled.deltas["d"].tensors()]
    assert keys == [f"inner.{p}.{t}" for p in ("matrix", "stack") for t in ("down", "up")]
    compiled.save(tmp_path)
    assert torch.equal(deltaspec.restore(model, tmp_path, example_inputs=x)(x), compiled(x))


@pytest.mark.parametrize(
    ("parameter", "params", "said", "way_out"),
    [
        ("**.vector", {}, "this parameter of a Bare has 1 dimension: [8]", "use method full"),
        ("**.kernel", {}, "has 4 dimensions: [2, 2, 2, 2]", "use method full"),
        ("**.matrix", {"dropout": 0.1}, "so dropout on its input has no place", "set dropout: 0"),
        ("**.stack", {"bias": True}, "reads no bias here", "set bias: false"),
        ("**.stack", {"init": "pissa", "rank": 7}, "this weight has rank 6, not 7", "use rank: 6"),
    ],
)
def test_refusals_name_a_way_out(parameter, params, said, way_out):
    model = made(lambda: Outer(Bare()))
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.plan(model, spec(parameter, **params), example_inputs=torch.ones(2, 8))
    assert "DS402" in str(caught.value) and said in str(caught.value) and way_out in str(caught.value)


def test_methods_that_take_modules_only_say_so():
    model = made(mixtral)
    for method in ("adapter", "bitfit"):
        with pytest.raises(DeltaSpecError, match="takes modules, not the parameter"):
            deltaspec.plan(model, spec("**.experts.down_proj", method))


@pytest.mark.parametrize(
    "params", [{"use_dora": True}, {"init": "orthogonal"}, {"init": "pissa"}, {"scaling": "rslora", "init": "normal"}]
)
def test_variants_of_lora_per_expert(params):
    check_method("lora", made(mixtral), IDS, target={"parameter": "**.experts.down_proj"}, params={"rank": 2, **params})


def test_experts_under_torch_compile_and_in_bfloat16():
    model = made(mixtral)
    model.set_experts_implementation("batched_mm")
    compiled = stirred(deltaspec.compile(model, spec("**.experts.*_proj", rank=2)))
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(IDS).logits, compiled(IDS).logits, atol=1e-5, rtol=1e-5)
    half = stirred(deltaspec.compile(made(mixtral).bfloat16(), spec("**.experts.*_proj", rank=2)))
    assert half(IDS).logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in half.trainable_parameters())


@pytest.mark.parametrize("method", ["lora", "vera", "loha"])
def test_a_module_that_is_no_layer_is_refused_with_its_own_matrices_named(method):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": {"type": "MultiheadAttention"}}]}
    with pytest.raises(DeltaSpecError, match="DS402") as caught:
        deltaspec.plan(model, spec, example_inputs=torch.randn(2, 3, 16))
    assert "{type: MultiheadAttention, parameter: in_proj_weight}" in str(caught.value.diagnostics[0].suggestion)
    spec["deltas"][0]["target"]["parameter"] = "in_proj_weight"
    assert deltaspec.plan(model, spec, example_inputs=torch.randn(2, 3, 16)).sites
