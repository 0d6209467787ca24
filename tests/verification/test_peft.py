"""Golden answers beside those of the real PEFT, and PEFT's directories beside what restore makes of them."""

from __future__ import annotations

import copy

import golden_set
import peft
import pytest
import torch
from moved import moved
from safetensors.torch import load_file, save_file
from tiny_models import base

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.verification import packages, verify


@pytest.fixture
def saved(tmp_path):
    more = {"name": "up", "method": "lora", "params": {"rank": 3, "scaling": "rslora"}, "target": {"role": "mlp.up"}}
    spec = {"deltaspec": 1, "deltas": [golden_set.SPEC["deltas"][0], more]}
    compiled = moved(deltaspec.compile(base("llama"), spec))
    compiled.only({"low": 0.5, "up": 2})
    compiled.save(tmp_path, golden=golden_set.INPUTS)
    return compiled


def test_peft_gives_the_same_numbers_for_each_delta_and_for_all_at_their_strengths(tmp_path, saved):
    before = copy.deepcopy(base("llama").state_dict())
    found = verify(tmp_path, base("llama"), against="peft")
    assert found and [each.name for each in found] == ["low", "up", "0.5 × low + 2 × up"]
    assert all(each.absolute < 1e-6 for each in found)
    after = base("llama").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_another_form_of_the_delta_is_found_out(tmp_path, saved, monkeypatch):
    class Wrong(peft.PeftModel):
        @classmethod
        def from_pretrained(cls, model, folder, **rest):
            tensors = load_file(f"{folder}/adapter_model.safetensors")
            save_file({key: value * 1.1 for key, value in tensors.items()}, f"{folder}/adapter_model.safetensors")
            return peft.PeftModel.from_pretrained(model, folder, **rest)

    monkeypatch.setattr(packages, "import_module", lambda name: type("Module", (), {"PeftModel": Wrong}))
    assert {each.verdict for each in verify(tmp_path, base("llama"), against="peft")} == {"differs"}


def test_what_peft_has_no_form_for_is_refused_by_name(tmp_path):
    spec = {"deltaspec": 1, "deltas": [{"name": "wide", "method": "adapter", "params": {"width": 2}}]}
    spec["deltas"][0]["target"] = {"role": "block"}
    moved(deltaspec.compile(base("llama"), spec)).save(tmp_path, golden=golden_set.INPUTS)
    with pytest.raises(DeltaSpecError, match="wide"):
        verify(tmp_path, base("llama"), against="peft")


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_directory_of_peft_is_compared_with_what_restore_makes_of_it(tmp_path, kind):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True)
    tuned = peft.get_peft_model(copy.deepcopy(base(kind)), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tuned.save_pretrained(tmp_path)
    found = verify(tmp_path, base(kind), against="peft")
    assert found and found[0].absolute < 1e-5 * 100
