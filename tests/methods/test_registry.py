"""A third party's method: the package in tests/methods, installed the way pip leaves it, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from repository import ROOT

PLUGIN = Path(__file__).parent / "plugin"
SPEC = """deltaspec: 1
deltas:
  - {name: moved, method: shift, params: {scale: 0.5}, target: {type: Linear}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Lay out what installing the package would: its code, and a dist-info with the entry points of its pyproject."""
    place = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["name"].replace("-", "_")
    shutil.copytree(PLUGIN / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    info = place / f"{name}-{project['version']}.dist-info"
    info.mkdir()
    header = f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(header, encoding="utf-8")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


def test_it_is_in_the_schema_with_plugins_and_not_in_the_committed_one(installed):
    with_plugins = python(installed, "-m", "deltaspec", "schema", "--with-plugins")
    assert with_plugins.returncode == 0, with_plugins.stderr
    schema = json.loads(with_plugins.stdout)
    assert "shift" in schema["definitions"]["DeltaEntry"]["properties"]["method"]["enum"]
    scale = schema["definitions"]["shift.params"]["properties"]["scale"]
    assert scale["description"] == "Factor in front of the shift." and scale["exclusiveMinimum"] == 0
    own = python(installed, "-m", "deltaspec", "schema")
    assert own.returncode == 0 and "shift.params" not in json.loads(own.stdout)["definitions"]


def test_specs_that_use_it_are_validated_without_torch(installed, tmp_path):
    good, bad = tmp_path / "good.deltaspec.yaml", tmp_path / "bad.deltaspec.yaml"
    good.write_text(SPEC, encoding="utf-8")
    bad.write_text(SPEC.replace("scale: 0.5", "scael: 0.5"), encoding="utf-8")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text("raise ImportError('no torch here')\n", encoding="utf-8")
    without = installed | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "blocked"), installed["PYTHONPATH"]])}
    accepted = python(without, "-m", "deltaspec", "validate", str(good))
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    refused = python(without, "-m", "deltaspec", "validate", str(bad))
    assert refused.returncode == 1 and 'did you mean "scale"' in refused.stdout.replace("'", '"'), refused.stdout
    missing = python(os.environ | {"PYTHONPATH": str(ROOT)}, "-m", "deltaspec", "validate", str(good))
    assert missing.returncode == 1 and "shift" in missing.stdout


@pytest.mark.parametrize(
    ("key", "said"),
    [("shift_factor", "did you mean 'scale'?"), ("shift_init", "delete it: there is no such option here")],
)
def test_its_own_foreign_names_get_suggestions(installed, tmp_path, key, said):
    spec = tmp_path / "foreign.deltaspec.yaml"
    spec.write_text(SPEC.replace("scale: 0.5", f"{key}: 0.5"), encoding="utf-8")
    refused = python(installed, "-m", "deltaspec", "validate", str(spec))
    assert refused.returncode == 1 and said in refused.stdout.replace('"', "'"), refused.stdout


def test_it_keeps_the_contract_of_every_method(installed):
    program = (
        "from deltaspec.testing import check_method\n"
        "print(check_method('shift', params={'scale': 0.5}).trainable)\n"
        "print(check_method('shift', target='0').trainable)\n"
    )
    checked = python(installed, "-c", program)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.split() == ["36", "16"]


def test_a_delta_of_it_is_saved_and_restored_in_another_process(installed, tmp_path):
    build = "import torch, deltaspec\ntorch.manual_seed(0)\nmodel = torch.nn.Sequential(torch.nn.Linear(3, 2))\n"
    build += "x = torch.ones(1, 3)\n"
    spec = tmp_path / "moved.deltaspec.yaml"
    spec.write_text(SPEC, encoding="utf-8")
    train = build + f"c = deltaspec.compile(model, {str(spec)!r}, example_inputs=x)\n"
    train += "torch.nn.init.ones_(c.deltas['moved'].tensor('0.bias'))\n"
    train += f"c.save({str(tmp_path / 'saved')!r})\nprint(c(x).tolist(), (model(x) + 0.5).tolist())\n"
    load = (
        build + f"c = deltaspec.restore(model, {str(tmp_path / 'saved')!r}, example_inputs=x)\nprint(c(x).tolist())\n"
    )
    trained, loaded = python(installed, "-c", train), python(installed, "-c", load)
    assert trained.returncode == 0, trained.stderr
    assert loaded.returncode == 0, loaded.stderr
    one = loaded.stdout.strip()
    assert trained.stdout.strip() == f"{one} {one}"
