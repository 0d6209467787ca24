"""What transformers says while it loads: kept off standard error, and an error where a backbone would be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import base

from deltaspec.backbone.loading import Wanted, model_from
from deltaspec.diagnostics.findings import DeltaSpecError

WEIGHTS = Wanted(weights=True)


def saved(folder: Path, without: str = "", **changes: object) -> str:
    base("bert").save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not without or without not in k}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_loading_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path)
    capsys.readouterr()
    model_from(folder, WEIGHTS)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("without", "changes", "said"),
    [
        ("layer.1.attention.self.query", {}, "bert.encoder.layer.1.attention.self.query."),
        ("", {"num_hidden_layers": 3}, "bert.encoder.layer.2"),
        ("embeddings", {}, "bert.embeddings."),
    ],
    ids=["cut", "one layer more", "no embeddings"],
)
def test_a_backbone_that_lacks_weights_is_refused(without, changes, said, tmp_path: Path) -> None:
    with pytest.raises(DeltaSpecError, match="DS591") as raised:
        model_from(saved(tmp_path, without, **changes), WEIGHTS)
    assert said in str(raised.value)


def test_a_head_that_is_drawn_anew_is_a_warning(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", architectures=["BertForSequenceClassification"])
    with pytest.warns(UserWarning, match="has no values for bert.pooler.*classifier.*: they are drawn anew"):
        model_from(folder, WEIGHTS)
