"""One stack: room for rows of tensors of any shape and dtype."""

from __future__ import annotations

import pytest
import torch

from deltaspec.deltas.stack import Layout, Stack


def test_room_is_made_for_many_at_once_or_by_half():
    stack = Stack(Layout({"t": ((2, 3), (torch.float32, torch.device("cpu")))}))
    assert stack.make_room(4)
    assert stack.capacity == 4
    for index in range(4):
        stack.flats[0][stack.take(str(index))] = index + 1
    assert not stack.make_room(0)
    assert stack.make_room(1)
    assert stack.capacity == 6
    assert [float(stack.tensors["t"][row].unique()) for row in stack.names.values()] == [1, 2, 3, 4]
    assert not stack.tensors["t"][0].any()
    stack.release("2", again=True)
    assert stack.take("new") == 3
    stack.release("1", again=False)  # it may be seen from outside
    assert [stack.take(name) for name in ("x", "y")] == [5, 6]
    assert stack.make_room(1)  # without growing: the row that was left comes back in the new memory
    assert stack.capacity == 6
    assert stack.take("z") == 2


@pytest.mark.parametrize("limit, capacity", [(5, 5), (100, 6), (3, 5)])
def test_growth_keeps_to_a_limit_that_is_enough(limit, capacity):
    stack = Stack(Layout({"t": ((1,), (torch.float32, torch.device("cpu")))}))
    stack.make_room(4)
    for index in range(4):
        stack.take(str(index))
    stack.make_room(1, limit)
    assert stack.capacity == capacity


def test_tensors_of_any_shape_and_dtype_have_rows():
    cpu = torch.device("cpu")
    shapes = {"scalar": (), "odd": (3, 5), "none": (0, 4), "half": (7,), "number": (2,)}
    dtypes = {"half": torch.bfloat16, "number": torch.int64}
    stack = Stack(Layout({key: (shape, (dtypes.get(key, torch.float32), cpu)) for key, shape in shapes.items()}))
    stack.make_room(2)
    values = {}
    for name in ("one", "two"):
        row = stack.take(name)
        for key, shape in shapes.items():
            values[name, key] = (torch.randn(shape) * 10).to(dtypes.get(key, torch.float32))
            stack.view(key, row).copy_(values[name, key])
    for (name, key), value in values.items():
        view = stack.view(key, stack.names[name])
        assert torch.equal(view, value)
        assert view.untyped_storage().nbytes() == value.nbytes
    assert len(stack.flats) == 3
