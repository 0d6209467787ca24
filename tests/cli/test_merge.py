"""`deltaspec merge`: a folder from a folder."""

from __future__ import annotations

import golden_set
import torch
from command_line import Run
from safetensors.torch import load_file
from tiny_models import base


def test_a_folder_is_written_or_findings_are(run: Run, tmp_path) -> None:
    compiled = golden_set.build()
    compiled.save(tmp_path / "deltas")
    base("llama").save_pretrained(tmp_path / "base")
    result = run("merge", "deltas", "bias", "--model", "base", "-o", "out")
    assert result.exit_code == 1 and "error[DS555] bias adds a bias to model.layers.{0..1}.mlp.up_proj" in result.stdout
    assert not (tmp_path / "out").exists()
    result = run("merge", "deltas", "--model", "base", "-o", "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == "out: 4 tensors changed\n"
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), compiled.merge("low").state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert "DS558" in run("merge", "deltas", "--model", "base", "-o", "out").stdout
    assert run("merge", "deltas", "-o", "out").exit_code == 2
