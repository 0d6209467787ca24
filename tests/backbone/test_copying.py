"""What users put onto a model is bound to the copy: forwards, closures, partials, hooks, handles."""

from __future__ import annotations

import collections
import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from deltaspec.backbone.clone import clone
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.linspace(-1, 1, 12).reshape(3, 4)
SPEC = {
    "deltaspec": 1,
    "deltas": [{"name": "one", "method": "lora", "params": {"rank": 2}, "target": {"path": "**.a"}}],
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Slotted:
    """A callable over a model, which keeps what it runs in a slot."""

    __slots__ = ("run",)

    def __init__(self, model: Any) -> None:
        self.run = [lambda x: model.head(model.blocks[1](model.blocks[0](x)))]

    def __call__(self, x: Tensor) -> Tensor:
        return self.run[0](x)


def closure(model: Any) -> None:
    inner = model.blocks[0].forward
    model.blocks[0].forward = functools.wraps(inner)(lambda *args: inner(*args) + 1)


def weight_in_a_default(model: Any) -> None:
    def forward(x: Tensor, weight: Tensor = model.head.weight, *, model: Any = model) -> Tensor:
        return F.linear(model.blocks[1](model.blocks[0](x)), weight)

    model.forward = forward


def partials(model: Any) -> None:
    block = model.blocks[0]
    model.blocks[0].forward = functools.partial(lambda scale, x: block.b(block.a(x)) * scale, 2.0)
    model.blocks[1].forward = functools.partial(Block.forward, model.blocks[1])


def methods(model: Any) -> None:
    model.blocks[0].forward = types.MethodType(lambda self, x: self.a(self.b(x)), model.blocks[0])


def containers(model: Any) -> None:
    model.steps = [block.forward for block in model.blocks] + [lambda x: model.head(x)]
    model.named = collections.defaultdict(list, last={"k": (lambda x: model.steps[2](x),)})
    model.forward = lambda x: model.named["last"]["k"][0](model.steps[1](model.steps[0](x)))


def slots(model: Any) -> None:
    model.forward = Slotted(model)


def recursion(model: Any) -> None:
    def run(x: Tensor, index: int = 1) -> Tensor:
        return model.blocks[index](x) if index < 0 else run(model.blocks[index](x), index - 1) if index else deepest(x)

    def deepest(x: Tensor) -> Tensor:
        return model.head(model.blocks[0](x))

    model.forward = lambda x: run(x)


def references(model: Any) -> None:
    model.blocks[1].other, model.take = weakref.ref(model.blocks[0]), model.blocks.__getitem__
    model.__dict__["last"] = weakref.proxy(model.head)
    model.forward = types.MethodType(lambda self, x: self.last(self.take(1)(self.blocks[1].other()(x))), model)


def hooks(model: Any) -> None:
    block = model.blocks[0]
    model.blocks[1].register_forward_hook(lambda module, args, output: output + block.a(args[0]))


def compiled_modules(model: Any) -> None:
    model.compile(backend="eager")
    for block in model.blocks:
        block.compile(backend="eager")


def compiled_forwards(model: Any) -> None:
    model.blocks[0].forward = torch.compile(model.blocks[0].forward, backend="eager")
    model.blocks[0].a.forward = torch.compile(model.blocks[0].a.forward, backend="eager")
    model.blocks[1].forward = torch.compiler.disable(model.blocks[1].forward)


def compiled_child(model: Any) -> None:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")


PUT_ON = (
    closure, weight_in_a_default, partials, methods, containers, slots, recursion, references, hooks, compiled_modules,
    compiled_forwards, compiled_child,
)  # fmt: skip


@pytest.mark.parametrize("put_on", PUT_ON)
def test_what_was_put_onto_a_model_is_bound_to_the_copy(put_on: Callable[[Any], None]):
    torch.manual_seed(0)
    model = Net()
    put_on(model)
    bare = model(X).detach()
    compiled = deltaspec.compile(model, SPEC, capture="modules", example_inputs=(X,))
    for parameter in compiled.trainable_parameters():
        nn.init.normal_(parameter)
    expected = compiled(X)
    expected.sum().backward()
    assert not torch.equal(expected, bare) and all(p.grad is not None for p in compiled.trainable_parameters())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(model(X), bare)
    view, copied = compiled.view().view(), copy.deepcopy(copy.deepcopy(compiled))
    assert torch.equal(view(X), expected) and torch.equal(copied(X), expected)
    assert torch.allclose(compiled.merge()(X), expected, atol=1e-5)
    assert torch.equal(compiled.simplified()(X), expected)
    view.detach()
    for parameter in copied.trainable_parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(view(X), bare) and torch.equal(copied(X), bare) and torch.equal(compiled(X), expected)


def test_what_a_users_hook_writes_to_stays_the_users():
    model, seen, count = Net(), [], 0

    def hook(module: Any, args: Any, output: Any) -> None:
        nonlocal count
        count += 1
        seen.append(module)

    model.head.register_forward_hook(hook)
    twin = clone(model)
    twin(X)
    assert seen == [twin.head] and count == 1


def test_what_was_compiled_after_is_not_what_a_copy_runs():
    torch.manual_seed(0)
    compiled = deltaspec.compile(Net(), SPEC, example_inputs=(X,))
    for parameter in compiled.trainable_parameters():
        nn.init.normal_(parameter)
    expected, bare = compiled(X), compiled.detach()(X)
    compiled.attach()
    for module in (compiled, compiled.backbone, *compiled.backbone.blocks):
        module.compile(backend="eager")
    compiled.register_forward_hook(lambda module, args, output: output + 0 * compiled.backbone.head.weight.sum())
    for made in (compiled.view(), copy.deepcopy(compiled)):
        assert torch.equal(made(X), expected)
        made.detach()
        assert torch.equal(made(X), bare) and torch.equal(compiled(X), expected)


class Alone:
    """Copies as itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> Alone:
        return self


def test_what_would_stay_bound_to_the_original_is_refused_by_its_name():
    model = Net()
    model.blocks[1].run = [Alone(model)]
    with pytest.raises(DeltaSpecError, match=r"DS430.*blocks\.1\.run: a copy of this Alone stays bound"):
        clone(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("alive", [True, False])
def test_handles_of_hooks_remove_the_hooks_of_their_own_copy(when: str, alive: bool):
    torch.manual_seed(0)
    model = Net()
    compiled = None if when == "before" else deltaspec.compile(model, SPEC, capture="modules", example_inputs=(X,))
    target: Any = model if compiled is None else compiled.backbone
    held = target.blocks[0] if alive else nn.Linear(2, 2)
    target.handles = [held.register_forward_hook(lambda module, args, output: output + 1, with_kwargs=False)]
    target.handles.append(held.register_forward_pre_hook(lambda m, a, k: (a, k), with_kwargs=True))
    del held
    compiled = compiled or deltaspec.compile(model, SPEC, example_inputs=(X,))
    expected = compiled(X)
    for made in (compiled.view().view(), copy.deepcopy(copy.deepcopy(compiled)), compiled.simplified("one")):
        assert torch.equal(made(X), expected)
        for handle in made.backbone.handles:
            handle.remove()
        assert torch.equal(made(X), expected) != alive and torch.equal(compiled(X), expected)
    assert compiled.merge("one").handles[0].id == compiled.backbone.handles[0].id


def test_what_torch_compile_put_around_a_model_is_refused():
    with pytest.raises(DeltaSpecError, match="DS415.*would run the original"):
        deltaspec.compile(torch.compile(Net(), backend="eager"), SPEC)


def test_a_forward_that_reads_the_weights_of_its_children_is_not_run_on_others():
    model = Net()
    block, weight = model.blocks[0], model.blocks[0].a.weight
    block.forward = lambda x: block.b(F.linear(x, weight))
    with pytest.raises(DeltaSpecError, match=r"DS412.*lora runs blocks\.0 \(Block\) on other weights"):
        deltaspec.compile(model, SPEC, example_inputs=(X,))
