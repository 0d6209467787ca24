"""OpenDelta's addressing: which modules `modified_modules` means, by ends of names, by `[r]` regexes, and by the names
that several architectures have in common (`attn@.q@`).

Read in `name_based_addressing.py`, `structure_mapping.py` and `DeltaBase.find_key` of OpenDelta 0.3.2.
`structures.json` has, by the class of a model, its modules' paths (`$` is a number) and their common names; a second
name stands for a module that an architecture does not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from deltaspec.names.patterns import matched

REGEX = "[r]"
Structure = Mapping[str, Sequence[str]]


def structures(types: Mapping[str, str]) -> dict[str, Structure]:
    """Return the common structures in a model, by the module that each is of; `types` are classes by module."""
    found: dict[str, Structure] = {}
    for name, kind in types.items():
        inside = any(root == "" or name.startswith(f"{root}.") for root in found)
        if kind in _known() and not inside:
            found[name] = _known()[kind]
    return found


def addressed(
    names: Sequence[str], patterns: Sequence[str], excluded: Sequence[str], within: Mapping[str, Structure]
) -> list[str]:
    """Return the modules that patterns mean, by common names in these structures. Raises PatternError."""
    found = []
    for name in names:
        if any(name.startswith(start) for start in excluded):
            continue
        if any(_ends(called, pattern) for called in in_common(name, within) for pattern in patterns):
            found.append(name)
    return found


def in_common(name: str, within: Mapping[str, Structure]) -> list[str]:
    """Return what a module is called in the common structure: its name, and that of what it stands for, if anything."""
    for root, structure in within.items():
        if root and not name.startswith(f"{root}."):
            continue
        segments = name[len(root) :].lstrip(".").split(".")
        used, common = _longest(segments, structure)
        lead, rest = ([root] if root else []), segments[used:]
        return [".".join([*lead, *(called.split(".") if called else []), *rest]) for called in common or [""]]
    return [name]


def _longest(segments: Sequence[str], structure: Structure) -> tuple[int, list[str]]:
    """Return how many segments the structure knows, and their common names."""
    path: list[str] = []
    numbers: list[str] = []
    used, common = 0, list[str]()
    for count, segment in enumerate(segments, 1):
        if _leads([*path, segment], structure):
            path.append(segment)
        elif segment.isdigit() and _leads([*path, "$"], structure):
            path.append("$")
            numbers.append(segment)
        else:
            break
        if ".".join(path) in structure:
            used, common = count, [_filled(called, numbers) for called in structure[".".join(path)]]
    return used, common


def _leads(path: Sequence[str], structure: Structure) -> bool:
    start = ".".join(path)
    return any(known == start or known.startswith(f"{start}.") for known in structure)


def _filled(called: str, numbers: Sequence[str]) -> str:
    """Put a layer's numbers in, and the mark of common names behind the others."""
    left = iter(numbers)
    return ".".join(next(left) if segment == "$" else f"{segment}@" for segment in called.split("."))


def _ends(name: str, pattern: str) -> bool:
    """Return whether a pattern is a name's end, from one of its segments on."""
    if not pattern.startswith(REGEX):
        return name == pattern or name.endswith(f".{pattern}")
    found = matched("search", pattern[len(REGEX) :], name)
    if found is None or found.end() != len(name):
        return False
    return found.start() == 0 or name[found.start() - 1] == "."


@cache
def _known() -> dict[str, Structure]:
    content: dict[str, Structure] = json.loads(files(__package__).joinpath("structures.json").read_text("utf-8"))
    return content
