"""Tensors of deltas that others replace, for good or for one call: what stands there when a forward runs acts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from live_model import IDS, build, llama, logits, lora, net
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

from deltaspec.compiler.compiled import CompiledModel

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Zero(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0


def small(capture: str) -> CompiledModel:
    return build(lora(target=["up", "head"]), model=net(), capture=capture)


def own(compiled: CompiledModel, name: str = "a") -> dict[str, Tensor]:
    return {n: p for n, p in compiled.named_parameters() if f".{name}." in n}


def ups(compiled: CompiledModel) -> list[str]:
    return [name for name, _ in compiled.deltas["a"].named_parameters() if name.endswith("up")]


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_functional_call_and_its_gradients(capture):
    compiled = small(capture)
    tensors = {name: tensor.detach() for name, tensor in own(compiled).items()}
    with compiled.detached():
        bare = compiled(X)
    assert torch.equal(functional_call(compiled, {n: torch.zeros_like(t) for n, t in tensors.items()}, (X,)), bare)
    found = grad(lambda given: functional_call(compiled, given, (X,)).pow(2).sum())(tensors)
    wanted = torch.autograd.grad(compiled(X).pow(2).sum(), [*own(compiled).values()])
    for name, expected in zip(tensors, wanted, strict=True):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found[name], expected)
    per_sample = vmap(grad(lambda t, x: functional_call(compiled, t, (x[None],)).pow(2).sum()), (None, 0))(tensors, X)
    for name in tensors:
        torch.testing.assert_close(per_sample[name].sum(0), found[name], rtol=1e-4, atol=1e-4)


def test_vmap_over_models():
    models = [build(lora()), build(lora())]
    for model in models:
        logits(model)
    with torch.no_grad():
        for parameter in models[1].deltas["a"].parameters():
            parameter.mul_(-2)
        state = stack_module_state([model.backbone for model in models])
        shell = copy.deepcopy(models[0]).to("meta").backbone
        found = vmap(lambda *given: functional_call(shell, given, kwargs={"input_ids": IDS}).logits)(*state)
    for model, output in zip(models, found, strict=True):
        torch.testing.assert_close(output, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("delta", [
    lora(), {"name": "a", "method": "adapter", "params": {"width": 4}},
    {"name": "a", "method": "bitfit", "target": "lm_head"}, {"name": "a", "method": "vera", "params": {"rank": 4}},
    {"name": "a", "method": "full", "target": "model.norm"},
], ids=lambda delta: delta["method"])  # fmt: skip
def test_new_parameters_act_and_are_trained(delta):
    compiled = build(delta)
    before = logits(compiled)
    for name, parameter in list(compiled.deltas["a"].named_parameters()):
        setattr(compiled.deltas["a"], name, nn.Parameter(torch.zeros_like(parameter)))
    compiled(input_ids=IDS).logits.sum().backward()
    assert not torch.equal(logits(compiled), before)
    assert all(p.grad is not None for p in compiled.deltas["a"].parameters())


@pytest.mark.parametrize("way", ["parametrize", "prune", "assign", "average"])
def test_what_computes_or_replaces_a_tensor(way):
    compiled = build(lora())
    with compiled.detached():
        bare = logits(compiled)
    delta, acting = compiled.deltas["a"], compiled
    for name in ups(compiled):
        if way == "parametrize":
            parametrize.register_parametrization(delta, name, Zero())
        elif way == "prune":
            prune.random_unstructured(delta, name, amount=1.0)
    if way == "assign":
        zeroed = {n: torch.zeros_like(t) if ".a." in n else t for n, t in compiled.state_dict().items()}
        compiled.load_state_dict(zeroed, assign=True)
    elif way == "average":
        acting = torch.optim.swa_utils.AveragedModel(compiled)
        with torch.no_grad():
            for parameter in acting.module.deltas["a"].parameters():
                parameter.zero_()
    torch.testing.assert_close(logits(acting), bare, rtol=1e-6, atol=1e-6)
    compiled.detach().attach()
    torch.testing.assert_close(logits(acting), bare, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_reads_its_own(copied):
    compiled = build(lora())
    twin = copied(compiled)
    assert torch.equal(logits(twin), logits(compiled))
    with torch.no_grad():
        for parameter in twin.deltas["a"].parameters():
            parameter.zero_()
    with compiled.detached():
        bare = logits(compiled)
    assert torch.equal(logits(twin), bare) and not torch.equal(logits(compiled), bare)


@pytest.mark.parametrize("way", ["functional_call", "grad", "new", "parametrize"])
def test_rows_follow(way):
    compiled = build(lora("a"), lora("b")).detach()
    mixed, bare = logits(compiled, deltas=["a", "b"]), logits(compiled)
    tensors = own(compiled)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    call = {"input_ids": IDS, "deltas": ["a", "b"]}
    if way == "grad":
        values = {name: tensor.detach() for name, tensor in tensors.items()}
        found = grad(lambda given: functional_call(compiled, given, kwargs=call).logits.pow(2).sum())(values)
        compiled(**call).logits.pow(2).sum().backward()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor.grad, rtol=1e-4, atol=1e-4)
        return
    if way == "functional_call":
        with torch.no_grad():
            output = functional_call(compiled, zeros, kwargs=call).logits
        assert torch.equal(logits(compiled, deltas=["a", "b"]), mixed)
        assert all(not tensor.any() for tensor in zeros.values())  # the caller's own stay the caller's
    else:
        for name in ups(compiled):
            if way == "new":
                setattr(compiled.deltas["a"], name, nn.Parameter(zeros[f"backbone.deltaspec.a.{name}"]))
            else:
                parametrize.register_parametrization(compiled.deltas["a"], name, Zero())
        output = logits(compiled, deltas=["a", "b"])
    torch.testing.assert_close(output[0], bare[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[1], mixed[1], rtol=1e-5, atol=1e-5)


def test_a_computed_tensor_beside_a_new_one_is_read_by_rows():
    compiled = build(lora("a"), lora("b")).detach()
    mixed, bare, delta = logits(compiled, deltas=["a", "b"]), logits(compiled), compiled.deltas["a"]
    for name in ups(compiled):
        parametrize.register_parametrization(delta, name, Zero())
    down = next(name for name, _ in delta.named_parameters() if name.endswith("down"))
    setattr(delta, down, nn.Parameter(delta.get_parameter(down).detach().clone()))
    output = logits(compiled, deltas=["a", "b"])
    torch.testing.assert_close(output[0], bare[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[1], mixed[1], rtol=1e-5, atol=1e-5)


def test_one_views_call_is_not_seen_by_others():
    compiled = build(lora())
    view = compiled.view()
    expected, seen = logits(view), []
    compiled.backbone.model.register_forward_pre_hook(lambda *_: seen.append(torch.equal(logits(view), expected)))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own(compiled).items()}
    functional_call(compiled, zeros, kwargs={"input_ids": IDS})
    assert seen == [True]
    for name in ups(compiled):  # for good, it is for all
        setattr(compiled.deltas["a"], name, nn.Parameter(torch.zeros_like(compiled.deltas["a"].get_parameter(name))))
    with view.detached():
        bare = logits(view)
    assert torch.equal(logits(view), bare) and torch.equal(logits(compiled), bare)


def test_deltas_of_a_kind_share_a_compiled_graph():
    torch._dynamo.reset()
    compiled = build(*map(lora, "abcd"), {"name": "n", "method": "adapter", "params": {"width": 4}})
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(compiled, fullgraph=True, backend=backend)
    for names in ("a", "b", "c", "d", "n", "", "an", "bn", "a"):
        compiled.only(*names)
        torch.testing.assert_close(logits(fast), logits(compiled), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 4  # one LoRA, the adapter, none, both
    compiled.only("a")
    for name in ups(compiled):
        setattr(compiled.deltas["a"], name, nn.Parameter(torch.zeros_like(compiled.deltas["a"].get_parameter(name))))
    with compiled.detached():
        bare = logits(compiled)
    torch.testing.assert_close(logits(fast), bare, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 4
    torch._dynamo.reset()


def test_compiled_rows_refuse_tensors_that_are_not_in_the_stack():
    torch._dynamo.reset()
    compiled = build(lora("a"), lora("b")).detach()
    bare, rows = logits(compiled), compiled.rows(["a", "b"])
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    mixed = logits(fast, deltas=rows)
    zeros = {f"_orig_mod.{name}": torch.zeros_like(tensor) for name, tensor in own(compiled).items()}
    with pytest.raises(torch._dynamo.exc.Unsupported, match="DS444"):
        functional_call(fast, zeros, kwargs={"input_ids": IDS, "deltas": rows})
    assert torch.equal(logits(fast, deltas=rows), mixed)
    for name in ups(compiled):
        setattr(compiled.deltas["a"], name, nn.Parameter(torch.zeros_like(compiled.deltas["a"].get_parameter(name))))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="DS444"):
        logits(fast, deltas=rows)
    again = logits(fast, deltas=compiled.rows(["a", "b"]))
    torch.testing.assert_close(again[0], bare[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[1], mixed[1], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_fed_with_deltas(strict):
    compiled = build(lora("a"), lora("b", attached=False))
    logits(compiled)
    program = compiled.only("a") and compiled.export((), {"input_ids": IDS}, strict=strict)
    module = program.module()
    torch.testing.assert_close(module(input_ids=IDS).logits, logits(compiled), rtol=1e-5, atol=1e-5)
    with compiled.detached():
        bare = logits(compiled)
    names = [name for name, _ in module.named_parameters() if "deltaspec.a." in name]
    assert len(names) == 8 and set(names) <= {name for name, _ in compiled.backbone.named_parameters()}
    zeros = {name: torch.zeros_like(module.get_parameter(name)) for name in names}
    torch.testing.assert_close(
        functional_call(module, zeros, kwargs={"input_ids": IDS}).logits, bare, rtol=1e-5, atol=1e-5
    )
    other = {n: compiled.backbone.state_dict()[n.replace(".a.", ".b.")] for n in names}
    module.load_state_dict({**module.state_dict(), **other})
    with compiled.only("b"):
        torch.testing.assert_close(module(input_ids=IDS).logits, logits(compiled), rtol=1e-5, atol=1e-5)


def test_a_library_delta_follows_too(tmp_path):
    saved = build(lora("s"))
    saved.save(tmp_path)
    compiled = build(lora("a", attached=False))
    compiled.library(tmp_path)
    compiled.only("s")
    torch.testing.assert_close(logits(compiled), logits(saved), rtol=1e-6, atol=1e-6)
    delta = compiled.deltas["s"]
    for name, parameter in list(delta.named_parameters()):
        setattr(delta, name, nn.Parameter(torch.zeros_like(parameter)))
    with compiled.detached():
        bare = logits(compiled)
    assert torch.equal(logits(compiled), bare)
    assert torch.equal(bare, logits(llama()))
