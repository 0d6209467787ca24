"""Deltas on embeddings that are tied to heads, written as PEFT adapters: PEFT ties as they do, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from as_peft import same_in_peft, stirred
from peft_bases import IDS, base, run
from safetensors.torch import load_file
from torch import Tensor, nn

import deltaspec

TABLES = {"tied": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "encoder.embed_tokens"}


def one(method: str, target: Any, name: str = "a", **params: Any) -> dict[str, Any]:
    return {"name": name, "method": method, "target": target, "params": params}


def rows(target: Any, **params: Any) -> dict[str, Any]:
    return one("trainable_tokens", target, token_ids=[3, 1], **params)


CASES = {
    "low-rank": [one("lora", ["lm_head", "TABLE"], rank=2)],
    "together": [one("full", "lm_head", tied="together"), one("lora", "TABLE", "c", rank=2)],
    "alone": [one("full", "TABLE", tied="alone"), one("lora", "lm_head", "c", rank=2)],
    "rows": [rows("lm_head"), one("lora", {"role": "mlp.down"}, "c", rank=2)],
    "rows and a head": [rows("TABLE"), one("lora", "lm_head", "c", rank=2)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TABLES)
def test_peft_computes_the_same(name: str, case: str, tmp_path: Path) -> None:
    def placed(target: Any) -> Any:
        there = [TABLES[name] if one == "TABLE" else one for one in target] if isinstance(target, list) else target
        return TABLES[name] if there == "TABLE" else there

    deltas = [delta | {"target": placed(delta["target"])} for delta in CASES[case]]
    same_in_peft(stirred(base(name), *deltas), base(name), tmp_path, run(name))
    if case.startswith("rows"):  # once, where PEFT ties the others to
        written = load_file(tmp_path / "adapter_model.safetensors")
        assert len([key for key in written if "trainable_tokens" in key]) == 1


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_one_place_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(deltaspec.DeltaSpecError, match="DS560.*rows of all that is tied"):
        stirred(base(name), rows("lm_head", tied="alone")).save_as("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Plain(nn.Module):
    """A table and a head that share a weight, which nothing says."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.table(ids)))
        return found


@pytest.mark.parametrize("tied", ["together", "alone"])
def test_a_table_that_peft_does_not_tie(tied: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    same_in_peft(stirred(model, rows("table", tied=tied)), model, tmp_path, lambda m: m(IDS))
