"""A model whose names act on terminals, in all that the command line prints of it."""

import json
import sys
from pathlib import Path

import pytest

FACTORY = """
from torch import nn

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("a\\x1b[31m\\n::error::\\u202e\\ud800", nn.Linear(2, 2))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x

def build():
    return nn.Sequential(Inner())
"""
SPEC = "deltaspec: 1\ndeltas:\n  - {name: d, method: lora, target: {type: Linear}, params: {rank: 1}}\n"


@pytest.mark.parametrize(
    "line",
    [
        "tree MODEL",
        "tree MODEL --spec s.deltaspec.yaml --all",
        "plan MODEL s.deltaspec.yaml",
        "plan MODEL s.deltaspec.yaml --format json",
        "plan MODEL s.deltaspec.yaml --format markdown",
        "explain MODEL s.deltaspec.yaml FQN",
        "explain MODEL s.deltaspec.yaml FQN2",
    ],
)
def test_names_of_modules_are_printed_clean(run, monkeypatch, line):
    monkeypatch.delitem(sys.modules, "hostile_factory", raising=False)
    Path("hostile_factory.py").write_text(FACTORY)
    Path("s.deltaspec.yaml").write_text(SPEC)
    words = {"MODEL": "hostile_factory:build", "FQN": "0.a\x1b[31m\n::error::\u202e\ud800", "FQN2": "b\x1b[31m\n::x"}
    result = run(*(words.get(word, word) for word in line.split()))
    assert result.exit_code == (1 if "FQN2" in line else 0), result.output
    assert all(c.isprintable() or c == "\n" for c in result.output)
    assert not any(part.startswith("::") for part in result.output.splitlines())
    assert "x1b[31m" in result.output
    if "json" in line:
        assert result.output.isascii() and json.loads(result.output)["sites"] == 1


def test_ctrl_c_is_no_finding(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "interrupted_factory", raising=False)
    Path("interrupted_factory.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    result = run("tree", "interrupted_factory:build")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "deltaspec: interrupted\n")


@pytest.mark.parametrize(
    "line",
    [
        "convert '' -o out",
        "convert french -o ''",
        "export french -o out --delta ''",
        "plan config.json ''",
        "validate ''",
    ],
)
def test_nothing_may_be_empty(run, line):
    result = run(*(word.strip("'") for word in line.split()))
    assert result.exit_code == 2 and "it is empty" in result.stderr
