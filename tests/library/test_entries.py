"""What a directory offers a model: names, and saved deltas that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_library import LLAMA, NAMES, OWN, _with, build, codes, file_of, lora, run, sign
from torch import Tensor

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError


def test_a_directory_of_directories(saved, tmp_path):
    _, wanted = saved
    for name in NAMES:
        source = build(*map(lora, NAMES))
        source.load(saved[0])
        alone = build(lora(name))
        for key, tensor in alone.deltas[name].tensors():
            tensor.data.copy_(source.deltas[name].tensor(key))
        alone.save(tmp_path / "many" / f"{name}-v1")
    (tmp_path / "many" / "notes").mkdir()
    compiled = build(OWN)
    library = compiled.library(tmp_path / "many", preload=True)
    assert library.names == tuple(sorted(NAMES))
    for name in NAMES:
        assert torch.equal(run(compiled, name), wanted[name])
    library.drop()
    compiled.detach()
    library.close()
    compiled.library(tmp_path / "many", by="folder")
    assert torch.equal(run(compiled, "german-v1"), wanted["german"])


def test_names_that_are_taken(saved, tmp_path):
    directory, wanted = saved
    compiled = build(OWN, lora("french"))
    with pytest.raises(DeltaSpecError, match="was compiled into this model") as error:
        compiled.library(directory)
    assert codes(error) == ["DS530"]
    assert set(compiled.deltas) == {"own", "french"}
    for name in NAMES[1:]:  # nor is any other name known
        with pytest.raises(UnknownDeltaError):
            compiled.only(name)
    compiled = build(OWN)
    compiled.library(directory)
    with pytest.raises(DeltaSpecError, match="is in the library") as error:
        compiled.library(directory)
    assert codes(error) == ["DS530"] * 4
    assert [finding.message.split("'")[1] for finding in error.value.diagnostics] == list(NAMES)
    assert str(error.value).count("keep what c.library returned, and call its refresh()") == 4
    for folder in ("a", "b"):
        build(lora("task")).save(tmp_path / "many" / folder)
    shutil.copytree(directory, tmp_path / "many" / "c")
    with pytest.raises(DeltaSpecError, match="is in .*a, too") as error:
        compiled.library(tmp_path / "many")
    assert {"DS530"} == set(codes(error))
    library = compiled.library(tmp_path / "many", by="folder")
    assert library.names == ("a", "b", *(f"c/{name}" for name in NAMES))
    assert torch.equal(run(compiled, "c/dutch"), wanted["dutch"])
    with pytest.raises(ValueError, match="by is"):
        compiled.library(directory, by="name")


def test_all_that_is_wrong_with_what_is_asked_is_found_and_nothing_is_loaded(saved):
    directory, wanted = saved
    path = file_of(directory, "french")
    path.write_bytes(path.read_bytes()[:-4])
    file_of(directory, "german").unlink()
    sign(directory, "spanish", "file", _with(lambda t: {k: v * torch.nan for k, v in t.items()}))
    compiled = build(OWN)
    compiled.only("own")
    before, bare = run(compiled, "own"), compiled.attached
    library = compiled.library(directory)
    with pytest.raises(DeltaSpecError) as error:
        compiled.only(*NAMES)
    assert set(codes(error)) == {"DS521", "DS522", "DS527"}
    assert str(path) in str(error.value)
    assert library.loaded == ()
    assert compiled.attached == bare
    assert torch.equal(run(compiled, "own"), before)
    assert torch.equal(run(compiled, "dutch"), wanted["dutch"])
    with pytest.raises(DeltaSpecError):
        compiled.library(directory.parent / "none")
    library.drop()
    library.close()
    with pytest.raises(DeltaSpecError, match="DS527"):
        compiled.library(directory, preload=True)
    with pytest.raises(UnknownDeltaError):
        compiled.only("french")


def _first(tensors: dict[str, Tensor], value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    key = next(iter(tensors))
    return {**tensors, key: value(tensors[key])}


def _some_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = torch.inf
    return tensor


@pytest.mark.parametrize(
    "change, code",
    [
        (lambda t: dict(list(t.items())[1:]), "DS525"),
        (lambda t: {**t, "more": torch.zeros(2)}, "DS525"),
        (lambda t: _first(t, lambda v: v[:, :-1]), "DS526"),
        (lambda t: _first(t, lambda v: v.double()), "DS526"),
        (lambda t: _first(t, _some_nan), "DS527"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_tensors_that_do_not_fit(saved, change, code, first):
    directory, _ = saved
    sign(directory, "german", "file", _with(change))
    compiled = build(OWN)
    library = compiled.library(directory)
    if not first:  # where everything lies in such files is known by then
        library.load("french")
    with pytest.raises(DeltaSpecError) as error:
        library.load("german", "dutch")
    assert codes(error) == [code]
    assert library.loaded == (() if first else ("french",))


def test_half_precision_files_are_taken_exactly(saved):
    directory, _ = saved
    sign(directory, "german", "file", _with(lambda t: {k: v.half() for k, v in t.items()}))
    compiled = build(OWN)
    compiled.library(directory, preload=True)
    tensors = load_file(file_of(directory, "german"))
    for key, tensor in compiled.deltas["german"].tensors():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[key].float())


def _spec(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = json.loads(path.read_bytes())
        path.write_text(json.dumps(change(data) or data))

    return write


@pytest.mark.parametrize(
    "change, code",
    [
        (lambda d: d["deltas"][0].update(method="lorra"), "DS206"),
        (lambda d: d["deltas"][0].update(target={"role": "cross_attn.q"}), "DS303"),
        (lambda d: d["deltas"][0].update(name="other"), "DS522"),
        (lambda d: ["nothing"], "DS522"),
        (lambda d: d["deltas"][0]["params"].update(rank=5), "DS526"),
        (lambda d: d.update(model={"type": "bert"}), "DS401"),
    ],
)
def test_specs_that_do_not_fit(saved, change, code):
    directory, _ = saved
    sign(directory, "german", "spec", _spec(change))
    compiled = build(OWN)
    library = compiled.library(directory)
    with pytest.raises(DeltaSpecError) as error:
        library.load("french", "german")
    assert set(codes(error)) == {code}
    assert all(Path(d.file).parent == directory for d in error.value.diagnostics)
    assert library.loaded == ()


def test_another_backbone(saved, tmp_path):
    other = LLAMA.model()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    compiled = build(OWN, model=other)
    with pytest.raises(DeltaSpecError, match="other weights") as error:
        compiled.library(saved[0])
    assert codes(error) == ["DS523"]
    (saved[0] / "manifest.json").write_text("[]")
    with pytest.raises(DeltaSpecError, match="not a manifest"):
        build(OWN).library(saved[0])
    with pytest.raises(DeltaSpecError, match="no such directory"):
        build(OWN).library(tmp_path / "nowhere")


@pytest.mark.parametrize("by", ["delta", "identity"])
def test_deltas_of_a_library_are_written_out_beside_compiled_ones(saved: Any, tmp_path: Path, by: str) -> None:
    directory, _ = saved
    model = build(lora("own"))
    name = model.library(directory, by=by).names[0]
    model.only({"own": 1, name: 0.5})
    model.save_as("peft", tmp_path / "out")
    with torch.no_grad():
        expected = model(**LLAMA.inputs()).logits
    written = [json.loads(file.read_bytes()) for file in sorted((tmp_path / "out").glob("*.deltaspec.json"))]
    assert sorted(delta["name"] for spec in written for delta in spec["deltas"]) == sorted(["own", name])
    assert all(len(spec["deltas"]) == 1 for spec in written)
    assert f"- `{name}`: lora at strength 0.5" in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        again = deltaspec.restore(LLAMA.model(), tmp_path / "out")(**LLAMA.inputs()).logits
    assert torch.allclose(again, expected, atol=1e-6)
