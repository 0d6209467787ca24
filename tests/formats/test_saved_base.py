"""Deltas of ours say which model they were saved for, where a base alone names another class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import deltaspec
from deltaspec.compiler.export import export
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.engines import check
from deltaspec.formats.opening import base_reference
from deltaspec.storage.saved import SavedSet
from deltaspec.verification import verify

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
INPUTS = {"input_ids": torch.tensor([[5, 9, 11, 30]])}
DELTAS = [
    {"name": "a", "method": "lora", "target": "**.query"},
    {"name": "h", "method": "full", "target": "classifier"},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a headless base, and of deltas of a classifier with three labels on it."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "base", num_labels=3).eval()
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": DELTAS})
    with torch.no_grad():
        for parameter in (p for p in compiled.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter))
    compiled.save(folder / "saved", golden=INPUTS)
    return folder / "base", folder / "saved"


def test_the_base_and_its_class_are_those_that_deltas_were_saved_for(trained, tmp_path: Path) -> None:
    base, saved = trained
    reference, wanted = base_reference(saved, None)
    assert (reference, wanted.likely, wanted.settings) == (
        str(base),
        "BertForSequenceClassification",
        {"num_labels": 3},
    )
    export(saved, tmp_path / "out", "peft")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert check(saved, str(base), "vllm") == check(tmp_path / "out", str(base), "peft") == []
    alone, head, both = verify(saved, str(base), match="structure")
    assert (alone.verdict, head.verdict, both.verdict) == ("differs", "same", "same")  # without `h`, any head is drawn


def test_values_are_left_alone(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    base, saved = trained
    monkeypatch.setattr(SavedSet, "tensors", lambda *_: pytest.fail("read"))
    assert base_reference(saved, None)[1].settings == {"num_labels": 3}
    assert check(saved, str(base), "vllm") == []


def test_a_base_of_another_architecture_is_built_as_it_names_itself(trained, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(DeltaSpecError, match="DS523.*GPT2LMHeadModel"):
        export(trained[1], tmp_path / "out", "peft", str(tmp_path / "gpt2"))
