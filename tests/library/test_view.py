"""What a user has of a library: names, loading before it is needed, dropping, closing."""

from __future__ import annotations

import gc

import pytest
import torch
from inside import rows_of_memory
from saved_library import LLAMA, NAMES, OWN, build, codes, run

from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError


def test_names_are_known_and_loaded_on_demand(saved):
    directory, wanted = saved
    compiled = build(OWN)
    bare, state = run(compiled), compiled.state_dict().keys()
    library = compiled.library(directory)
    assert library.names == NAMES == tuple(library)
    assert (len(library), library.loaded, library.nbytes) == (4, (), 0)
    assert "french" in library and "own" not in library
    assert list(compiled.deltas) == ["own"]
    for name in ("german", "french", "german"):
        assert torch.equal(run(compiled, name), wanted[name])
    assert library.loaded == ("french", "german")
    assert list(compiled.deltas) == ["own", "french", "german"]
    assert library.nbytes == sum(t.nbytes for name in library.loaded for _, t in compiled.deltas[name].tensors())
    assert "4 deltas, 2 loaded" in repr(library)
    compiled.attach("dutch")
    assert compiled.attached == ("dutch",)
    compiled.detach()
    assert compiled.attached == ()
    assert torch.equal(run(compiled), bare)
    assert compiled.state_dict().keys() == state
    assert compiled.attach().attached == ("own",)  # all means all that were compiled
    assert [delta.name for delta in compiled.plan.deltas] == ["own"]


def test_rows_of_a_batch_name_them(saved):
    directory, wanted = saved
    compiled = build(OWN)
    library = compiled.library(directory, limit=2)
    with torch.no_grad():
        output = compiled(**LLAMA.inputs(), deltas=["german", "dutch"]).logits
    torch.testing.assert_close(output[0], wanted["german"][0])
    torch.testing.assert_close(output[1], wanted["dutch"][1])
    rows = compiled.rows(["german", None])
    compiled.detach()
    library.load("french")
    assert set(library.loaded) == {"german", "french"}
    with pytest.raises(DeltaSpecError, match="prepared") as error:
        library.drop("german")
    assert codes(error) == ["DS532"]
    with pytest.raises(DeltaSpecError, match="limit"):
        library.load("spanish", "dutch")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**LLAMA.inputs(), deltas=rows).logits[0], wanted["german"][0])
    del rows
    gc.collect()
    library.load("spanish", "dutch")
    assert set(library.loaded) == {"spanish", "dutch"}


def test_dropping_and_closing(saved):
    directory, wanted = saved
    compiled = build(OWN)
    library = compiled.library(directory, preload=True)
    compiled.only("french")
    with pytest.raises(DeltaSpecError, match="attached") as error:
        library.drop("german", "french")
    assert codes(error) == ["DS532"]
    assert set(library.loaded) == set(NAMES)
    library.drop("german", "dutch")
    assert library.loaded == ("spanish", "french") or set(library.loaded) == {"spanish", "french"}
    assert torch.equal(run(compiled, "german"), wanted["german"])
    with pytest.raises(DeltaSpecError):
        library.close()
    compiled.detach()
    library.close()
    library.close()
    assert library.names == ()
    for act in (library.load, library.drop, compiled.only):
        with pytest.raises(UnknownDeltaError):
            act("french")
    assert list(compiled.deltas) == ["own"]
    assert rows_of_memory(compiled) == 0
    compiled.library(directory)
    assert torch.equal(run(compiled, "french"), wanted["french"])


def test_unknown_names(saved):
    compiled = build(OWN)
    library = compiled.library(saved[0])
    for act in (lambda: compiled.only("french", "germn", "x"), lambda: library.load("germn", "x")):
        with pytest.raises(UnknownDeltaError) as error:
            act()
        assert codes(error) == ["DS434", "DS434"]
        assert "did you mean 'german'" in str(error.value)
    assert library.loaded == ()
