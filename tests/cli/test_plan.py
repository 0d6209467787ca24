"""`deltaspec plan`, by what it prints and how it exits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import Run, change
from repository import ROOT


def test_plan_prints(run: Run) -> None:
    result = run("plan", "config.json", "french.deltaspec.yaml")
    assert result.exit_code == 0
    assert "bert.encoder.layer.{1..2}.attention.self.{query,value}" in result.output
    assert "4 sites, 256 trainable parameters" in result.output  # 4 x 2 x (16 + 16)
    assert "\x1b" not in result.output


def test_plan_as_json_and_markdown(run: Run) -> None:
    data = json.loads(run("plan", "config.json", "french.deltaspec.yaml", "--format", "json").output)
    assert data["trainable"] == 256 + 16 * 2 + 2
    text = run("plan", "config.json", "french.deltaspec.yaml", "--format", "markdown").output
    assert "| french | lora rank=2 alpha=16 dropout=0 | 4 | 256 |" in text and "<details>" in text


def test_what_a_factory_prints_is_no_part_of_the_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("noisy_model.py").write_text(
        "print('importing')\nfrom torch import nn\n"
        "def build():\n    print('building')\n    return nn.Sequential(nn.Linear(2, 2))\n"
    )
    Path("noisy.deltaspec.yaml").write_text('deltaspec: 1\ndeltas: [{name: d, method: bitfit, target: "0"}]\n')
    result = run("plan", "noisy_model:build", "noisy.deltaspec.yaml", "--format", "json")
    assert json.loads(result.stdout)["trainable"] == 2 and "building" in result.stderr
    monkeypatch.delitem(sys.modules, "noisy_model")


@pytest.mark.parametrize("output_format", ["text", "json", "markdown", "github", "sarif"])
def test_findings_in_every_format(run: Run, output_format: str) -> None:
    change("sites: 4", "sites: 5")
    result = run("plan", "config.json", "french.deltaspec.yaml", "--format", output_format)
    assert result.exit_code == 1
    assert "DS501" in result.output and "4 sites, expected 5" in result.output
    if output_format == "text":
        assert result.output.startswith("french.deltaspec.yaml:8:")


def test_a_broken_spec_is_found_before_the_model_is_loaded(run: Run) -> None:
    change("rank: 2", "rnk: 2")
    result = run("plan", "no/such/config.json", "french.deltaspec.yaml")
    assert result.exit_code == 1 and "french.deltaspec.yaml:6:" in result.output and "DS2" in result.output


def test_usage_errors_exit_with_two(run: Run) -> None:
    assert run("plan", "config.json").exit_code == 2
    assert run("plan", "config.json", "french.deltaspec.yaml", "--format", "xml").exit_code == 2
    assert run("lock").exit_code == 2


def test_the_verbs_import_no_torch_for_a_broken_spec(run: Run, tmp_path: Path) -> None:
    import os
    import subprocess

    change("rank: 2", "rnk: 2")
    code = (
        "import sys; from deltaspec.cli import main\n"
        "try: main(['plan', 'config.json', 'french.deltaspec.yaml'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "1 False"


def test_an_estimate_is_printed_in_each_format(run: Run) -> None:
    arguments = ("plan", "config.json", "french.deltaspec.yaml", "--estimate", "batch=2,length=16,optimizer=sgd")
    text = run(*arguments)
    assert text.exit_code == 0 and "Estimate of a step: batch 2, length 16, sgd" in text.output
    data = json.loads(run(*arguments, "--format", "json").stdout)
    assert data["estimate"]["memory"]["optimizer_state"] == 0 and data["estimate"]["memory"]["complete"]
    assert data["estimate"]["memory"]["gradients"] == 4 * data["trainable"]
    assert "| kept activations |" in run(*arguments, "--format", "markdown").output


def test_options_of_an_estimate_that_are_none(run: Run) -> None:
    result = run("plan", "config.json", "french.deltaspec.yaml", "--estimate", "bacth=2,optimizer=adamm")
    assert result.exit_code == 1 and result.output.count("error[DS506]") == 2 and "did you mean batch?" in result.output
    long = run("plan", "config.json", "french.deltaspec.yaml", "--estimate", "length=4096")
    assert long.exit_code == 1 and "--estimate: length: error[DS506]" in long.output
    assert run("plan", "config.json", "french.deltaspec.yaml", "--check", "--estimate", "batch=2").exit_code == 2
