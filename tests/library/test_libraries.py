"""Libraries: saved deltas that a model knows by name and loads when it needs them."""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Branching, ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError
from deltaspec.methods.registry import methods

LLAMA = ARCHITECTURES["llama"]
OWN = {"name": "own", "method": "lora", "params": {"rank": 3}, "target": {"role": "attn.q"}, "attached": False}
NAMES = ("french", "german", "spanish", "dutch")


def lora(name: str, rank: int = 2) -> dict[str, Any]:
    target = {"role": ["attn.q", "attn.v", "mlp.up"]}
    return {"name": name, "method": "lora", "params": {"rank": rank}, "target": target, "attached": False}


def build(*deltas: dict[str, Any], number: int = 1, model: nn.Module | None = None) -> CompiledModel:
    """Compile, and move all tensors off their initial values."""
    compiled = deltaspec.compile(model or LLAMA.model(), {"deltaspec": 1, "deltas": list(deltas)})
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for one in compiled.deltas.values():
            for parameter in one.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return compiled


def run(compiled: CompiledModel, *names: str) -> Tensor:
    with torch.no_grad(), compiled.only(*names):
        return compiled(**LLAMA.inputs()).logits


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A directory of four deltas that are alike, and the logits under each."""
    source = build(*map(lora, NAMES))
    source.save(tmp_path / "deltas")
    return tmp_path / "deltas", {name: run(source, name) for name in NAMES}


def codes(error: pytest.ExceptionInfo[DeltaSpecError]) -> list[str]:
    return [finding.code for finding in error.value.diagnostics]


def sign(directory: Path, name: str, field: str, change: Callable[[Path], None]) -> None:
    """Change one of a delta's files, and its digest in the manifest with it."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    entry = next(entry for entry in manifest["deltas"] if entry["name"] == name)
    change(directory / entry[field])
    entry[f"{field}_sha256"] = hashlib.sha256((directory / entry[field]).read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))


def file_of(directory: Path, name: str, field: str = "file") -> Path:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    return directory / next(entry for entry in manifest["deltas"] if entry["name"] == name)[field]


# What it gives


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


def test_what_was_loaded_in_inference_mode_lets_others_train(tmp_path):
    wide = {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": {"role": "mlp.down"}}
    build(wide).save(tmp_path)
    compiled = build(OWN)
    compiled.library(tmp_path)
    with torch.inference_mode():
        compiled.only("wide")
        compiled(**LLAMA.inputs())
    compiled.only("own", "wide")
    compiled(**LLAMA.inputs()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.trainable_parameters())


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_acts_as_it_did_when_it_was_saved(name, tmp_path):
    entry = {"name": "it", "method": name, "params": dict(methods()[name].small)}
    for architecture in (LLAMA, ARCHITECTURES["bert"], ARCHITECTURES["gpt2"]):
        for target in (None, *architecture.targets):
            spec = {"deltaspec": 1, "deltas": [entry if target is None else {**entry, "target": target}]}
            try:
                source = deltaspec.compile(architecture.model(), spec)
            except DeltaSpecError:
                continue
            break
        else:
            continue
        break
    else:
        pytest.fail(f"{name} fits nowhere")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in source.deltas["it"].parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        wanted = source(**architecture.inputs()).logits
    source.save(tmp_path)
    compiled = deltaspec.compile(architecture.model(), {"deltaspec": 1, "deltas": [_harmless(architecture)]})
    compiled.library(tmp_path)
    with torch.no_grad():
        compiled.only("it")
        assert torch.equal(compiled(**architecture.inputs()).logits, wanted)


def _harmless(architecture: Any) -> dict[str, Any]:
    return {"name": "own", "method": "lora", "target": {"role": "block"}, "attached": False} | {
        "target": {"type": "Linear"} if architecture.name != "gpt2" else {"type": "Conv1D"}
    }


def test_a_derived_delta_is_what_it_was_computed_to_be(tmp_path):
    blend = {"name": "blend", "from": {"french": 0.7, "german": 0.3}, "combine": "svd", "attached": False}
    source = build(lora("french"), lora("german"), blend)
    wanted = run(source, "blend")
    source.save(tmp_path)
    compiled = build(OWN)
    compiled.library(tmp_path)
    assert torch.equal(run(compiled, "blend"), wanted)
    assert compiled.deltas.keys() == {"own", "blend"}


def test_they_apply_after_what_was_compiled(saved):
    directory, _ = saved
    everything = build(OWN, *map(lora, NAMES))
    compiled = build(OWN)
    for delta in ("own",):
        for key, value in everything.deltas[delta].tensors():
            compiled.deltas[delta].tensor(key).data.copy_(value)
    compiled.library(directory)
    everything.load(directory)
    for names in (("own", "dutch"), ("spanish", "own", "french")):
        assert torch.equal(run(compiled, *names), run(everything, *names))
    compiled.only("dutch", "own", "german")
    assert compiled.attached == ("own", "german", "dutch")


def test_alike_deltas_are_planned_once_and_share_their_graphs(saved, monkeypatch):
    directory, _ = saved
    compiled = build(OWN)
    library = compiled.library(directory)
    planned = []
    home = importlib.import_module("deltaspec.planning.resolve")
    resolve = home.resolve
    monkeypatch.setattr(home, "resolve", lambda *given: planned.append(1) or resolve(*given))
    library.load()
    assert len(planned) == 1
    graphs = []
    for name in NAMES:
        compiled.only(name)
        graphs.append({fqn: id(region) for fqn, region in compiled.regions.items()})
    assert all(graph == graphs[0] for graph in graphs)


def test_their_parameters_are_frozen_and_in_no_optimizer(saved):
    compiled = build(OWN)
    compiled.library(saved[0])
    compiled.only("own", "french")
    assert not any(p.requires_grad for p in compiled.deltas["french"].parameters())
    assert len(list(compiled.trainable_parameters())) == len(list(compiled.deltas["own"].parameters()))
    compiled(**LLAMA.inputs()).logits.sum().backward()
    assert all(p.grad is not None for p in compiled.deltas["own"].parameters())


def test_tensors_are_rows_and_held_once(saved):
    compiled = build(OWN)
    library = compiled.library(saved[0], preload=True)
    stack = compiled._shared.stacks.of("french")
    assert stack.names.keys() == set(NAMES)
    assert stack.capacity == 4
    assert sum(flat[0].nbytes for flat in stack.flats) * 4 == library.nbytes
    for key, tensor in compiled.deltas["dutch"].tensors():
        assert tensor.data_ptr() == stack.tensors[key][stack.names["dutch"]].data_ptr()


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


def test_strength_scales_them(saved):
    directory, wanted = saved
    compiled = build(OWN)
    compiled.library(directory)
    bare = run(compiled)
    with torch.no_grad():
        with compiled.only({"french": 0.0}):
            assert torch.equal(compiled(**LLAMA.inputs()).logits, bare)
        with compiled.only({"french": 1.0}):
            assert torch.equal(compiled(**LLAMA.inputs()).logits, wanted["french"])


def test_they_merge_as_they_act(saved):
    directory, wanted = saved
    compiled = build(OWN)
    compiled.library(directory)
    merged = compiled.merge("german")
    with torch.no_grad():
        torch.testing.assert_close(merged(**LLAMA.inputs()).logits, wanted["german"], atol=1e-5, rtol=1e-4)


def test_a_traced_model_takes_them(tmp_path):
    chosen = ARCHITECTURES["traceable-symbolic"]
    spec = {"deltaspec": 1, "deltas": [{"name": "it", "method": "lora", "target": ["up", "head"]}]}
    source = deltaspec.compile(chosen.model(), spec)
    with torch.no_grad():
        for parameter in source.deltas["it"].parameters():
            parameter.normal_()
        wanted = source(chosen.inputs())
    source.save(tmp_path)
    compiled = deltaspec.compile(chosen.model(), {"deltaspec": 1, "deltas": [{**spec["deltas"][0], "name": "own"}]})
    assert compiled.capture == "symbolic"
    compiled.library(tmp_path)
    compiled.only("it")
    with torch.no_grad():
        assert torch.equal(compiled(chosen.inputs()), wanted)


@pytest.mark.parametrize("example_inputs", [None, ids()])
def test_sites_that_are_not_proven_are_watched(example_inputs, tmp_path):
    torch.manual_seed(0)
    model = Branching().eval()
    spec = {"deltaspec": 1, "deltas": [{"name": "it", "method": "lora", "target": "head"}]}
    source = deltaspec.compile(model, spec)
    with torch.no_grad():
        for parameter in source.deltas["it"].parameters():
            parameter.normal_()
        wanted = source(ids())["logits"]
    source.save(tmp_path)
    own = {"name": "own", "method": "lora", "target": "block.up"}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [own]}, example_inputs=ids())
    compiled.library(tmp_path, example_inputs=example_inputs)
    compiled.only("it")
    assert compiled._shared.unproven == (set() if example_inputs is not None else {"it"})
    with torch.no_grad():
        assert torch.equal(compiled(ids())["logits"], wanted)
    assert not compiled._shared.unproven


def test_dropout_follows_the_mode(tmp_path):
    source = build({**lora("french"), "params": {"rank": 2, "dropout": 0.5}})
    source.save(tmp_path)
    compiled = build(OWN)
    compiled.library(tmp_path)
    compiled.only("french")
    with torch.no_grad():
        still = compiled(**LLAMA.inputs()).logits
        compiled.train()
        torch.manual_seed(0)
        assert not torch.equal(compiled(**LLAMA.inputs()).logits, still)
        compiled.eval()
        assert torch.equal(compiled(**LLAMA.inputs()).logits, still)


# Memory


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
    assert compiled._shared.stacks.of("dutch").capacity <= 4
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
    assert "french" not in compiled._shared.order


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
    assert all(stack.capacity == 0 for stacks in compiled._shared.stacks._stacks.values() for stack in stacks)
    compiled.library(directory)
    assert torch.equal(run(compiled, "french"), wanted["french"])


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
    monkeypatch.setattr("deltaspec.runtime.active._PROGRAMS", 3)
    directory, wanted = saved
    compiled = build(OWN)
    compiled.library(directory, limit=2)
    for _ in range(3):
        for name in NAMES:
            assert torch.equal(run(compiled, name), wanted[name])
            run(compiled, "own", name)
    assert len(compiled._active._programs) <= 6
    assert len(compiled._active._ready) <= 6


# Other forms


def test_a_cast_reaches_them(saved):
    directory, _ = saved
    everything = build(*map(lora, NAMES))
    everything.load(directory)
    compiled = build(OWN)
    library = compiled.library(directory).load("french", "german")
    held = compiled.deltas["german"]
    for one in (compiled, everything):
        one.to(torch.float64)
    assert {p.dtype for p in held.parameters()} == {torch.float64}
    for name in ("french", "german"):
        assert torch.equal(run(compiled, name), run(everything, name))
    library.load("dutch")  # as it would be compiled onto the backbone as it is now
    assert {t.dtype for _, t in compiled.deltas["dutch"].tensors()} == {torch.float64}
    assert torch.equal(run(compiled, "dutch"), run(everything, "dutch"))


def test_a_copy_has_what_is_loaded_and_shares_none_of_it(saved):
    directory, wanted = saved
    compiled = build(OWN)
    compiled.library(directory).load("french", "german")
    compiled.only("french")
    twin = copy.deepcopy(compiled)
    shutil.rmtree(directory)
    assert twin.attached == ("french",)
    with torch.no_grad():
        assert torch.equal(twin(**LLAMA.inputs()).logits, wanted["french"])
        for _, tensor in compiled.deltas["french"].tensors():
            tensor.zero_()
    assert torch.equal(run(twin, "french"), wanted["french"])
    assert torch.equal(run(twin, "german"), wanted["german"])
    with pytest.raises(DeltaSpecError, match="DS521"):
        twin.only("dutch")


def test_saving_is_about_compiled_deltas_alone(saved, tmp_path):
    directory, _ = saved
    compiled = build(OWN)
    compiled.library(directory)
    compiled.only("own", "french")
    compiled.save(tmp_path / "mine")
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_bytes())
    assert [entry["name"] for entry in manifest["deltas"]] == ["own"]
    assert manifest["attached"] == ["own"]
    assert deltaspec.restore(LLAMA.model(), tmp_path / "mine").attached == ("own",)
    for act in (lambda: pickle.dumps(compiled), compiled.simplified):
        with pytest.raises(DeltaSpecError) as error:
            act()
        assert codes(error) == ["DS533"]
    with pytest.raises(DeltaSpecError) as error:
        compiled.load(directory)
    assert set(codes(error)) == {"DS524"}
    compiled.only("own")
    again = pickle.loads(pickle.dumps(compiled))
    assert torch.equal(run(again, "own"), run(compiled, "own"))
    assert "french" not in again._shared.order
    assert compiled.simplified().attached == ("own",)
    with pytest.raises(UnknownDeltaError):
        compiled.simplified("french")


# Directories


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
    assert compiled._shared.order.keys() == {"own", "french"}
    compiled = build(OWN)
    compiled.library(directory)
    with pytest.raises(DeltaSpecError, match="is in the library") as error:
        compiled.library(directory)
    assert codes(error) == ["DS530"] * 4
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


# What is refused


def test_unknown_names(saved):
    compiled = build(OWN)
    library = compiled.library(saved[0])
    for act in (lambda: compiled.only("french", "germn", "x"), lambda: library.load("germn", "x")):
        with pytest.raises(UnknownDeltaError) as error:
            act()
        assert codes(error) == ["DS434", "DS434"]
        assert "did you mean 'german'" in str(error.value)
    assert library.loaded == ()


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
    assert "french" not in compiled._shared.order


def _with(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda path: save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


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
    with pytest.raises(DeltaSpecError, match="no saved deltas"):
        build(OWN).library(tmp_path / "nowhere")


def test_deltas_that_cannot_act_at_once(tmp_path):
    whole = {"name": "whole", "method": "full", "target": {"role": "attn.q"}, "attached": False}
    build(whole).save(tmp_path)
    compiled = build(OWN)
    compiled.library(tmp_path)
    compiled.only("whole")
    with pytest.raises(DeltaSpecError, match="replaces the weight") as error:
        compiled.attach("own")
    assert codes(error) == ["DS436"]
    assert compiled.attached == ("whole",)
