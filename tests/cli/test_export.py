"""`deltaspec export`: saved deltas and foreign adapters as PEFT adapters, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from as_peft import stirred
from beside_peft import reloaded
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, LlamaConfig

import deltaspec
from deltaspec.cli import main

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
DELTAS = [
    {"name": "a", "method": "lora", "params": {"rank": 4}, "target": {"role": ["attn.q", "attn.v"]}},
    {"name": "s", "method": "ssf", "target": {"role": "mlp.up"}},
    {"name": "b", "method": "bitfit", "target": {"role": "attn.k"}},
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=30, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = tmp_path_factory.mktemp("export")
    model.save_pretrained(folder / "base")
    (folder / "described").mkdir()
    shutil.copy(folder / "base/config.json", folder / "described")
    compiled = stirred(model, *DELTAS)
    compiled.only({"a": 0.5})
    compiled.save(folder / "saved")
    return folder, model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@torch.no_grad()
def difference(model: Any, adapter: Path, saved: Path, strengths: dict[str, float]) -> float:
    compiled = deltaspec.restore(model, saved)
    compiled.only(strengths)
    found = reloaded(model, adapter)(input_ids=IDS).logits - compiled(input_ids=IDS).logits
    return float(found.abs().max())


def test_what_was_attached_goes_out_without_weights(places: Any, tmp_path: Path) -> None:
    folder, model = places
    out = tmp_path / "out"
    result = run("export", folder / "saved", "-o", out, "--model", folder / "described")
    assert (result.exit_code, result.stdout.count("PEFT lora, a")) == (0, 1), result.output
    assert difference(model, out, folder / "saved", {"a": 0.5}) < 1e-6
    assert json.loads((out / "adapter_config.json").read_bytes())["base_model_name_or_path"] == str(
        folder / "described"
    )
    again = run("export", out, "-o", tmp_path / "again", "--uniform")  # it names its base
    assert again.exit_code == 0, again.output
    assert difference(model, tmp_path / "again", folder / "saved", {"a": 0.5}) < 1e-6


def test_weights_are_read_where_they_are_needed(places: Any, tmp_path: Path) -> None:
    folder, model = places
    chosen = ("--delta", "b", "--delta", "a")
    result = run("export", folder / "saved", "-o", tmp_path / "out", "--model", folder / "base", *chosen)
    assert result.exit_code == 0, result.output
    assert difference(model, tmp_path / "out", folder / "saved", {"a": 0.5, "b": 1.0}) < 1e-6
    result = run("export", folder / "saved", "-o", tmp_path / "none", "--model", folder / "described", *chosen)
    assert result.exit_code == 1
    assert "DS564" in result.stdout
    assert not (tmp_path / "none").exists()


def test_approximations_say_their_errors(places: Any, tmp_path: Path) -> None:
    folder, model = places
    base = ("--model", folder / "base", "--delta", "s", "--delta", "a")
    refused = run("export", folder / "saved", "-o", tmp_path / "none", *base)
    assert refused.exit_code == 1
    assert "DS560" in refused.stdout
    assert "--approximate RANK" in refused.stdout
    result = run("export", folder / "saved", "-o", tmp_path / "out", *base, "--approximate", "3")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if "relative error" in line]
    assert len(lines) == 2
    card = (tmp_path / "out/README.md").read_text()
    assert all(line.rpartition(" ")[2] in card for line in lines)
    exact = run("export", folder / "saved", "-o", tmp_path / "exact", *base, "--approximate", "16")
    assert exact.exit_code == 0, exact.output
    assert difference(model, tmp_path / "exact", folder / "saved", {"a": 0.5, "s": 1.0}) < 1e-5


def test_a_misspelt_word_is_wrong_usage(places: Any, tmp_path: Path) -> None:
    folder, _ = places
    for option, value, meant in (("--to", "pft", "peft"), ("--for", "vlm", "vllm"), ("--match", "site", "sites")):
        result = run("export", folder / "saved", "--model", folder / "base", option, value, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert f"'{value}' is not one of " in result.stderr and f"did you mean '{meant}'?" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_an_engine_refuses_is_told_of_what_is_there(places: Any, tmp_path: Path) -> None:
    folder, model = places
    head = {"name": "h", "method": "full", "target": {"role": "head"}}
    stirred(model, DELTAS[0], head).save(tmp_path / "saved")
    result = run("export", tmp_path / "saved", "--model", folder / "base", "--for", "sglang", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "ignored by SGLang" in result.stdout
    assert f'deltaspec.restore(model, "{tmp_path / "saved"}").merge()' in result.stdout
    assert str(tmp_path / "out") not in result.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["saved"], "DS563"),
        (["nothing", "--model", "base"], "DS521"),
        (["saved", "--model", "base", "--delta", "french"], "french"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_findings(places: Any, arguments: list[str], code: str, tmp_path: Path) -> None:
    folder, _ = places
    given = [folder / a if a in ("saved", "base", "nothing") else a for a in arguments]
    result = run("export", *given, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert code in result.stdout
    assert not (tmp_path / "out").exists()
