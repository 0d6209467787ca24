"""`make check-cuda`: what it does without a device, and its own machinery, tried on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT

from checks.cuda import __main__ as cuda
from checks.cuda.base import Check, Skipped


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: make check-cuda")
def test_without_a_device_it_says_why_and_passes() -> None:
    found = subprocess.run([sys.executable, "-m", "checks.cuda"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("check-cuda: skipped: torch")


@pytest.mark.parametrize("name", ["attach and detach in bfloat16", "contract of lora", "rows are trained as alone"])
def test_checks_hold_on_the_cpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main(["--device", "cpu", "--only", name]) == 0
    assert "holds" in capsys.readouterr().out


def test_what_fails_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong(device: torch.device) -> str:
        raise AssertionError("3e-1 | off")

    def nothing(device: torch.device) -> str:
        raise Skipped("not here")

    checks = [Check("g", "one", wrong), Check("g", "two", nothing), Check("g", "three", lambda device: "all")]
    monkeypatch.setattr(cuda, "known", lambda: checks)
    text = tmp_path / "cuda.md"
    text.write_text(f"before\n{cuda.BEGIN}of yesterday\n{cuda.END}after\n")
    assert cuda.main(["--device", "cpu", "--write", str(text)]) == 1
    printed = capsys.readouterr().out
    assert "fails" in printed and "skipped" in printed and "holds" in printed
    written = text.read_text()
    assert "| g | one | fails |" in written and "3e-1 \\| off" in written and "of yesterday" not in written
    assert written.startswith("before\n") and written.endswith("after\n")
    with pytest.raises(SystemExit):
        cuda.main(["--device", "cpu", "--only", "nothing like it"])


def test_groups_and_the_place_of_the_table() -> None:
    assert {"exactness", "dtypes", "inductor", "training", "rows", "bitsandbytes"} <= set(cuda.groups())
    marks = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
    assert cuda.BEGIN in marks and cuda.END in marks
