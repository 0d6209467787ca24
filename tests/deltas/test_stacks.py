"""Stacks: rows of one matrix as the storage of many alike deltas."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from moved import moved
from safetensors.torch import load, save
from torch import Tensor

import deltaspec
from deltaspec.backbone.reserved import find
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.deltas.stacks import Stacks, kind_of

LLAMA = ARCHITECTURES["llama"]
ALIKE = ("a", "b", "c")


def delta(name: str, rank: int = 2, method: str = "lora", **more: Any) -> dict[str, Any]:
    return {"name": name, "method": method, "params": {"rank": rank}, "target": {"role": ["attn.q", "attn.v"]}, **more}


def build(*deltas: dict[str, Any], name: str = "llama") -> CompiledModel:
    """Compile three deltas that are alike, or these, and move their tensors off their initial values."""
    compiled = deltaspec.compile(
        ARCHITECTURES[name].model(), {"deltaspec": 1, "deltas": list(deltas or map(delta, ALIKE))}
    )
    return moved(compiled)


def logits(compiled: CompiledModel, *names: str) -> Tensor:
    with torch.no_grad(), compiled.only(*names):
        return compiled(**LLAMA.inputs()).logits


def stacks_of(compiled: CompiledModel) -> Stacks:
    """Stacks for a model's deltas, none of which is stacked yet."""
    found = find(compiled.backbone)
    assert found is not None
    return Stacks(found[1], {planned.name: planned for planned in compiled.plan.deltas})


def rows(stacks: Stacks, name: str) -> dict[str, Tensor]:
    """Return a delta's tensors as its stack has them."""
    stack = stacks.of(name)
    return {key: tensor[stack.names[name]] for key, tensor in stack.tensors.items()}


def assert_stacked(stacks: Stacks, compiled: CompiledModel, *names: str) -> None:
    """The tensors of these deltas are their rows: the same values at the same place."""
    for name in names:
        for key, row in rows(stacks, name).items():
            own = compiled.deltas[name].tensor(key)
            assert torch.equal(own, row), key
            assert own.data_ptr() == row.data_ptr(), key
            assert own.is_contiguous()


def test_parameters_stay_the_objects_they_are():
    compiled = build()
    stacks = stacks_of(compiled)
    before = {name: logits(compiled, name) for name in ALIKE}
    objects = [id(p) for p in compiled.backbone.parameters()]
    compiled.only("a")
    compiled(**LLAMA.inputs()).logits.sum().backward()
    grads = {name: p.grad for name, p in compiled.deltas["a"].named_parameters()}
    stacks.ensure(ALIKE)
    assert_stacked(stacks, compiled, *ALIKE)
    assert [id(p) for p in compiled.backbone.parameters()] == objects
    assert all(p.grad is grads[name] for name, p in compiled.deltas["a"].named_parameters())
    for name in ALIKE:
        assert torch.equal(logits(compiled, name), before[name])


def test_alike_deltas_share_a_stack_and_others_do_not():
    compiled = build(delta("a"), delta("b"), delta("wide", 3), delta("other", method="loha"))
    stacks = stacks_of(compiled)
    stacks.ensure(compiled.deltas)
    assert stacks.of("a") is stacks.of("b")
    assert stacks.of("a").names == {"a": 1, "b": 2}
    assert len({id(stacks.of(name)) for name in compiled.deltas}) == 3
    assert stacks.kind("a") is kind_of(compiled.plan["b"])
    assert stacks.kind("a") is not stacks.kind("wide")
    assert not any(tensor[0].any() for tensor in stacks.of("a").tensors.values())


def test_tensors_that_sites_share_are_stacked_once():
    compiled = build(delta("a", method="vera"))
    stacks = stacks_of(compiled)
    stacks.ensure(["a"])
    assert set(stacks.of("a").tensors) == dict(compiled.deltas["a"].tensors()).keys()
    assert_stacked(stacks, compiled, "a")


def test_an_optimizer_trains_the_rows():
    compiled = build()
    stacks = stacks_of(compiled)
    compiled.only("b")
    optimizer = torch.optim.AdamW(compiled.trainable_parameters(), lr=0.1)
    stacks.ensure(ALIKE)
    before = {name: {k: v.clone() for k, v in rows(stacks, name).items()} for name in ALIKE}
    compiled(**LLAMA.inputs(), labels=LLAMA.inputs()["input_ids"]).loss.backward()
    optimizer.step()
    assert_stacked(stacks, compiled, *ALIKE)
    changed = {
        name for name in ALIKE if any(not torch.equal(v, before[name][k]) for k, v in rows(stacks, name).items())
    }
    assert changed == {"b"}


def test_files_and_copies_hold_a_delta_and_not_its_stack():
    names = [f"d{i}" for i in range(40)]
    compiled = build(*map(delta, names))
    stacks = stacks_of(compiled)

    def size(values: Any) -> int:
        buffer = io.BytesIO()
        torch.save(values, buffer)
        return len(buffer.getvalue())

    one, parameters = size(compiled.deltas["d7"].state_dict()), size(list(compiled.deltas["d7"].parameters()))
    whole, pickled = size(compiled.state_dict()), len(pickle.dumps(compiled))
    stacks.ensure(names)
    assert size(compiled.deltas["d7"].state_dict()) == pytest.approx(one, rel=0.01)
    assert size(list(compiled.deltas["d7"].parameters())) == pytest.approx(parameters, rel=0.01)
    assert size(compiled.state_dict()) == pytest.approx(whole, rel=0.01)
    assert len(pickle.dumps(compiled)) == pytest.approx(pickled, rel=0.01)
    state = {key: value for key, value in compiled.state_dict().items() if "lm_head" not in key}
    restored = load(save(state))
    assert all(torch.equal(restored[key], value) for key, value in state.items())
    twin = copy.deepcopy(compiled.deltas["d7"])
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in twin.parameters())


def test_a_copy_of_the_model_does_not_share_rows():
    compiled = build()
    stacks = stacks_of(compiled)
    stacks.ensure(ALIKE)
    twin = copy.deepcopy(compiled)
    before = logits(compiled, "a")
    with torch.no_grad():
        for parameter in twin.deltas["a"].parameters():
            parameter.zero_()
    assert torch.equal(logits(compiled, "a"), before)
    others = stacks_of(twin)
    others.ensure(ALIKE)
    assert_stacked(others, twin, *ALIKE)
    assert_stacked(stacks, compiled, *ALIKE)


def test_what_is_stacked_stays_and_costs_nothing_again():
    compiled = build()
    stacks = stacks_of(compiled)
    stacks.ensure(["a", "b"])
    made = {key: id(tensor) for key, tensor in stacks.of("a").tensors.items()}
    pointers = [p.data_ptr() for p in compiled.deltas["a"].parameters()]
    stacks.ensure(["b", "a"])
    assert {key: id(tensor) for key, tensor in stacks.of("a").tensors.items()} == made
    assert [p.data_ptr() for p in compiled.deltas["a"].parameters()] == pointers
    before = stacks.of("a").tensors
    stacks.ensure(["c"])  # grows
    assert stacks.of("a").tensors.keys() == before.keys()
    assert all(tensor is not before[key] for key, tensor in stacks.of("a").tensors.items())
    assert_stacked(stacks, compiled, *ALIKE)


def _half(compiled: CompiledModel) -> None:
    compiled.half()


def _data(compiled: CompiledModel) -> None:
    for parameter in compiled.deltas["b"].parameters():
        parameter.data = parameter.data * 2


def _one(compiled: CompiledModel) -> None:
    parameter = next(compiled.deltas["b"].parameters())
    parameter.data = parameter.data * 2


def _assign(compiled: CompiledModel) -> None:
    compiled.load_state_dict({k: v * 2 for k, v in compiled.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [_half, _data, _one, _assign])
def test_tensors_that_were_moved_or_replaced_are_stacked_anew(change):
    compiled = build()
    stacks = stacks_of(compiled)
    stacks.ensure(ALIKE)
    change(compiled)
    wanted = {name: {k: v.detach().clone() for k, v in compiled.deltas[name].tensors()} for name in ALIKE}
    stacks.ensure(["b"])
    stacks.ensure(ALIKE)
    assert_stacked(stacks, compiled, *ALIKE)
    for name in ALIKE:
        for key, value in wanted[name].items():
            assert torch.equal(compiled.deltas[name].tensor(key), value)
            assert stacks.of(name).tensors[key].dtype == value.dtype
    assert len({id(stacks.of(name)) for name in ALIKE}) == 1


def test_one_delta_of_another_dtype_has_a_stack_of_its_own():
    compiled = build()
    stacks = stacks_of(compiled)
    stacks.ensure(ALIKE)
    compiled.deltas["b"].double()
    stacks.ensure(ALIKE)
    assert_stacked(stacks, compiled, *ALIKE)
    assert stacks.of("a") is stacks.of("c")
    assert stacks.of("b").tensors.keys() == stacks.of("a").tensors.keys()
    assert {tensor.dtype for tensor in stacks.of("b").tensors.values()} == {torch.float64}
    assert stacks.kind("a") is stacks.kind("c") is not stacks.kind("b")


def test_rows_that_were_left_are_not_written_while_others_may_see_them():
    compiled = build()
    stacks = stacks_of(compiled)
    stacks.ensure(ALIKE)
    state = compiled.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    compiled.half()
    stacks.ensure(ALIKE)
    compiled.float()
    stacks.ensure(ALIKE)
    for parameter in compiled.deltas["a"].parameters():
        parameter.detach().fill_(7)
    assert all(torch.equal(state[key], before[key]) for key in state)
