"""What is laid out in memory is the file that safetensors would have written, to the byte."""

import pytest
import torch
from safetensors.torch import load, save

from deltaspec.formats.layout import Headers, laid_out

KINDS = {
    "dtypes": {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.arange(3, dtype=torch.bfloat16),
        "c": torch.tensor([True, False]),
        "d": torch.arange(5, dtype=torch.int64),
        "e": torch.arange(4, dtype=torch.float16),
    },
    "transposed": {"w": torch.arange(6.0).view(2, 3).T},
    "scalar": {"x": torch.tensor(3.0)},
    "empty": {"x": torch.empty(0, 4), "y": torch.ones(2)},
    "trained": {"p": torch.nn.Parameter(torch.arange(4.0))},
    "shared": dict.fromkeys(("one", "two"), torch.arange(4.0)),
    "none": {},
}


def written(values: dict[str, torch.Tensor]) -> bytes:
    return save({key: value.detach().contiguous().clone() for key, value in values.items()}, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_would_be_written(kind):
    values, headers = KINDS[kind], Headers()
    for given in (values, {key: value.detach() + value.detach() for key, value in values.items()}):
        assert bytes(laid_out(given, headers)[:]) == written(given)
    assert len(headers) == 1


def test_other_names_dtypes_and_shapes_are_other_kinds():
    headers = Headers()
    others = ({"a": torch.ones(4)}, {"b": torch.ones(4)}, {"a": torch.ones(2, 2)}, {"a": torch.ones(4).half()})
    for values in others:
        found = load(bytes(laid_out(values, headers)[:]))
        assert found.keys() == values.keys()
        assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in values.items())
    assert len(headers) == len(others)


def test_the_order_in_which_tensors_come_does_not_matter():
    headers = Headers()
    one = laid_out({"a": torch.ones(2), "b": torch.zeros(3)}, headers)
    other = laid_out({"b": torch.zeros(3), "a": torch.ones(2)}, headers)
    assert one[:] == other[:]
    assert len(headers) == 1
