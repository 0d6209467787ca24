"""Tests mirror the layers: each file stands beside the module it tests, or in a folder that says what belongs there."""

import ast
from pathlib import Path

import pytest
from repository import ROOT

from deltaspec.compiler.build import Built

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
ACROSS = ("contract", "ecosystem", "others", "project")
"""Folders for tests of no single module. Each has a README of a line."""
INSIDE = {"_built", *(f"_{part}" for part in Built._fields)}
"""What a compiled model is made of."""
LINES = 310


def test_each_file_of_a_layer_has_its_module():
    tests = [path.relative_to(TESTS) for path in FILES if path.name.startswith("test_")]
    beside = [path for path in tests if path.parts[0] not in ACROSS]
    assert len(beside) > 100
    assert [str(path) for path in beside if not _module(path).exists()] == []


def _module(test: Path) -> Path:
    """Return what a test file tests; one that is named after its folder tests the folder's `__init__.py`."""
    name = test.name.removeprefix("test_")
    return ROOT / "deltaspec" / test.parent / ("__init__.py" if name == f"{test.parent.name}.py" else name)


@pytest.mark.parametrize("folder", [*ACROSS, "support"])
def test_a_folder_that_is_no_layer_says_what_belongs_there(folder):
    assert len((TESTS / folder / "README.md").read_text(encoding="utf-8").splitlines()) == 1


def test_tests_import_no_test_and_look_inside_in_one_place():
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path.name} imports {name}" for name in names if name.startswith("test_")]
            if isinstance(node, ast.Attribute) and node.attr in INSIDE and path.name != "inside.py":
                wrong.append(f"{path.name}:{node.lineno} .{node.attr}")
    assert wrong == []


def test_no_file_of_tests_is_long():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}
