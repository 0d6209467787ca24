"""`--format json`: one object, whose keys are those that docs/command_line.md lists."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import golden_set
import peft_adapters
import pytest
import torch
from click.testing import CliRunner, Result
from repository import ROOT
from tiny_models import base

from deltaspec.cli import main

TABLE = {
    verb: set(re.findall("`([a-z_]+)`", keys))
    for verb, keys in re.findall(
        r"^\| `([a-z]+)` \| (.+) \|$", (ROOT / "docs/command_line.md").read_text("utf-8"), re.MULTILINE
    )
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    golden_set.save(folder / "saved")
    base("llama").save_pretrained(folder / "base")
    peft_adapters.base().save_pretrained(folder / "other")
    peft_adapters.write(folder / "peft")
    full = copy.deepcopy(base("llama"))
    with torch.no_grad():
        full.model.norm.weight += 1
        full.model.layers[0].mlp.up_proj.weight += torch.ones(32, 1) @ torch.arange(16.0)[None]
    full.save_pretrained(folder / "full")
    return folder


LINES = {
    "check": "peft --model other --for vllm",
    "convert": "peft --model other -o {out}",
    "export": "saved --model base -o {out}",
    "extract": "full base -o {out}",
    "merge": "saved --model base -o {out}",
    "verify": "saved --model base",
}


def run(
    verb: str, line: str, places: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Result, dict[str, Any]]:
    monkeypatch.chdir(places)
    result = CliRunner().invoke(main, [verb, *line.format(out=out).split(), "--format", "json"])
    assert result.stdout.isascii(), result.output
    return result, json.loads(result.stdout)


def test_every_verb_with_a_result_is_documented() -> None:
    assert TABLE.keys() == LINES.keys()


@pytest.mark.parametrize("verb", LINES)
def test_a_result_is_one_object_with_the_documented_keys(verb, places, tmp_path, monkeypatch) -> None:
    result, data = run(verb, LINES[verb], places, tmp_path / "out", monkeypatch)
    assert (result.exit_code, result.stderr) == (0, "")
    assert data.keys() == TABLE[verb] and data["findings"] == []


@pytest.mark.parametrize("verb", LINES)
def test_findings_are_one_object_too(verb, places, tmp_path, monkeypatch) -> None:
    first, _, rest = LINES[verb].partition(" ")
    result, data = run(verb, f"{first[:-1]}x {rest}", places, tmp_path / "out", monkeypatch)
    assert (result.exit_code, result.stderr) == (1, "")
    (finding,) = data["findings"]
    assert re.fullmatch("DS[0-9]{3}", finding["code"]) and f"did you mean {first}?" in finding["suggestion"]
    assert not (tmp_path / "out").exists()


def test_what_the_results_say(places, tmp_path, monkeypatch) -> None:
    _, made = run("extract", LINES["extract"], places, tmp_path / "deltas", monkeypatch)
    assert [(c["at"], c["method"], c["rank"]) for c in made["changes"]] == [
        ("model.layers.0.mlp.up_proj", "lora", 1), ("model.norm.weight", "full", None),
    ]  # fmt: skip
    assert sum(delta["parameters"] for delta in made["deltas"]) == 1 * (16 + 32) + 16
    _, found = run("verify", "saved --model base", places, tmp_path, monkeypatch)
    assert ({"low": 1.0}, "same") in [(each["deltas"], each["verdict"]) for each in found["agreements"]]
    _, written = run("export", LINES["export"], places, tmp_path / "peft", monkeypatch)
    assert (written["deltas"], written["rank"]) == ({"low": 1.0}, 2)


def test_other_numbers_are_a_result_with_findings(places, tmp_path, monkeypatch) -> None:
    line = "saved --model base --tolerance 0 --dtype bfloat16"
    result, data = run("verify", line, places, tmp_path, monkeypatch)
    assert result.exit_code == 1
    assert data.keys() == TABLE["verify"] and {finding["code"] for finding in data["findings"]} == {"DS552"}
