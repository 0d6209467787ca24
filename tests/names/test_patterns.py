"""Globs against a slow and plain matcher; regular expressions that take too long."""

import re
import time
from contextlib import suppress
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole import examples

from deltaspec.names.patterns import BacktrackingError, PatternError, compile_glob, compile_regex, fullmatch, matched


def plainly(glob: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Match a glob by its definition."""

    @cache
    def characters(pattern: str, text: str) -> bool:
        if not pattern:
            return not text
        if pattern[0] == "*":
            return characters(pattern[1:], text) or (bool(text) and characters(pattern, text[1:]))
        return bool(text) and pattern[0] == text[0] and characters(pattern[1:], text[1:])

    @cache
    def segments(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
        if not left:
            return not right
        if left[0] == "**":
            return segments(left[1:], right) or (bool(right) and segments(left, right[1:]))
        return bool(right) and characters(left[0], right[0]) and segments(left[1:], right[1:])

    return segments(glob, name)


pieces = st.sampled_from(["**", "*", "a", "b", "ab", "a*", "*a", "*a*b", "a*b*a", "*b*"])


@given(
    st.lists(pieces, min_size=1, max_size=6).map(tuple),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=6).map(tuple),
)
@examples(1500)
def test_globs_match_by_their_definition(glob, name):
    assert fullmatch(compile_glob(".".join(glob)), ".".join(name)) == plainly(glob, name)


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("**.fc2", ["fc2", "a.fc2", "a.b.fc2"], ["", "fc22", "xfc2", "a.fc2.b"]),
        ("model.*.q", ["model.0.q"], ["model.q", "model.0.1.q"]),
        ("model.**", ["model", "model.a.b"], ["", "models"]),
        ("**", ["", "a", "a.b"], []),
        ("*", ["a"], ["", "a.b"]),
        ("head-1", ["head-1"], ["head+1"]),
    ],
)
def test_globs(glob, yes, no):
    compiled = compile_glob(glob)
    assert [fullmatch(compiled, name) for name in [*yes, *no]] == [True] * len(yes) + [False] * len(no)


def test_globs_take_linear_time():
    start = time.process_time()
    for text in (".".join(["**", "a"] * 90) + ".**.x", "**." * 100 + "x", "*a" * 200 + "x"):
        assert not fullmatch(compile_glob(text), ".".join("a" * 300))
        assert not fullmatch(compile_glob(text), "a" * 2000)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "text", ["", "a..b", ".a", "a.", "**a", "a.b**", "a?", "[ab]", "{a,b}", "a b", "^a$", "a" * 501]
)
def test_malformed_globs(text):
    with pytest.raises(PatternError):
        compile_glob(text)


@pytest.mark.parametrize(
    "text",
    [
        r"(?:\w+\.)+layers\.\d+\.(q|v)_proj", r".*\.layer\.[0-9]+\..*", r"(?:[a-z]+\.)*q_proj", r"(?!.*bias).*",
        r"model\.layers\.([0-9]|1[0-9])\..*", r"(?:encoder|decoder)\.(?:.*\.)?fc[12]", r"(.+\.)?q",
        r"[^.]+\.(query|value)", r"(?i)Attention", r"a{1,20}", r"(?:layers\.\d+\.)+q", r"\p{L}+",
    ],
)  # fmt: skip
def test_ordinary_regular_expressions_are_taken(text):
    assert compile_regex(text).kind == "regex"


def test_a_regex_must_match_the_whole_name():
    compiled = compile_regex(r"layer\.\d")
    assert fullmatch(compiled, "layer.3")
    assert not fullmatch(compiled, "layer.33")
    assert not fullmatch(compiled, "a.layer.3")


@pytest.mark.parametrize(
    "text",
    ["(a+)+$", r"(\w+\.?)+!", "(a|aa)+$", "(x+x+)+y", "([a-z]+)*q", r"^(\w+\s?)*$", r"(.*\.)*x", "(a*)*b", "(?R)"],
)
def test_backtracking_is_found_when_compiling(text):
    start = time.process_time()
    with pytest.raises(BacktrackingError):
        compile_regex(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("text", ["((a{1000}){1000}){1000}", "a{100000000}", "a{9999999999999}", "(", "[", "*a", ""])
def test_malformed_regular_expressions(text):
    start = time.process_time()
    with pytest.raises(PatternError):
        compile_regex(text)
    assert time.process_time() - start < 1


def test_matching_stops_in_time():
    compiled = compile_regex("(?:k|kk)+j", probe=False)
    start = time.process_time()
    with suppress(BacktrackingError):
        assert not fullmatch(compiled, "k" * 200)
    assert time.process_time() - start < 1


@given(st.text("ab.()[]{}*+?|^$\\d\\w1,<>!=:", max_size=30))
@examples(300)
def test_any_text_is_a_pattern_or_a_pattern_error(text):
    for compiler in (compile_glob, compile_regex):
        try:
            assert isinstance(fullmatch(compiler(text), "a.b1.ab"), bool)
        except PatternError as error:
            assert str(error)


def test_expressions_of_other_libraries_match_as_re_does_and_stop_in_time():
    for how, text, name in [("match", r"(.*\.)?(q|v)$", "a.v"), ("fullmatch", "a.*", "b.a"), ("search", "b$", "a.b")]:
        ours, theirs = matched(how, text, name), getattr(re, how)(text, name)
        assert (ours and ours.span()) == (theirs and theirs.span())
    start = time.process_time()
    with pytest.raises(BacktrackingError):
        matched("match", "(?:k|kk)+j", "k" * 200)
    assert time.process_time() - start < 1
    with pytest.raises(PatternError, match="no regular expression"):
        matched("match", "(", "a")
