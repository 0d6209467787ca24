"""The command line as a whole: names that act on terminals, consoles of another code page, Python without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

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


def in_one_process(*lines, before="", **environment):
    """Run command lines in one new process; what each prints is followed by its exit code and a zero."""
    code = f"""
import sys
{before}
from deltaspec.cli import main
for line in {lines!r}:
    try:
        main(line)
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stdout.buffer.write(b"\\n%d\\0" % stop.code)
        sys.stdout.flush()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=environment)


def test_without_torch_there_is_help_and_verbs_that_need_it_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.deltaspec.yaml").write_text(SPEC)
    lines = ["", "--help", "plan a:b SPEC", "lock a:b SPEC", "explain a:b SPEC layer", "tree a:b", "methods"]
    given = [line.replace("SPEC", "good.deltaspec.yaml").split() for line in lines]
    without = "sys.modules['torch'] = None; sys.stderr = sys.stdout"
    done = in_one_process(*given, before=without)
    assert done.returncode == 0 and not done.stderr, done.stderr
    printed = [part.rpartition("\n") for part in done.stdout.decode().split("\0")[:-1]]
    for line, (output, _, code) in zip(lines, printed, strict=True):
        assert code == ("0" if line in ("--help", "methods") else "2") and "Traceback" not in output
        said = {"methods": "`lora`"}.get(line, "validate")
        if " " in line:
            said = f"{line.split()[0]} needs torch: pip install 'deltaspec[torch]'"
        assert said in output


SPITEFUL = 'deltaspec: 1\ndeltas: [{name: d, method: !a%0a::error::%1b[31m x, "k\\u202e\\u200b": 1, "\\u00e9": 2}]\n'


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_is_printed_acts_on_no_terminal_in_any_code_page(encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("::error::é\u202e\x1b[31m.deltaspec.yaml").write_text(SPITEFUL, encoding="utf-8")
    formats = ["text", "json", "github", "sarif"]
    done = in_one_process(*(["validate", ".", "--format", each] for each in formats), PYTHONIOENCODING=encoding)
    assert not done.stderr
    printed = [part.rpartition(b"\n") for part in done.stdout.split(b"\0")[:-1]]
    for output_format, (output, _, code) in zip(formats, printed, strict=True):
        assert code == b"1"
        text = output.decode(encoding) + "\n"
        assert all(c.isprintable() or c == "\n" for c in text)
        if output_format in ("json", "sarif"):
            assert text.isascii() and "\\u001b" not in text and json.loads(text)
        if output_format == "text":
            assert not any(line.startswith("::") for line in text.splitlines())
