"""`deltaspec convert`: what is in the place that it is to write to stays there."""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner
from repository import ROOT

from deltaspec.cli import main


def converted(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["convert", *map(str, arguments), "--model", str(ROOT / "docs/examples/base")])
    return result.exit_code, result.stdout


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    for name in ("french", "german"):
        shutil.copytree(ROOT / "docs/examples/french", tmp_path / name)
    assert converted(tmp_path / "french", "-o", tmp_path / "out")[0] == 0
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "german.deltaspec.yaml").write_text("deltaspec: 1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, out in (("german", "out"), ("french", "out"), ("german", "specs")):
        status, said = converted(tmp_path / source, "-o", tmp_path / out)
        assert (status, said.count("DS562")) == (1, 1)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert converted(tmp_path / "french", "-o", tmp_path / "specs")[0] == 0
