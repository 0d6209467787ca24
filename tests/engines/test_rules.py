"""Files of rules: every engine has one, which decides every fact; another one is found by itself, or refused whole."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from peft_adapters import base, write

import deltaspec.engines.rules as rules
from deltaspec import engines
from deltaspec.cli import main
from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.engines.vocabulary import FACTS, REWRITES

HOME = Path(rules.__file__).parent


def file_of(name: str) -> Path:
    return HOME / f"{name}.yaml"


def test_the_engines_are_the_files():
    assert set(engines.known()) == {path.name.removesuffix(".yaml") for path in HOME.glob("*.yaml")}
    listed = "vllm sglang lorax tensorrt-llm llama.cpp onnxruntime openvino peft".split()
    assert set(listed) <= set(engines.known())
    result = CliRunner().invoke(main, ["check", "--help"])
    assert all(name in result.output.replace("\n", "").replace(" ", "") for name in listed)


@pytest.mark.parametrize("name", engines.known())
def test_each_file_says_of_which_versions_it_holds_and_since_when(name):
    found = rules.rules_of(name)
    assert found.engine == name and found.versions and found.sources
    assert date(2026, 11, 1) <= date.fromisoformat(found.checked)


def test_every_fact_has_a_code_and_every_rewrite_is_asked_for():
    assert {fact.code for fact in FACTS.values()} <= CODES.keys()
    assert set.union(*(set(engines.needs(name)) for name in engines.known())) == REWRITES.keys()
    assert "rslora_to_alpha" in engines.needs("llama.cpp") and "rslora_to_alpha" not in engines.needs("vllm")
    assert {"one_rank", "every_layer"} <= engines.needs("lorax")


def test_another_engine_is_one_more_file(tmp_path, monkeypatch):
    """A file beside the others is an engine of the command line and of Python, and nothing else is edited."""
    text = file_of("vllm").read_text(encoding="utf-8")
    for path in HOME.glob("*.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mine.yaml").write_text(
        text.replace("engine: vllm", "engine: mine").replace("title: vLLM", "title: Mine")
    )
    monkeypatch.setattr(rules, "files", lambda _: tmp_path)
    assert "mine" in engines.known()
    folder = write(tmp_path / "adapter", "dora")
    (finding,) = engines.check(folder, base(), "mine")
    assert finding.message.startswith("rejected by Mine: use_dora")
    assert "mine" in CliRunner().invoke(main, ["check", "--help"]).output


def test_a_file_elsewhere_is_an_engine_too(tmp_path):
    data = yaml.safe_load(file_of("vllm").read_text(encoding="utf-8"))
    data |= {"engine": "own", "title": "Own", "rank": {"most": 4}}
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(data))
    (finding,) = engines.check(write(tmp_path / "adapter"), base(), str(own))
    assert "rejected by Own: rank 8" in finding.message and "up to 4" in finding.message


def refused(tmp_path: Path, **changes: object) -> list[str]:
    data = yaml.safe_load(file_of("peft").read_text(encoding="utf-8")) | changes
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    with pytest.raises(DeltaSpecError) as error:
        rules.rules_of(str(path))
    assert {finding.code for finding in error.value.diagnostics} == {"DS626"}
    assert all(finding.line for finding in error.value.diagnostics)
    return [finding.message for finding in error.value.diagnostics]


def test_what_is_wrong_in_a_file_is_said_all_at_once(tmp_path):
    wrong = [{"fact": "doraa", "outcome": "reject", "happens": "no", "colour": "red"}]
    assert refused(tmp_path, rules=wrong, sources=[], checked="yesterday", notes=3, title=None) == [
        "title: field required",
        "checked: invalid isoformat string: 'yesterday'",
        "sources: tuple should have at least 1 item after validation, not 0",
        "rules[0].fact: 'doraa' is no fact; did you mean 'dora'?",
        "rules[0].outcome: input should be 'rejected', 'ignored' or 'wrong'",
        "rules[0].colour: extra inputs are not permitted",
        "notes: input should be a valid tuple",
    ]


def test_a_fact_must_be_decided_and_once(tmp_path):
    served = yaml.safe_load(file_of("peft").read_text(encoding="utf-8"))["serves"]
    (message,) = refused(tmp_path, serves=[fact for fact in served if fact not in ("dora", "rslora")])
    assert message.startswith("undecided: rslora, dora; ")
    (message,) = refused(tmp_path, serves=[*served, "shape"])
    assert message == "shape: both under rules and under serves"


@pytest.mark.parametrize("name", ["vlm", "", "no/such.yaml", "../vllm"])
def test_an_engine_that_is_not_there(name):
    with pytest.raises(DeltaSpecError) as error:
        engines.needs(name)
    (finding,) = error.value.diagnostics
    assert finding.code == ("DS101" if name.endswith(".yaml") else "DS627")
    assert name != "vlm" or "did you mean vllm?" in (finding.suggestion or "")


def test_rules_are_read_without_torch():
    code = "import sys; from deltaspec import engines; engines.needs('vllm'), engines.notes('vllm'); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
