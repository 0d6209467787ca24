"""The trial of a mixed batch: rows that do not lie in order along the first dimension are refused beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_rows import alone, batch, build, close, entry
from models import Traceable
from tiny_models import BUILDERS
from torch import Tensor, nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


def test_a_batch_in_the_second_dimension_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 1, enable_nested_tensor=False).eval()
    x = torch.randn(5, 4, 16)
    deltas = [entry("a", "lora", "**.out_proj")]
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, example_inputs=x)
    with pytest.raises(DeltaSpecError, match="DS441.*second dimension"):
        compiled(x, deltas=["a", None, None, None])


def test_tokens_flattened_by_a_model_are_told_apart():
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(-1, 8)).reshape(x.shape)

    compiled = build(Flattening().eval(), entry("a", "lora", "inner"), entry("b", "adapter", "inner", width=2))
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        mixed = compiled(x, deltas=["a", None, "b"])
        for row, name in enumerate(["a", None, "b"]):
            with compiled.only(name) if name else compiled.detached():
                assert close(mixed[row], compiled(x[row : row + 1])[0])


def test_hidden_states_that_tell_no_rows_are_refused():
    class Routing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, 8)
            return x.sum() + self.inner(flat[flat[:, 0] > 0]).sum()

    compiled = build(Routing().eval(), entry("a", "lora", "inner"))
    x = torch.randn(2, 16, 8)
    x[0, :3, 0], x[1, :, 0], x[0, 3:, 0] = 1.0, 1.0, -1.0
    with pytest.raises(DeltaSpecError, match="DS442"):
        compiled(x, deltas=["a", None])


class Misplaced(nn.Module):
    """Gives its linear layer the rows of a batch otherwise than in order, along dimension 0."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if self.way == "time first":
            return self.inner(x.transpose(0, 1)).transpose(0, 1)
        if self.way == "time first, flat":
            flat = self.inner(x.transpose(0, 1).reshape(batch * length, width))
            return flat.view(length, batch, width).transpose(0, 1)
        if self.way == "turned round":
            return self.inner(x.flip(0)).flip(0)
        if self.way == "moved on":
            return self.inner(x.roll(1, 0)).roll(-1, 0)
        if self.way == "sorted":
            order = x.sum((1, 2)).argsort()
            return self.inner(x[order])[order.argsort()]
        return torch.cat([self.inner(row[None]) for row in x])


@pytest.mark.parametrize("way", ["time first", "time first, flat", "turned round", "moved on", "sorted", "one by one"])
@pytest.mark.parametrize("length", [4, 5])
def test_rows_that_are_not_along_the_first_dimension_are_refused_before_anything_runs(way, length):
    compiled = build(Misplaced(way).eval(), entry("a", "lora", "inner"))
    with pytest.raises(DeltaSpecError, match="DS442.*inner"):
        compiled(torch.randn(4, length, 8), deltas=["a", None, "a", None])


def test_inputs_that_all_rows_share_are_told_from_rows():
    model = BUILDERS["gpt2"]().eval()
    compiled = build(model, entry("places", "lora", "**.wpe"), entry("a", "lora"))
    given = batch("gpt2")
    with torch.no_grad():
        mixed = compiled(**given, deltas=["places", None, "a", ("places", "a"), None]).logits
        for row, deltas in enumerate(["places", None, "a", ("places", "a"), None]):
            assert close(mixed[row], alone(compiled, given, row, deltas))


def test_a_single_row_shows_nothing_so_the_next_batch_is_still_tried():
    compiled = build(Misplaced("time first").eval(), entry("a", "lora", "inner"))
    compiled(torch.randn(1, 1, 8), deltas=["a"])
    with pytest.raises(DeltaSpecError, match="DS442.*inner"):
        compiled(torch.randn(4, 4, 8), deltas=["a", None, "a", None])


@pytest.mark.parametrize("way", ["time first, flat", "turned round", "moved on", "sorted"])
def test_a_first_batch_that_shows_little_hides_nothing(way):
    x = torch.randn(
        4, 4, 8, generator=torch.Generator().manual_seed(7)
    )  # whose first rows, repeated, hid a sorted order
    for first in (x[:1].repeat(4, 1, 1), torch.zeros(4, 4, 8), x * float("nan"), x[:2], torch.cat([x[:2], x[:2]])):
        compiled = build(Misplaced(way).eval(), entry("a", "lora", "inner"))
        with pytest.raises(DeltaSpecError, match="DS442.*inner"):
            compiled(first, deltas=["a", None, "a", None][: len(first)])


def test_rows_that_are_alike_or_no_numbers_are_tried_on_others():
    compiled = build(Traceable().eval(), entry("a", "lora", "up"))
    compiled(torch.zeros(2, 3, 8, 8), deltas=["a", None])
    compiled = build(Traceable().eval(), entry("a", "lora", "up"))
    x = torch.randn(3, 3, 8, 8)
    x[1] = float("nan")
    assert compiled(x, deltas=["a", "a", None])[[0, 2]].isfinite().all()


def test_rows_inside_of_a_structure_are_tried_too():
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, given: Any) -> Tensor:
            x = given["x"] if isinstance(given, dict) else given[0]
            return self.inner(x.flip(0)).flip(0)

    for given in ({"x": torch.randn(4, 8)}, [torch.randn(4, 8)], (torch.randn(4, 8),)):
        compiled = build(Inside().eval(), entry("a", "lora", "inner"))
        with pytest.raises(DeltaSpecError, match="DS442.*inner"):
            compiled(given, deltas=["a", None, "a", None])


def test_rows_of_whole_numbers_that_are_all_alike_show_nothing():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)).eval()
    compiled = build(model, entry("a", "lora", "1"))
    with pytest.raises(DeltaSpecError, match="DS442.*alike"):
        compiled(torch.ones(3, 4, dtype=torch.long), deltas=["a", None, "a"])
    compiled(torch.tensor([[1, 2], [2, 1], [3, 3]]), deltas=["a", None, "a"])


def test_the_trial_leaves_buffers_as_they_were():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model = Counting().eval()
    compiled = build(model, entry("a", "lora", "inner"))
    compiled(torch.randn(4, 8), deltas=["a", None, "a", None])
    compiled.detach()
    assert compiled.backbone.calls == model.calls == 0


def test_a_model_that_wants_its_rows_in_one_order_is_refused_and_its_own_errors_are_raised():
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.rnn = nn.Linear(8, 8), nn.LSTM(8, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(self.inner(x), lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    x, lengths = torch.randn(3, 5, 8), torch.tensor([5, 3, 2])
    model = Packing().eval()
    spec = {"deltaspec": 1, "deltas": [entry("a", "lora", "inner")]}
    compiled = deltaspec.compile(model, spec, example_inputs=(x, lengths))
    with pytest.raises(DeltaSpecError, match="DS442.*another order"):
        compiled(x, lengths, deltas=["a", None, "a"])
    with pytest.raises(RuntimeError, match="sorted"):
        compiled(x, lengths.flip(0), deltas=["a", None, "a"])
    assert torch.equal(compiled.detach()(x, lengths), model(x, lengths))


def test_a_model_whose_rows_change_one_another_is_refused():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(hidden - hidden.mean(0))

    compiled = build(Centred().eval(), entry("a", "lora", "last"))
    with pytest.raises(DeltaSpecError, match="DS442.*last"):
        compiled(torch.randn(4, 8), deltas=["a", None, "a", None])
