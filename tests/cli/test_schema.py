"""`deltaspec schema`: it prints, writes and checks, with plugins only when asked."""

from pathlib import Path

from click.testing import CliRunner

from deltaspec.cli import main
from deltaspec.language.schema.accept import COMMITTED
from deltaspec.language.schema.generate import schema_text


def test_the_verb_prints_writes_and_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    assert run(main, ["schema"]).output == schema_text()
    assert run(main, ["schema", "--check"]).exit_code == 1
    assert run(main, ["schema", COMMITTED]).exit_code == 0
    assert Path(COMMITTED).read_text(encoding="utf-8") == schema_text()
    assert run(main, ["schema", "--check"]).exit_code == 0
    Path(COMMITTED).write_text(schema_text().replace("Bounds of a count", "Bonds of a count"), encoding="utf-8")
    drifted = run(main, ["schema", "--check"])
    assert drifted.exit_code == 1
    assert '-      "description": "Bonds of a count' in drifted.output
    assert '+      "description": "Bounds of a count' in drifted.output
    assert "error[DS221] the schema file is out of date" in drifted.output


def test_the_verb_includes_plugins_only_when_asked(plugin):
    run = CliRunner().invoke
    assert "zz_plugin" in run(main, ["schema", "--with-plugins"]).output
    assert "zz_plugin" not in run(main, ["schema"]).output
