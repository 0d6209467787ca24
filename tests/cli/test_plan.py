from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from repository import ROOT

from deltaspec.cli import main

Run = Callable[..., Result]

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SPEC = """\
deltaspec: 1
model: {type: bert}
deltas:
  - name: french
    method: lora
    params: {rank: 2}
    target: {role: [attn.q, attn.v], layers: {from: 1}}
    expect: {sites: 4}
  - {name: head, method: full, target: classifier}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(CONFIG))
    Path("french.deltaspec.yaml").write_text(SPEC)
    return lambda *args: CliRunner().invoke(main, list(args))


def change(old: str, new: str, spec: str = "french.deltaspec.yaml") -> None:
    text = Path(spec).read_text()
    assert old in text
    Path(spec).write_text(text.replace(old, new))


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


def test_lock_then_check(run: Run) -> None:
    lock = Path("french.deltaspec.lock.json")
    missing = run("plan", "config.json", "french.deltaspec.yaml", "--check")
    assert missing.exit_code == 1 and "DS510" in missing.output
    assert run("lock", "config.json", "french.deltaspec.yaml").exit_code == 0 and lock.exists()
    clean = run("plan", "config.json", "french.deltaspec.yaml", "--check")
    assert clean.exit_code == 0 and "french.deltaspec.lock.json: up to date" in clean.output
    change("from: 1}}\n    expect: {sites: 4}", "from: 2}}")
    drifted = run("plan", "config.json", "french.deltaspec.yaml", "--check")
    assert drifted.exit_code == 1
    assert (
        "DS515" in drifted.output
        and "2 sites gone: bert.encoder.layer.1.attention.self.{query,value}" in drifted.output
    )
    github = run("plan", "config.json", "french.deltaspec.yaml", "--check", "--format", "github")
    assert github.exit_code == 1 and github.output.startswith("::error file=french.deltaspec.yaml,line=4")
    markdown = run("plan", "config.json", "french.deltaspec.yaml", "--check", "--format", "markdown")
    assert markdown.exit_code == 1 and "DS515" in markdown.output


def test_check_in_machine_formats_is_clean_output(run: Run) -> None:
    run("lock", "config.json", "french.deltaspec.yaml")
    result = run("plan", "config.json", "french.deltaspec.yaml", "--check", "--format", "json")
    assert result.exit_code == 0 and json.loads(result.output)["findings"] == []


def test_several_specs_have_a_lock_each(run: Run) -> None:
    Path("more.deltaspec.json").write_text(
        json.dumps({"deltaspec": 1, "deltas": [{"name": "more", "method": "bitfit", "target": {"role": "attn.k"}}]})
    )
    both = ("french.deltaspec.yaml", "more.deltaspec.json")
    assert run("lock", "config.json", *both).exit_code == 0
    assert run("plan", "config.json", *both, "--check").exit_code == 0
    for spec in both:  # what is locked of a spec does not depend on its company
        assert run("plan", "config.json", spec, "--check").exit_code == 0


def test_a_plan_with_findings_is_not_locked(run: Run) -> None:
    change("sites: 4", "sites: 5")
    assert run("lock", "config.json", "french.deltaspec.yaml").exit_code == 1
    assert not Path("french.deltaspec.lock.json").exists()


def test_specs_that_would_share_a_lock_are_refused(run: Run) -> None:
    Path("french.deltaspec.json").write_text('{"deltaspec": 1, "deltas": [{"name": "x", "method": "lora"}]}')
    result = run("lock", "config.json", "french.deltaspec.yaml", "french.deltaspec.json")
    assert result.exit_code == 2 and not list(Path().glob("*.lock.json"))


def test_explain_says_which_condition_refused(run: Run) -> None:
    result = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.0.attention.self.query")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("bert.encoder.layer.0.attention.self.query: Linear, 16 → 16, roles attn.q")
    assert "french (lora): not selected" in lines
    assert any("✓ role [attn.q, attn.v]: accepted" in line and "french.deltaspec.yaml:7:" in line for line in lines)
    assert any("✗ layers" in line and "refused" in line for line in lines)
    assert "head (full): not selected" in lines


def test_explain_says_what_is_put_there(run: Run) -> None:
    taken = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.1.attention.self.query").output
    assert "french (lora): taken with rank=2 alpha=16 dropout=0: down [2, 16], up [16, 2]" in taken
    change("target: classifier", "target: bert.encoder.layer.0.attention")
    below = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.0.attention.self.query").output
    assert "head (full): taken: weight [16, 16], bias [16]" in below
    assert "part of bert.encoder.layer.0.attention" in below


def test_explain_says_what_the_method_refused(run: Run) -> None:
    change("{role: [attn.q, attn.v], layers: {from: 1}}", "'**.attention'")
    result = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.1.attention")
    assert result.exit_code == 0 and "selected, but lora needs a Linear" in result.output and "DS402" in result.output


def test_explain_of_default_roles_and_of_a_parameter(run: Run) -> None:
    change("    target: {role: [attn.q, attn.v], layers: {from: 1}}\n    expect: {sites: 4}\n", "")
    name = "bert.encoder.layer.0.attention.self.{}.weight"
    assert (
        "default roles of lora" in run("explain", "config.json", "french.deltaspec.yaml", name.format("query")).output
    )
    refused = run("explain", "config.json", "french.deltaspec.yaml", name.format("key")).output
    assert "french (lora): not selected" in refused and "its roles are attn.k" in refused


def test_explain_of_an_unknown_name(run: Run) -> None:
    result = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.0.attention.self.qeury")
    assert result.exit_code == 1 and "did you mean 'bert.encoder.layer.0.attention.self.query'?" in result.output


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
