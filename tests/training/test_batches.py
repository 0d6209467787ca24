"""Streams of batches: an order by seed and epoch alone, taken up anywhere, generators left as they were."""

import pytest
import torch
from torch.utils.data import DataLoader

import deltaspec
from deltaspec.training.batches import Stream, read_by_many


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


class Drawn:
    """Batches whose order is drawn one by one, of a generator under a name of its own."""

    def __init__(self):
        self.own = torch.Generator().manual_seed(7)

    def __iter__(self):
        for _ in range(4):
            yield torch.randint(100, (2,), generator=self.own).tolist()


def test_a_shared_loader_that_draws_as_it_goes_gives_each_its_own_order():
    data = DataLoader(range(100), batch_sampler=Drawn(), collate_fn=list)
    before = data.batch_sampler.own.get_state()
    alone = taken(Stream("a", data, 1), 8)
    one, two = Stream("a", data, 1), Stream("b", data, 2)
    assert [(one.next(), two.next())[0] for _ in range(8)] == alone
    assert torch.equal(data.batch_sampler.own.get_state(), before)


def test_what_is_read_once_is_read_by_one_and_not_again():
    rows = iter(range(9))
    loader = DataLoader(range(3), num_workers=1, persistent_workers=True)
    [finding] = read_by_many(["a", "b", "c", "d"], [rows, [1], rows, None])
    assert finding.code == "DS382" and "'a' and 'c'" in finding.message
    assert len(read_by_many(["a", "b"], [loader, loader])) == 1
    assert not read_by_many(["a", "b"], [[1], iter([1])])
    stream = Stream("a", rows, 0)
    assert taken(stream, 3) == [0, 1, 2]
    stream.seek(0, 1)
    with pytest.raises(deltaspec.DeltaSpecError, match="DS383.*'a' has no more batches"):
        stream.next()
