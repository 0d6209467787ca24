"""Deltas named as users of PEFT name them: in the model's keys, on disk, in libraries and in rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import disk_offload
from saved_library import LLAMA, OWN, build, lora, run

import deltaspec

NAMES = ("user/lora", "1_task", "v1.2", "con", "d[rank=4,lr=1e-3]")


@pytest.mark.parametrize("capture", ["auto", "symbolic"])
def test_names_with_dots_and_slashes(tmp_path, capture):
    if capture == "symbolic":
        x, model = torch.randn(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 3))
        deltas = [{"name": name, "method": "lora", "target": "0", "attached": False} for name in NAMES]
        source = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, capture=capture)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1)
        outputs = {}
        for name in NAMES:
            source.only(name)
            outputs[name] = source(x)
        source.save(tmp_path)
        back = deltaspec.restore(model, tmp_path, capture=capture)
        for name in NAMES:
            back.only(name)
            assert back.capture == "symbolic" and torch.equal(back(x), outputs[name])
        return
    source = build(*map(lora, NAMES))
    wanted = {name: run(source, name) for name in NAMES}
    assert len({*source.state_dict()}) == len([*source.state_dict()])
    assert dict(source.named_parameters()).keys() <= source.state_dict().keys()
    source.save(tmp_path)
    assert all(path.parent == tmp_path and "/" not in path.name for path in tmp_path.rglob("*"))
    assert len({path.name.casefold() for path in tmp_path.iterdir()}) == 3 * len(NAMES) + 1
    twins = [deltaspec.restore(LLAMA.model(), tmp_path), copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    fresh = deltaspec.compile(LLAMA.model(), {"deltaspec": 1, "deltas": [*map(lora, NAMES)]})
    fresh.load_state_dict(source.state_dict())
    known = build(OWN)
    known.library(tmp_path)
    for twin in (*twins, fresh, known, source.view()):
        assert all(torch.equal(run(twin, name), wanted[name]) for name in NAMES)
    inputs = {key: value[:1].repeat(2, 1) for key, value in LLAMA.inputs().items()}
    with torch.no_grad():
        mixed = source(**inputs, deltas=["user/lora", "v1.2"]).logits
        alone = torch.cat([source(**inputs, deltas=[name, name]).logits[:1] for name in ("user/lora", "v1.2")])
    assert torch.allclose(mixed, alone, atol=1e-5)


def test_deltas_are_offloaded_to_a_disk_and_states_of_earlier_versions_are_loaded(tmp_path):
    source = build(OWN)
    wanted = run(source, "own")
    state = {key.replace("~", "/"): value.clone() for key, value in source.state_dict().items()}
    assert any("/" in key for key in state)
    fresh = build(OWN, number=2)
    fresh.load_state_dict(state)
    assert torch.equal(run(fresh, "own"), wanted)
    disk_offload(source.backbone, tmp_path, execution_device=torch.device("cpu"))
    assert torch.equal(run(source, "own"), wanted)


def test_rows_train_deltas_of_any_name():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    deltas = [{"name": name, "method": "lora", "target": "0", "attached": False} for name in NAMES]
    c, x = deltaspec.compile(net, {"deltaspec": 1, "deltas": deltas}).train(), torch.ones(1, 3)
    c(x.repeat(len(NAMES), 1), deltas=[*NAMES]).sum().backward()
    found = {name: c.deltas[name].tensor("0.up").grad for name in NAMES}
    for name in NAMES:
        c.only(name)
        c.zero_grad()
        c(x).sum().backward()
        assert torch.equal(c.deltas[name].tensor("0.up").grad, found[name]) and found[name].any()
