"""Findings about atoms that match nothing, with a way out that was tried on the table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from json import dumps
from time import process_time

from deltaspec.diagnostics.wording import closest, counted
from deltaspec.methods.registry import builtin_methods
from deltaspec.names.folding import fold
from deltaspec.names.patterns import PatternError, compile_glob, compile_regex, fullmatch
from deltaspec.roles.maps import architectures, fused_parts, fused_role, roles_called
from deltaspec.selection.atoms import Atom, Index, ParameterAtom
from deltaspec.selection.clock import ticking

_MOST = 8
_HINT_SECONDS = 0.2


Missing = tuple[str, str, str | None]
"""A finding about an atom, before it has a place: code, message, suggestion."""


def missing(atom: Atom, index: Index, hit: bool) -> Missing | None:
    """Return what is wrong with an atom that matches something (`hit`) or nothing; None where it is fine."""
    if atom.key == "layers":
        return _layers(atom, index, hit)
    if hit:
        return None
    if atom.key == "role":
        return _role(atom.word, index)
    suggestions = {"path": _path_hint, "regex": _regex_hint, "type": _type_hint, "shape": _shape_hint}
    return "DS302", f"no module matches {atom.text}", suggestions[atom.key](atom.word, index)


def parameter_hint(atom: ParameterAtom, index: Index) -> str | None:
    """Suggest another glob for a parameter that is not there."""
    names = [p.fqn for row in index.table.rows for p in row.parameters]
    for glob in (f"**.{atom.word}", f"{atom.word}.**"):
        if found := _count(glob, names):
            return f"did you mean {dumps(glob)} ({counted(found, 'parameter')})?"
    own = dict.fromkeys(name.rpartition(".")[2] for name in names)
    near = closest(atom.word.rpartition(".")[2], own)
    return f"{f'did you mean {near}? ' if near else ''}own names here: {_listed(own)}"


def _path_hint(text: str, index: Index) -> str | None:
    names = [name for row in index.rows for name in (row.fqn, *row.aliases)]
    if text == index.table.model_class or set(text) <= {"*", "."}:
        return "the model itself is no module to select: name one inside it"
    for segment, glob in _out_of_range(text):
        there = {name.rpartition(".")[2] for name in names if fullmatch(compile_glob(glob), name)}
        numbers = sorted(int(own) for own in there if own.isdecimal())
        if numbers and segment not in there:
            return f"there is no {segment} in {glob[: -len('.*')]}: it has {numbers[0]}..{numbers[-1]}"
    own = text.rpartition(".")[2]
    if not _count(f"**.{own}", names) and (hint := _role_called(own, index)):
        return hint
    for glob in _near_globs(text, names):
        if found := _count(glob, names):
            return f"did you mean {dumps(glob)} ({counted(found, 'module')})?"
    parameters = [p.fqn for row in index.table.rows for p in row.parameters]
    if found := _count(text, parameters):
        return f"this names {counted(found, 'parameter')}: write parameter: {dumps(text)}"
    return _inside(text, names)


def _role_called(name: str, index: Index) -> str | None:
    """Suggest the role that modules of this own name have in other architectures, where it is one and is here."""
    meant = {role if role in index.roles else fused_role(role, index.roles) for role in roles_called(name)} - {None}
    plain = sorted(role for role in meant if role is not None and not role.startswith("cross_"))
    if len(plain) != 1:
        return None
    found = counted(sum(plain[0] in row.roles for row in index.rows), "module")
    return f"{name} is another architecture's name: did you mean role: {plain[0]} ({found})?"


def _near_globs(text: str, names: list[str]) -> Iterator[str]:
    """Return globs that the author may have meant, the likeliest first."""
    segments = text.split(".")
    yield from _anchored(text, names)
    vocabulary = {segment for name in names for segment in name.split(".") if not segment.isdigit()}
    corrected = [s if "*" in s or s.isdigit() or s in vocabulary else closest(s, vocabulary) or s for s in segments]
    if corrected != segments:
        yield ".".join(corrected)
        yield from _anchored(".".join(corrected), names)
    if "*" in segments:
        yield ".".join("**" if segment == "*" else segment for segment in segments)
    for cut in range(1, len(segments)):  # a prefix that this class of model does not have
        rest = segments[cut:]
        if all("*" in segment or segment.isdigit() for segment in rest):
            break
        if "*" not in rest[0]:
            yield ".".join(rest)
            yield f"**.{'.'.join(rest)}"


def _anchored(text: str, names: list[str]) -> Iterator[str]:
    """Return the glob behind the one prefix that makes it match, or behind any."""
    if text.startswith("**"):
        return
    anywhere = compile_glob(f"**.{text}")
    first = text.partition(".")[0]
    places = {name.split(f".{first}.")[0] for name in names if "*" not in first and fullmatch(anywhere, name)}
    if len(places) == 1 and not re.search(r"\.\d", whole := places.pop()) and "." in text:
        yield f"{whole}.{text}"
    yield f"**.{text}"


def _out_of_range(text: str) -> Iterator[tuple[str, str]]:
    """Return the numbers in a path, and the glob over all numbers in its place."""
    segments = text.split(".")
    for place, segment in enumerate(segments):
        if segment.isdigit() and place and segments[place - 1] != "**":
            yield segment, ".".join([*segments[:place], "*"])


def _inside(text: str, names: list[str]) -> str | None:
    """List what is there below the longest beginning of a path that matches."""
    segments = text.split(".")
    for end in range(len(segments) - 1, 0, -1):
        head = ".".join(segments[:end])
        if segments[end - 1] == "**" or not _count(head, names):
            continue
        below = compile_glob(f"{head}.*")
        children = dict.fromkeys(name.rpartition(".")[2] for name in names if fullmatch(below, name))
        return f"{head} has {_listed(children)}" if children else f"{head} has nothing inside"
    if segments[0] == "**":
        own = dict.fromkeys(name.rpartition(".")[2] for name in names)
        return f"own names here: {_listed(name for name in own if not name.isdigit())}" if own else "the model is empty"
    top = dict.fromkeys(name.partition(".")[0] for name in names)
    return f"the model has {_listed(top)}" if top else "the model has no modules inside"


def _regex_hint(text: str, index: Index) -> str | None:
    end = process_time() + _HINT_SECONDS
    whole = f"(?:{text})" if "|" in text else text
    for pattern in (f".*{whole}", f"{whole}.*", f".*{whole}.*"):
        try:
            with ticking():
                compiled = compile_regex(pattern, probe=False)
                found = 0
                for row in index.rows:
                    found += fullmatch(compiled, row.fqn)
                    if process_time() > end:
                        return None
        except PatternError:
            return None
        if found:
            return f"a regex must match the whole name: did you mean {dumps(pattern)} ({counted(found, 'module')})?"
    return None


def _type_hint(text: str, index: Index) -> str | None:
    counts: dict[str, int] = {}
    for row in index.rows:
        for base in row.bases:
            counts[base] = counts.get(base, 0) + 1
    bare = text.rpartition(".")[2]
    near = bare if bare in counts else closest(bare, counts)
    if near is not None:
        return f"did you mean {near} ({counted(counts[near], 'module')})?"
    if text in index.table.rows[0].bases:
        return "that is the model itself, which is no module to select: name one inside it"
    common = sorted({row.type for row in index.rows if row.parameters})
    return f"classes with parameters here: {_listed(common)}" if common else None


def _shape_hint(text: str, index: Index) -> str | None:
    widths = sorted({(row.in_features, row.out_features) for row in index.rows if row.in_features is not None})
    pairs = [f"({into}, {out})" for into, out in widths]
    return f"widths here (in, out): {_listed(pairs)}" if pairs else "no module here has widths"


def _role(role: str, index: Index) -> Missing:
    if not index.table.role_maps:
        message = f"the roles of {index.name} are not known, so no module matches role {role}"
        return "DS303", message, f"use path: or type: instead; known are {', '.join(architectures())}"
    if whole := fused_role(role, index.roles):
        message = f"no module has role {role}: {index.name} fuses {fused_parts(whole)} in {whole}"
        return "DS303", message, f"select {whole}{_part_hint(role, whole, index)}"
    known = ", ".join(sorted(index.roles))
    parts = [r for r in index.roles if r.startswith(f"{role}.")]
    hint = f"did you mean {', '.join(sorted(parts))}?" if parts else f"roles here: {known}"
    return "DS303", f"no module of this {index.name} has role {role}", hint


def _part_hint(role: str, whole: str, index: Index) -> str:
    """Return which methods can change one part of a fused projection alone, where its layout is known."""
    part = role.rpartition(".")[2]
    if not any(row.parts and part in row.parts.names for row in index.rows if whole in row.roles):
        return ""
    takers = [name for name, method in builtin_methods().items() if "parts" in method.Params.model_fields]
    return f", with params: {{parts: [{part}]}} to change {part} alone ({', '.join(takers)})"


def _layers(atom: Atom, index: Index, hit: bool) -> Missing | None:
    """Refuse layers that no stack has, also where others of the same atom are there."""
    if not index.stacks:
        return "DS304", f"no module lies in a stack of layers, so none matches {atom.text}", "leave layers out"
    longest = max(index.stacks.values())
    beyond = [number for number in atom.numbers if number >= longest]
    if hit and not beyond:
        return None
    wrong = f"no layer {', '.join(str(number) for number in beyond)}" if beyond else f"no module matches {atom.text}"
    return "DS304", f"{wrong} in this model" if beyond else wrong, fold_stacks(index.stacks)


def fold_stacks(stacks: dict[str, int]) -> str:
    """Return which layers there are: `encoder.layer has layers 0..11`."""
    by_size: dict[int, list[str]] = {}
    for stack, size in stacks.items():
        by_size.setdefault(size, []).append(stack)
    largest = sorted(by_size.items(), reverse=True)
    told = []
    for size, names in largest[:3]:
        told.append(f"{_listed(fold(names), 3)} {'has' if len(names) == 1 else 'have'} layers 0..{size - 1}")
    return "; ".join(told) + (" (and shorter ones)" if len(largest) > 3 else "")


def _count(glob: str, names: Iterable[str]) -> int:
    try:
        compiled = compile_glob(glob)
    except PatternError:
        return 0
    return sum(fullmatch(compiled, name) for name in names)


def _listed(words: Iterable[str], most: int = _MOST) -> str:
    found = list(words)
    if found and all(word.isdigit() for word in found):
        return f"{found[0]}..{found[-1]}"
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
