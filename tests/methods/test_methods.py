"""The face for authors of methods: what it exports, what it loads, and the method that its text writes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import deltaspec.methods as face
from deltaspec.methods.declarations import InitKind
from deltaspec.testing import check_method

NAMES = {"Form", "Init", "Method", "MethodParams", "Promises", "Rank", "Refusal", "Site", "TensorSpec"}


def test_it_exports_what_authors_need():
    assert set(face.__all__) == NAMES | {"builtin_methods", "methods"}
    assert set(face.__all__) <= set(dir(face))
    assert face.methods()["vera"] is face.builtin_methods()["vera"]
    assert isinstance(face.methods()["vera"], face.Method)
    with pytest.raises(AttributeError, match="has no attribute 'Metod'"):
        _ = face.Metod  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "unneeded"),
    [("", {"torch", "pydantic"}), ("methods", {"torch", "pydantic"}), ("Method, MethodParams, Rank", {"torch"})],
)
def test_names_load_what_they_need_and_no_more(name, unneeded):
    program = f"import sys\nfrom deltaspec.methods import {name}\n" if name else "import sys, deltaspec.methods\n"
    program += f"print(*{unneeded!r} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_method_of_its_text_keeps_the_contract(monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", face.__doc__, re.DOTALL)
    written: dict[str, object] = {"__name__": "gain"}
    exec(compile(code, "gain", "exec"), written)
    entry = SimpleNamespace(name="gain", load=lambda: written["Gain"])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == face.__name__ else [])
    face.methods.cache_clear()
    try:
        assert check_method("gain", params={"start": 1.25}).trainable == 16 + 16 + 4
    finally:
        face.methods.cache_clear()


def test_the_old_home_still_imports_and_names_the_new_one():
    sys.modules.pop("deltaspec.methods._base", None)
    with pytest.warns(DeprecationWarning, match=r"import from deltaspec\.methods$"):
        old = importlib.import_module("deltaspec.methods._base")
    for name in NAMES:
        assert getattr(old, name) is getattr(face, name), name
    assert old.InitKind is InitKind
