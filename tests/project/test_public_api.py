"""The public signatures are what tests/project/api/deltaspec.json says; a change of one is seen, and named."""

import json

import griffe
import public_api
import pytest

import deltaspec


def test_public_signatures_are_those_written_down():
    golden = json.loads(public_api.GOLDEN.read_text(encoding="utf-8"))
    moved = public_api.differences(golden, public_api.signatures())
    assert not moved, "\n".join(["the public API moved:", *moved, public_api.HOW_TO_ACCEPT])


def test_every_public_name_is_written_down():
    assert set(public_api.FACES["deltaspec"]) == set(deltaspec.__all__)


BEFORE = "def f(a: int, b: str = 'x', *more: int, c: bool = False) -> float: ..."


@pytest.mark.parametrize(
    "after",
    [
        "def f(z: int, b: str = 'x', *more: int, c: bool = False) -> float: ...",
        "def f(b: str = 'x', a: int = 0, *more: int, c: bool = False) -> float: ...",
        "def f(a: int, b: str = 'y', *more: int, c: bool = False) -> float: ...",
        "def f(a: int, b: str, *more: int, c: bool = False) -> float: ...",
        "def f(a: int, b: str = 'x', c: bool = False, *more: int) -> float: ...",
        "def f(a: int, /, b: str = 'x', *more: int, c: bool = False) -> float: ...",
        "def f(a: int, b: str = 'x', *, c: bool = False) -> float: ...",
        "def f(a: int, b: str = 'x', *more: int, c: bool = False, **rest: int) -> float: ...",
        "def f(a: float, b: str = 'x', *more: int, c: bool = False) -> float: ...",
        "def f(a: int, b: str = 'x', *more: int, c: bool = False) -> int: ...",
    ],
    ids=["name", "order", "default", "no-default", "positional", "positional-only", "star", "rest", "type", "returns"],
)  # fmt: skip
def test_a_changed_signature_is_seen_and_named(tmp_path, after):
    def read(code):
        function = griffe.visit("m", filepath=tmp_path / "m.py", code=code)["f"]
        return {"m.f": public_api.signature(function)}

    assert public_api.differences(read(BEFORE), read("# moved\n\n" + BEFORE.replace("...", "'''Say it.'''"))) == []
    (line,) = public_api.differences(read(BEFORE), read(after))
    assert line.startswith("changed: m.f\n  from (a: int, b: str = 'x', *more: int, c: bool = False) -> float\n")
    assert public_api.differences(read(BEFORE), {})[0].startswith("removed: m.f(a: int")
    assert public_api.differences({}, read(BEFORE))[0].startswith("added: m.f(a: int")
