"""Directories that are no adapters, and files in them that are cut, hostile or of another kind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from peft_adapters import base, damaged, write
from safetensors.torch import save_file

import deltaspec
from deltaspec import engines
from deltaspec.diagnostics.findings import DeltaSpecError


def refused(folder: Path, code: str = "DS521") -> tuple[str, str]:
    """Return the message and the suggestion of the one finding, which is that of whoever reads the adapter."""
    with pytest.raises(DeltaSpecError) as error:
        engines.check(folder, base(), "vllm")
    (finding,) = error.value.diagnostics
    assert finding.code == code
    if code != "DS625":
        with pytest.raises(DeltaSpecError) as read:
            deltaspec.restore(base(), folder)
        same = read.value.diagnostics[0]
        assert (same.code, same.message, same.suggestion) == (finding.code, finding.message, finding.suggestion)
    return finding.message, finding.suggestion or ""


def test_what_is_no_directory(tmp_path):
    assert refused(tmp_path / "nothing")[0] == "there is no such directory"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file")[0] == "is a file, not a directory"
    assert refused(tmp_path)[0] == "holds neither saved deltas nor an adapter of PEFT, AdapterHub or OpenDelta"


def test_adapters_in_folders_of_their_own_are_named(tmp_path):
    write(tmp_path / "french")
    write(tmp_path / "german")
    message, hint = refused(tmp_path, "DS540")
    assert message == "holds several adapters: french, german" and f"such as {tmp_path / 'french'}" in hint


def test_what_is_no_configuration_of_peft(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"config": {}, "model_class": "BertModel", "version": "adapters.1.3.0"}))
    assert "names no peft_type" in refused(tmp_path, "DS625")[0]
    config.write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    assert refused(tmp_path)[0] == "has no adapter_model.safetensors"
    config.write_text(json.dumps({"peft_type": 3}))
    assert refused(tmp_path, "DS545")[0] == "peft_type: 3 cannot be read"
    config.write_text("{")
    assert "is no JSON object" in refused(tmp_path, "DS522")[0]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_files_that_are_cut_or_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    for cut in (0, 7, 100, len(content) - 1):
        file.write_bytes(content[:cut])
        assert "is no file of tensors" in refused(folder, "DS522")[0]
    file.unlink()
    for wrong in (pickle.dumps({"a": Bomb()}), b"", b"PK\x03\x04", pickle.dumps([1, 2])):
        (folder / "adapter_model.bin").write_bytes(wrong)
        assert "is no file of tensors" in refused(folder, "DS522")[0]
    torch.save({"a": Bomb()}, folder / "adapter_model.bin")
    assert "is no file of tensors" in refused(folder, "DS522")[0]
    torch.save({"a": {"b": torch.zeros(2)}}, folder / "adapter_model.bin")
    assert "it holds more than tensors" in refused(folder, "DS522")[0]
    assert not Path("exploded").exists()


def test_odd_values_in_the_configuration_are_findings_all_at_once(tmp_path):
    settings = {"r": "8", "lora_alpha": None, "rank_pattern": {"q_proj": 1.5, "(": 3}, "bias": True,
                "target_modules": 5, "modules_to_save": "x"}  # fmt: skip
    folder = damaged(tmp_path / "adapter", settings)
    with pytest.raises(DeltaSpecError) as error:
        engines.check(folder, base(), "vllm")
    assert {finding.code for finding in error.value.diagnostics} == {"DS544"}
    said = " ".join(finding.message for finding in error.value.diagnostics)
    for words in ("r: '8' is not a whole number", "bias: True is not a string", "rank_pattern: {'q_proj': 1.5, '(': 3}",
                  "target_modules: 5 is not", "modules_to_save: 'x' is not a list"):  # fmt: skip
        assert words in said
    with pytest.raises(DeltaSpecError) as read:
        deltaspec.restore(base(), folder)
    assert {"r: '8' is not a whole number from 1 on"} <= {finding.message for finding in read.value.diagnostics}


def test_a_pattern_that_backtracks_ends_in_a_finding(tmp_path):
    folder = damaged(tmp_path / "adapter", {"rank_pattern": {"(a+)+b": 4, "(.*)*x": 2}})
    with pytest.raises(DeltaSpecError, match="DS544"):
        engines.check(folder, base(), "vllm")


def test_shapes_of_any_kind_are_findings(tmp_path):
    folder = write(tmp_path / "adapter")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.tensor(1.0), f"{prefix}.lora_B.weight": torch.zeros(0, 3, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    codes = {finding.code for finding in engines.check(folder, base(), "vllm")}
    assert "DS617" in codes
