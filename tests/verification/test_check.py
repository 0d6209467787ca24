"""`verify` in this process, and what it refuses."""

from __future__ import annotations

import golden_set
import pytest
from tiny_models import base

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.verification import verify


def test_the_model_that_deltas_were_saved_for_gives_the_same_numbers(tmp_path):
    golden_set.save(tmp_path)
    assert verify(tmp_path, base("llama"))
    assert [each.name for each in verify(tmp_path, base("llama"), "bias")] == ["bias"]


def test_what_cannot_be_asked_for_is_refused(tmp_path):
    golden_set.save(tmp_path / "ours")
    with pytest.raises(ValueError, match="against is peft, onnx or a URL .*, not 'vllm'"):
        verify(tmp_path / "ours", base("llama"), against="vllm")
    with pytest.raises(TypeError, match="a model is needed"):
        verify(tmp_path / "ours", None)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(DeltaSpecError, match="a directory of PEFT has no golden answers") as raised:
        verify(tmp_path, base("llama"))
    assert [finding.code for finding in raised.value.diagnostics] == ["DS551"]
