"""Libraries: saved deltas that a model knows by name, and loads when it needs them, act as they did when saved."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import shutil
from typing import Any

import pytest
import torch
from inside import stacks, unproven
from models import ARCHITECTURES, Branching, ids
from saved_library import LLAMA, NAMES, OWN, build, codes, lora, run

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError
from deltaspec.methods.registry import methods


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
    home = importlib.import_module("deltaspec.library.entries")
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
    stack = stacks(compiled).of("french")
    assert stack.names.keys() == set(NAMES)
    assert stack.capacity == 4
    assert 4 * sum(flat[0].nbytes for flat in stack.flats) == library.nbytes
    for key, tensor in compiled.deltas["dutch"].tensors():
        assert tensor.data_ptr() == stack.tensors[key][stack.names["dutch"]].data_ptr()


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
    assert unproven(compiled) == (set() if example_inputs is not None else {"it"})
    with torch.no_grad():
        assert torch.equal(compiled(ids())["logits"], wanted)
    assert not unproven(compiled)


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
    with pytest.raises(UnknownDeltaError):
        again.only("french")
    assert compiled.simplified().attached == ("own",)
    with pytest.raises(UnknownDeltaError):
        compiled.simplified("french")


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
