"""What the tests of verbs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import CONFIG, SPEC, Run

from deltaspec.cli import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(CONFIG))
    Path("french.deltaspec.yaml").write_text(SPEC)
    return lambda *args: CliRunner().invoke(main, list(args))
