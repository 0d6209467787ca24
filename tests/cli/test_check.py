"""`deltaspec check`, by what it prints and by its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from peft_adapters import base, write

from deltaspec import engines
from deltaspec.cli import main


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base without weights, and adapters."""
    root = tmp_path_factory.mktemp("check")
    config = base().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(root / "base")
    return {"base": str(root / "base")} | {kind: str(write(root / kind, kind)) for kind in ("plain", "dora", "rank 32")}


def check(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["check", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("engine", engines.known())
def test_an_adapter_that_is_served_as_it_was_trained(places, engine):
    result = check(places["plain"], "--model", places["base"], "--for", engine)
    assert result.exit_code == 0
    assert result.stdout == f"{places['plain']}: nothing that {engine} would reject, ignore or get wrong\n"
    assert [f"note: {note}" for note in engines.notes(engine)] == result.stderr.splitlines()


def test_findings_are_written_in_every_format(places):
    arguments = (places["dora"], "--model", places["base"], "--for", "vllm")
    result = check(*arguments)
    assert result.exit_code == 1
    assert "error[DS605] rejected by vLLM: use_dora: true at model.layers.{0..1}" in result.stdout
    written = check(*arguments, "--format", "json")
    assert written.exit_code == 1 and written.stderr == ""
    (finding,) = json.loads(written.stdout)["findings"]
    assert (finding["code"], finding["path"]) == ("DS605", "use_dora")
    assert finding["title"] == "DoRA under an engine without it"
    assert json.loads(check(*arguments, "--format", "sarif").stdout)["runs"][0]["results"][0]["ruleId"] == "DS605"
    assert check(*arguments, "--format", "github").stdout.startswith("::error file=")
    clean = check(places["plain"], *arguments[1:], "--format", "json")
    assert clean.exit_code == 0 and json.loads(clean.stdout)["findings"] == []


def test_the_limit_of_the_start(places):
    arguments = (places["rank 32"], "--model", places["base"], "--for", "vllm")
    assert check(*arguments).exit_code == 1
    assert check(*arguments, "--max-rank", "32").exit_code == 0


def test_usage(places):
    for arguments, words in (
        (("--model", places["base"]), "check needs --for"),
        (("--for", "vllm"), "check needs --model"),
        (("--model", places["base"], "--for", "vlm"), "'vlm' is not one of llama.cpp, lorax"),
        (("--model", places["base"], "--for", "vlm"), "vllm, FILE.yaml: did you mean 'vllm'?"),
    ):
        result = check(places["plain"], *arguments)
        assert result.exit_code == 2 and words in result.stderr


def test_what_cannot_be_read_is_a_finding(places, tmp_path):
    result = check(str(tmp_path / "nothing"), "--model", places["base"], "--for", "vllm")
    assert result.exit_code == 1 and "error[DS521] there is no such directory" in result.stdout
    result = check(places["plain"], "--model", str(tmp_path / "nothing"), "--for", "vllm")
    assert result.exit_code == 1 and "error[DS321]" in result.stdout
    rules = tmp_path / "own.yaml"
    rules.write_text("engine: own\n")
    result = check(places["plain"], "--model", places["base"], "--for", str(rules))
    assert result.exit_code == 1 and "error[DS626]" in result.stdout
    assert not list(Path(places["plain"]).glob("*.tmp"))
