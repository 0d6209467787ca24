"""`deltaspec validate`, the way users and CI run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from repository import ROOT

from deltaspec.cli import main

GOOD = "deltaspec: 1\ndeltas: [{name: d, method: lora}]\n"
BAD = 'deltaspec: 1\ndeltas:\n  - {name: d, method: lorra}\n  - {name: "x: 100%, y", method: lora}\n'


@pytest.fixture
def specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "specs/good.deltaspec.yaml": GOOD,
        "specs/sub dir/bad.deltaspec.yml": BAD,
        "specs/good.deltaspec.json": '{"deltaspec": 1, "deltas": [{"name": "d", "method": "full"}]}',
        "specs/.hidden/no.deltaspec.yaml": BAD,
        "specs/other.yaml": "not: a spec",
        "empty/readme.txt": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["validate", *arguments])


def test_clean_specs(specs):
    result = run("specs/good.deltaspec.yaml", "specs/good.deltaspec.json")
    assert (result.exit_code, result.output) == (0, "2 files, 0 findings\n")


def test_findings(specs):
    result = run("specs")
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        'specs/sub dir/bad.deltaspec.yml:3:23: error[DS206] unknown method "lorra"',
        '  = help: did you mean "lora"?',
        'specs/sub dir/bad.deltaspec.yml:4:12: error[DS208] "x: 100%, y" is not a name',
        "  = help: names are letters, digits, - and _, with . and / between them: french, user/lora, 1_task",
        "skipped, since hidden: specs/.hidden",
        "3 files, 2 findings",
    ]


def test_globs_and_repeated_files(specs):
    assert run("specs/*.deltaspec.*").output == "2 files, 0 findings\n"
    assert run("specs/**/*.yml").exit_code == 1
    assert run("specs/good.deltaspec.yaml", "specs/good.*").output == "2 files, 0 findings\n"


@pytest.mark.parametrize("arguments", [(), ("empty",), ("none/*.yaml",), ("--format", "xml", "specs"), ("--nope",)])
def test_nothing_to_check_is_a_usage_error(specs, arguments):
    assert run(*arguments).exit_code == 2


def test_a_directory_of_an_adapter_is_told_as_one(specs):
    for folder in ("lora", "several/french"):
        Path(folder).mkdir(parents=True)
        Path(folder, "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
        result = run(folder.partition("/")[0])
        assert result.exit_code == 1 and result.output.endswith("1 file, 1 finding\n")
        assert f"error[DS226] this is a PEFT configuration: deltaspec convert {folder} -o OUT reads it" in result.output
    assert run("specs", "lora").output.endswith("4 files, 3 findings\n")


def test_directories_of_adapterhub_and_opendelta_are_told_as_such(specs):
    for folder in ("setup", "setup/a", "delta", "model"):
        Path(folder).mkdir()
    Path("setup", "adapter_setup.json").write_text('{"adapter_setup": {"type": "Stack", "children": []}}')
    Path("setup", "a", "adapter_config.json").write_text('{"config": "lora", "model_class": "BertModel"}')
    Path("delta", "config.json").write_text('{"delta_type": "lora", "lora_r": 8}')
    Path("model", "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    for folder, library in (("setup", "AdapterHub"), ("setup/a", "AdapterHub"), ("delta", "OpenDelta")):
        result = run(folder)
        assert result.exit_code == 1 and result.output.endswith("1 file, 1 finding\n")
        assert f"an {library} configuration: deltaspec convert {folder} -o OUT reads it" in result.output
    assert run("model").exit_code == 2


def test_a_missing_file_is_a_finding(specs):
    result = run("none.yaml")
    assert result.exit_code == 1
    assert result.output == "none.yaml: error[DS101] cannot read: No such file or directory\n1 file, 1 finding\n"


def test_json(specs):
    result = run("specs", "--format", "json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert report["files"] == 3
    assert report["findings"][0] == {
        "code": "DS206",
        "title": "unknown method",
        "message": 'unknown method "lorra"',
        "suggestion": 'did you mean "lora"?',
        "file": "specs/sub dir/bad.deltaspec.yml",
        "line": 3,
        "column": 23,
        "path": "deltas[0].method",
    }
    assert json.loads(run("specs/good.deltaspec.yaml", "--format", "json").output) == {"files": 1, "findings": []}


def test_github(specs):
    assert run("specs", "--format", "github").output.splitlines() == [
        "::error file=specs/sub dir/bad.deltaspec.yml,line=3,col=23,title=DS206 unknown method::"
        'unknown method "lorra"%0Ahelp: did you mean "lora"?',
        "::error file=specs/sub dir/bad.deltaspec.yml,line=4,col=12,title=DS208 malformed name or text::"
        '"x: 100%25, y" is not a name%0A'
        "help: names are letters, digits, - and _, with . and / between them: french, user/lora, 1_task",
        "skipped, since hidden: specs/.hidden",
        "3 files, 2 findings",
    ]


def test_github_escapes_properties_and_says_what_it_will_not_show(specs):
    Path("a,b:c%.deltaspec.yaml").write_text("deltaspec: 1\n" + "".join(f"k{i}: 1\n" for i in range(12)))
    first, second, *_ = run("a,b:c%.deltaspec.yaml", "--format", "github").output.splitlines()
    assert first == "::notice title=deltaspec::1 file, 13 findings; GitHub shows 10 of them, the log has them all"
    assert second.startswith("::error file=a%2Cb%3Ac%25.deltaspec.yaml,line=1,col=1,title=DS202 missing key::")


def test_sarif(specs):
    log = json.loads(run("specs", "--format", "sarif").output)
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (found,) = log["runs"]
    rules = found["tool"]["driver"]["rules"]
    assert found["tool"]["driver"]["name"] == "deltaspec"
    assert [rule["id"] for rule in rules] == ["DS206", "DS208"]
    assert all(rule["shortDescription"]["text"] for rule in rules)
    assert len(found["results"]) == 2
    for result in found["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == "error"
        assert result["message"]["text"]
        (place,) = result["locations"]
        artifact, region = place["physicalLocation"]["artifactLocation"], place["physicalLocation"]["region"]
        assert artifact == {"uri": "specs/sub%20dir/bad.deltaspec.yml", "uriBaseId": "%SRCROOT%"}
        assert region["startLine"] >= 1
        assert region["startColumn"] >= 1
    clean = json.loads(run("specs/good.deltaspec.yaml", "--format", "sarif").output)
    assert clean["runs"][0]["results"] == []


def test_sarif_uris_are_relative_wherever_they_can_be(specs):
    inside = json.loads(run(str(specs / "specs"), "--format", "sarif").output)
    uri = inside["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert uri == {"uri": "specs/sub%20dir/bad.deltaspec.yml", "uriBaseId": "%SRCROOT%"}
    os.chdir("empty")
    outside = json.loads(run(str(specs / "specs"), "--format", "sarif").output)
    uri = outside["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.startswith("file:///")


def test_no_region_where_there_is_no_line(specs):
    log = json.loads(run("none.yaml", "--format", "sarif").output)
    (result,) = log["runs"][0]["results"]
    assert "region" not in result["locations"][0]["physicalLocation"]
    assert "line=" not in run("none.yaml", "--format", "github").output


def shell(*arguments, **options):
    command = [sys.executable, "-m", "deltaspec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, **options)


def test_the_program_and_its_exit_codes(specs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert shell("validate", "specs/good.deltaspec.yaml", env=environment).returncode == 0
    assert shell("validate", "specs", env=environment).returncode == 1
    assert shell("validate", env=environment).returncode == 2
    unknown = shell("validat", "specs", env=environment)
    assert (unknown.returncode, "Did you mean 'validate'?" in unknown.stderr) == (2, True)
    assert "validate" in shell("--help", env=environment).stdout
    assert shell("--version", env=environment).stdout.startswith("deltaspec ")


def test_a_terminal_without_utf8_still_gets_the_findings(specs):
    Path("u.deltaspec.yaml").write_text("deltaspec: 1\ndeltas: [{name: ü→, method: lora}]\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    done = shell("validate", "u.deltaspec.yaml", env=environment, encoding="latin-1")
    assert done.returncode == 1
    assert 'error[DS208] "ü\\u2192" is not a name' in done.stdout


def test_it_imports_no_torch(specs):
    code = """
import sys
import deltaspec
from deltaspec.cli import main
try:
    main(["validate", "specs"])
except SystemExit as stop:
    assert stop.code == 1
assert deltaspec.load("specs/good.deltaspec.yaml").deltas and deltaspec.validate("none")
heavy = {"torch", "transformers", "numpy", "rich", "safetensors"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=environment)
    assert done.returncode == 0, done.stderr


def test_an_internal_error_is_no_finding(specs, monkeypatch):
    def broken(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("deltaspec.cli.validate.validate", broken)
    assert run("specs").exit_code == 2


def test_standard_input(specs):
    def piped(text, *arguments):
        return CliRunner().invoke(main, ["validate", "-", *arguments], input=text)

    assert piped(GOOD).output == "1 file, 0 findings\n"
    assert piped(BAD).output.startswith('<stdin>:3:23: error[DS206] unknown method "lorra"')
    found = json.loads(piped(BAD, "--format", "sarif").output)["runs"][0]["results"][0]["locations"][0]
    assert found["physicalLocation"]["artifactLocation"]["uri"] == "%3Cstdin%3E"
    assert piped("a" * (1 << 20) + "a").output.startswith("<stdin>: error[DS102]")
    assert piped(b"\xff").output.startswith("<stdin>:1:1: error[DS103]")


def test_a_folder_says_what_it_skipped(specs):
    Path("linked").symlink_to("specs", target_is_directory=True)
    Path("empty/.git").mkdir()
    skipped = ["skipped, since hidden: empty/.git, specs/.hidden", "skipped, since linked: linked"]
    assert run(".").output.splitlines()[-3:-1] == skipped
    assert json.loads(run(".", "--format", "json").output)["skipped"] == skipped
    (notified,) = json.loads(run(".", "--format", "sarif").output)["runs"][0]["invocations"]
    assert [note["message"]["text"] for note in notified["toolExecutionNotifications"]] == skipped
    refused = run("empty")
    assert refused.exit_code == 2 and "skipped, since hidden: empty/.git" in refused.output


def test_a_folder_that_cannot_be_read_is_named(specs, monkeypatch):
    scan = os.scandir

    def denied(path):
        if str(path).endswith("sub dir"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    result = run("specs")
    assert "skipped, since unreadable (Permission denied): specs/sub dir" in result.output.splitlines()


@pytest.mark.parametrize("where", [".", "specs", "specs/sub dir", "/"])
def test_paths_are_those_of_the_repository_wherever_the_command_runs(specs, monkeypatch, where):
    Path(".git").mkdir()
    for argument in (str(specs / "specs"), os.path.relpath(specs / "specs", where if where == "/" else specs / where)):
        monkeypatch.chdir(specs)
        os.chdir(where)
        found = json.loads(run(argument, "--format", "sarif").output)["runs"][0]["results"][0]["locations"][0]
        uri = found["physicalLocation"]["artifactLocation"]
        assert uri == {"uri": "specs/sub%20dir/bad.deltaspec.yml", "uriBaseId": "%SRCROOT%"}
        assert run(argument, "--format", "github").output.startswith("::error file=specs/sub dir/bad.deltaspec.yml,")


def test_a_parameter_is_a_glob_of_its_own(specs):
    for word in ("w[0-9]", "**x", "wei?ht", "a..b", "a b"):
        Path("p.deltaspec.yaml").write_text(
            f"deltaspec: 1\ndeltas: [{{name: d, method: lora, target: {{parameter: '{word}'}}}}]\n"
        )
        result = run("p.deltaspec.yaml")
        assert result.exit_code == 1 and f'error[DS216] parameter "{word}": ' in result.output
        assert "regex" not in result.output


def test_a_spec_may_name_its_schema(specs):
    text = '{"$schema": "deltaspec-v1.schema.json", "deltaspec": 1, "deltas": [{"name": "d", "method": "lora"}]}'
    Path("s.deltaspec.json").write_text(text)
    assert run("s.deltaspec.json").output == "1 file, 0 findings\n"
    Path("s.deltaspec.json").write_text(text.replace('"deltaspec-v1.schema.json"', "3"))
    assert "error[DS203] $schema must be text, not 3" in run("s.deltaspec.json").output
