"""The list of codes: each that the package uses is in it."""

import re
from pathlib import Path

import deltaspec
from deltaspec.diagnostics.codes import CODES


def test_every_code_that_the_package_uses_is_listed_with_a_title():
    used = set()
    for path in Path(deltaspec.__file__).parent.rglob("*.py"):
        if path.name != "diagnostics.py":
            used |= set(re.findall(r"\"(DS\d{3})\"", path.read_text(encoding="utf-8")))
    assert used - CODES.keys() == set()
    assert list(CODES) == sorted(CODES)
    assert all(re.fullmatch(r"DS[1-6]\d\d", code) and title for code, title in CODES.items())
