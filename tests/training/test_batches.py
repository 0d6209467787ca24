"""Streams of batches: an order by seed and epoch alone, taken up anywhere, generators left as they were."""

import pytest
import torch
from torch.utils.data import DataLoader

import deltaspec
from deltaspec.training.batches import Stream


def loader(own=False):
    generator = torch.Generator() if own else None
    return DataLoader(list(range(10)), batch_size=3, shuffle=True, generator=generator, collate_fn=list)


def taken(stream, number):
    return [stream.next() for _ in range(number)]


@pytest.mark.parametrize("own", [False, True])
def test_the_order_is_that_of_seed_and_epoch(own):
    first = taken(Stream("a", loader(own), 1), 8)
    epochs = [[row for batch in part for row in batch] for part in (first[:4], first[4:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    shared, other = loader(own), Stream("b", loader(own), 2)
    one, two = Stream("a", shared, 1), Stream("a", shared, 1)
    mixed = []
    for _ in range(8):  # whatever is drawn in between, and whoever shares the loader
        torch.rand(3)
        mixed.append(one.next())
        other.next()
        two.next()
    assert mixed == first != taken(Stream("b", loader(own), 2), 8)


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (1, 2), (0, 4)])
def test_it_is_taken_up_anywhere(place):
    whole = taken(Stream("a", loader(), 5), 12)
    stream = Stream("a", loader(), 5)
    stream.seek(*place)
    assert taken(stream, 3) == whole[place[0] * 4 + place[1] :][:3]


def test_generators_are_left_as_they_were():
    torch.manual_seed(3)
    before = torch.default_generator.get_state()
    taken(Stream("a", loader(), 1), 6)
    assert torch.equal(torch.default_generator.get_state(), before)


def test_data_that_ends():
    stream = Stream("a", iter([1, 2]), 0)
    assert taken(stream, 2) == [1, 2]
    with pytest.raises(deltaspec.DeltaSpecError, match="DS383.*'a' has no more batches"):
        stream.next()
    with pytest.raises(deltaspec.DeltaSpecError, match="DS383.*'a' has no batches"):
        Stream("a", [], 0).next()
