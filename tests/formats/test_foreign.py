"""Names of modules: as they stand first, one place for all of an adapter; and what its files name is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import moved, reloaded, saved
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import deltaspec
from deltaspec.cli import main
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


class Named(nn.Module):
    """A model with a part that is called as PEFT and torch call their wrappers."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.lin = nn.Linear(8, 8)
        self.add_module(part, Inner())
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.lin(x)) + getattr(self, self.part)(x))


class Conv(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).mean((2, 3))


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("base_layer", {"target_modules": ["out"], "modules_to_save": ["base_layer"]}),
        ("base_layer", {"target_modules": ["lin", "base_layer.lin"]}),
        ("module", {"target_modules": ["module.lin"]}),
        ("module", {"target_modules": ["lin", "module.lin"]}),
    ],
)
def test_parts_that_are_called_like_wrappers(tmp_path: Path, part: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Named(part)
    folder = saved(moved(model, peft.LoraConfig(r=2, **options)), tmp_path / "adapter")
    found = deltaspec.restore(model, folder, example_inputs=X)(X)
    torch.testing.assert_close(found, reloaded(model, folder)(X), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, model(X), atol=1e-3)


def test_a_place_that_is_there_twice(tmp_path: Path) -> None:
    folder = saved(moved(Inner(), peft.LoraConfig(r=2, target_modules=["lin"])), tmp_path / "adapter")
    twins = nn.ModuleDict({"a": Inner(), "b": Inner()})
    with pytest.raises(DeltaSpecError, match="is here several times: under 'a', 'b'"):
        deltaspec.restore(twins, folder)


def test_a_short_name_below_another_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler.dense"])
    headed = BertForSequenceClassification(bert.config)
    compiled = deltaspec.restore(headed, saved(moved(bert, config), tmp_path / "adapter"))
    assert [site.fqn for site in compiled.plan.deltas[0].sites] == ["bert.pooler.dense"]


def test_what_a_file_names_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(moved(Inner(), peft.LoraConfig(r=2, target_modules=["lin"])), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "payload:make"}))
    (tmp_path / "payload.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    for verb in ("convert", "export"):
        result = CliRunner().invoke(main, [verb, str(folder), "-o", str(tmp_path / "out")])
        assert (result.exit_code, "error[DS321]" in result.output, "it ran" in result.output) == (1, True, False)


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig, peft.HiraConfig])
def test_a_padding_mode_that_peft_leaves_out(tmp_path: Path, config: Any) -> None:
    model = Conv(padding_mode="circular")
    folder = saved(moved(model, config(target_modules=["a"])), tmp_path / "adapter")
    with pytest.raises(DeltaSpecError, match="PEFT leaves out its padding_mode"):
        deltaspec.restore(model, folder)


def test_magnitudes_of_a_convolution_go_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Conv(), torch.randn(2, 3, 5, 5)
    first = moved(model, peft.LoraConfig(r=2, target_modules=["a"], use_dora=True))
    compiled = deltaspec.restore(model, saved(first, tmp_path / "adapter"))
    compiled.save_as("peft", tmp_path / "again")
    torch.testing.assert_close(reloaded(model, tmp_path / "again")(x), first(x), atol=1e-5, rtol=1e-5)
