"""Names where only some characters may stand: none is lost, none becomes another, none leaves its folder."""

from __future__ import annotations

import re

import pytest

from deltaspec.names.escaping import DELTA_NAME, MOST, dotted, escaped, file_stem, flat, unescaped

GOOD = ["french", "a-b_c", "user/lora", "1_task", "v1.2", "org/v1.2/x", "2024", "a..b", "_x", "CON", "x%"]


@pytest.mark.parametrize("name", [*GOOD, "é/ü", "a b", "%2F"])
def test_escaping_is_reversible_and_safe(name):
    assert unescaped(escaped(name)) == name
    assert re.fullmatch(r"[A-Za-z0-9_%-]+", escaped(name))


@pytest.mark.parametrize("name", ["a.b.0.down", "down", "a~b.c", "x/y.z", "x%2Fy", "~.%"])
def test_flat_names_are_reversible_and_no_paths(name):
    assert dotted(flat(name)) == name and not set("./\\") & set(flat(name))


def test_names_of_today_stay_and_no_two_become_one():
    assert escaped("a-b_C9") == file_stem("a-b_C9") == "a-b_C9"
    names = ["a/b", "a.b", "a%2Fb", "a_b", "ab", "x" * 151, "x" * 152, "/" * 60 + "a", "/" * 60 + "b"]
    assert len({*map(file_stem, names)}) == len(names)
    assert all(len(file_stem(name)) <= 150 for name in names)


@pytest.mark.parametrize("name", ["con", "AUX", "nul", "com1", "Lpt9"])
def test_no_file_is_a_device_on_windows(name):
    assert file_stem(name).casefold() != name.casefold() and unescaped(file_stem(name)) == name


@pytest.mark.parametrize(
    "name", ["../x", "/x", "x/", "a//b", ".", "..", "a/../b", "a/.b", "-x", "a\\b", "a:b", "a b", ""]
)
def test_what_is_no_name(name):
    assert re.fullmatch(DELTA_NAME, name) is None
    assert all(re.fullmatch(DELTA_NAME, good) for good in GOOD if "%" not in good)
    assert MOST >= 96  # as long as a name on the hub
