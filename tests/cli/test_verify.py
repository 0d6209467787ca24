"""`deltaspec verify`: the table, and the exit code."""

from __future__ import annotations

import json

import golden_set
import pytest
import torch
from command_line import Run
from completions import serving
from tiny_models import base


@pytest.fixture
def saved(run: Run, tmp_path):
    golden_set.save(tmp_path / "deltas")
    base("llama").save_pretrained(tmp_path / "base")
    return run


def test_the_same_numbers_are_a_table_and_exit_code_0(saved: Run) -> None:
    result = saved("verify", "deltas", "--model", "base")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1] == ["low", "0", "0", "100.0%", "same"] and lines[2][0] == "bias"
    assert "0.0001 (float32)" in result.stdout
    half = saved("verify", "deltas", "low", "--model", "base", "--dtype", "bfloat16")
    assert half.exit_code == 0 and "0.05 (bfloat16)" in half.stdout and "bias" not in half.stdout


def test_other_numbers_are_findings_and_exit_code_1(saved: Run, tmp_path) -> None:
    manifests = [json.loads((tmp_path / "deltas/manifest.json").read_text())]
    golden_set.save(tmp_path / "other", number=2)
    manifests.append(json.loads((tmp_path / "other/manifest.json").read_text()))
    for ours, theirs in zip(*(data["deltas"] for data in manifests), strict=True):
        (tmp_path / "other" / theirs["golden"]).write_bytes((tmp_path / "deltas" / ours["golden"]).read_bytes())
        theirs["golden_sha256"] = ours["golden_sha256"]
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifests[1]))
    result = saved("verify", "other", "--model", "base")
    assert result.exit_code == 1
    assert "differs" in result.stdout
    assert "error[DS552] the answers of low are not those that were kept" in result.stdout


def test_a_server_needs_no_model(saved: Run, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def logits(name: str, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return base("llama")(input_ids=ids).logits

    with serving(logits, ("low", "bias")) as url:
        result = saved("verify", "deltas", "--against", url)
    assert result.exit_code == 1 and "as without the delta" in result.stdout


def test_what_is_not_said_or_wrong_is_exit_code_2(saved: Run) -> None:
    assert saved("verify", "deltas").exit_code == 2
    wrong = saved("verify", "deltas", "--model", "base", "--against", "pfet")
    assert wrong.exit_code == 2 and "'pfet' is not one of peft, onnx, URL: did you mean 'peft'?" in wrong.stderr
    assert "no KEY" in saved("verify", "deltas", "--model", "base", "--key-from", "KEY").output
    assert "DS321" in saved("verify", "deltas", "--model", "nowhere/").output
