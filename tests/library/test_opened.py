"""What of a library is in memory: limits, what makes way, what is left when a delta is dropped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from inside import KEPT, programs_kept, rows_of_memory
from saved_library import LLAMA, NAMES, OWN, build, codes, lora, run
from views import alone, code, outputs, serve

from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError


def test_those_not_used_for_longest_make_way(saved):
    directory, wanted = saved
    compiled = build(OWN)
    library = compiled.library(directory, limit=2)
    for names, loaded in (
        (("french",), ("french",)),
        (("german",), ("french", "german")),
        (("french",), ("german", "french")),  # a switch counts as use
        (("spanish",), ("french", "spanish")),
        (("dutch", "french"), ("dutch", "french")),
    ):
        compiled.only(*names)
        assert set(library.loaded) == set(loaded)
    assert rows_of_memory(compiled) <= 4
    for name in (*NAMES, *NAMES):
        assert torch.equal(run(compiled, name), wanted[name])
    compiled.only("french", "german")
    with pytest.raises(DeltaSpecError, match="limit") as error:
        compiled.attach("dutch")
    assert codes(error) == ["DS531"]
    assert compiled.attached == ("french", "german")
    assert set(library.loaded) == {"french", "german"}


@pytest.mark.parametrize("limit, count", [("1GiB", 4), ("7kB", 2), ("7.5 kB", 2), ("4 kiB", 1), ("3328B", 1)])
def test_a_limit_may_be_a_size(saved, limit, count):
    compiled = build(OWN)
    library = compiled.library(saved[0], limit=limit)
    size = library.load("french").nbytes
    assert size == 3328, "the limits above are made for this size"
    for name in NAMES:
        compiled.only(name)
    assert len(library.loaded) == count
    assert library.nbytes == count * size


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "many", "2", "2XB"])
def test_what_is_no_limit_is_refused(saved, limit):
    compiled = build(OWN)
    with pytest.raises(ValueError, match="limit"):
        compiled.library(saved[0], limit=limit)
    with pytest.raises(UnknownDeltaError):
        compiled.only("french")


def test_tensors_that_a_user_holds_are_not_written_by_the_next_delta(saved):
    directory, _ = saved
    compiled = build(OWN)
    library = compiled.library(directory, limit=1).load("french")
    kept, state = compiled.deltas["french"], compiled.deltas["french"].state_dict()
    before = {key: value.clone() for key, value in state.items()}
    for name in ("german", "spanish", "dutch", "german"):
        library.load(name)
    assert library.loaded == ("german",)
    for key, value in before.items():
        assert torch.equal(state[key], value)
        assert torch.equal(kept.get_parameter(key), value)


def test_a_backward_through_a_delta_that_was_dropped_is_refused(saved):
    compiled = build(OWN)
    library = compiled.library(saved[0], limit=1)
    compiled.only("own", "french")
    loss = compiled(**LLAMA.inputs()).logits.sum()
    compiled.only("own")
    library.load("german")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_in_training_is_not_dropped(saved):
    compiled = build(OWN)
    library = compiled.library(saved[0], limit=2)
    compiled.only("french")
    for parameter in compiled.deltas["french"].parameters():
        parameter.requires_grad_()
    assert list(compiled.trainable_parameters())
    compiled.detach()
    library.load("german")
    library.load("spanish")
    assert set(library.loaded) == {"french", "spanish"}
    with pytest.raises(DeltaSpecError, match="gradient"):
        library.drop("french")
    for parameter in compiled.deltas["french"].parameters():
        parameter.requires_grad_(False)
    library.drop("french")


def test_programs_are_bounded(saved, monkeypatch):
    monkeypatch.setattr(KEPT, 3)
    directory, wanted = saved
    compiled = build(OWN)
    compiled.library(directory, limit=2)
    for _ in range(3):
        for name in NAMES:
            assert torch.equal(run(compiled, name), wanted[name])
            run(compiled, "own", name)
    assert programs_kept(compiled) <= 6


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("limit", [None, 9])
def test_views_load_deltas_of_one_library_at_once(tmp_path, limit):
    """With a limit, each thread's loading drops what no other is using (one attached, one in rows); stacks grow."""
    names = tuple(f"n{i}" for i in range(12))
    source = build(*(lora(name) for name in names))
    source.save(tmp_path)
    expected = alone(source, names)
    compiled = build(lora("own"))
    library = compiled.library(tmp_path, limit=limit)
    views = [compiled, *(compiled.view() for _ in range(3))]
    with ThreadPoolExecutor(len(views)) as pool:
        found = list(pool.map(lambda i: serve(views[i], i, names, expected, 40), range(len(views))))
    assert found == [0] * len(views)
    assert limit is None or len(library.loaded) <= limit
    for view in views:
        view.detach()
        assert set(view.deltas) == set(compiled.deltas)
    library.close()
    with pytest.raises(DeltaSpecError, match="DS434"):
        views[1].only("n1")


def test_a_delta_of_a_library_stays_while_any_view_uses_it(tmp_path):
    names = ("n1", "n2", "n3")
    source = build(*(lora(name) for name in names))
    source.save(tmp_path)
    expected = alone(source, names)
    compiled = build(lora("own"))
    library = compiled.library(tmp_path, limit=2)
    view = compiled.view()
    view.only("n1")
    for name in ("n2", "n3", "n2"):
        compiled.only(name)
        assert torch.equal(outputs(view), expected["n1"]) and torch.equal(outputs(compiled), expected[name])
    with pytest.raises(DeltaSpecError) as error:
        library.drop("n1")
    assert code(error) == "DS532"
    view.train()
    assert torch.equal(outputs(compiled.eval()), expected["n2"])
