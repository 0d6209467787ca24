"""`deltaspec extract`: a directory of deltas from two folders."""

from __future__ import annotations

import copy

import torch
from command_line import Run
from tiny_models import base


def test_changes_are_printed_with_their_errors(run: Run, tmp_path) -> None:
    full = copy.deepcopy(base("llama"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        full.model.layers[0].mlp.up_proj.weight += torch.randn(32, 16, generator=generator)
        full.model.norm.weight += 1
    full.save_pretrained(tmp_path / "full")
    base("llama").save_pretrained(tmp_path / "base")
    result = run("extract", "full", "base", "-o", "out", "--rank", "2", "--name", "tuned")
    assert result.exit_code == 0, result.output
    first, second, total = result.stdout.splitlines()
    assert first.startswith("model.layers.0.mlp.up_proj: lora, rank 2, error 0.")
    assert second == "model.norm.weight: full, whole, error 0"
    assert total.startswith("out: 2 deltas, 2 changes, 112 parameters; largest error 0.")
    assert f"- `{first}`" in (tmp_path / "out/README.md").read_text()
    assert run("extract", "full", "base", "-o", "out", "--rank", "2", "--error", "0.1").exit_code == 2
    equal = run("extract", "base", "base", "-o", "none")
    assert equal.exit_code == 1 and "error[DS557] the two models are equal" in equal.stdout
