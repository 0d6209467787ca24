"""YAML, from the parser's events: the 1.2 core schema, and nothing of the rest (anchors, tags, merge keys …)."""

from __future__ import annotations

import re
from typing import Any

import yaml

from deltaspec.documents.builder import Builder, number

_INT = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NONE_OF_THIS = "write the value out where it is needed; `selectors:` and `ref:` share selectors"


def feed(text: str, builder: Builder) -> None:
    """Parse YAML into the builder. Raises DeltaSpecError at the first malformed place."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for event in yaml.parse(text, Loader=loader):
            _take(event, text, builder)
    except yaml.YAMLError as error:
        _malformed(error, text, builder)


def _take(event: Any, text: str, builder: Builder) -> None:
    line, column = event.start_mark.line + 1, event.start_mark.column + 1
    if isinstance(event, yaml.DocumentStartEvent):
        if event.version or event.tags:
            builder.refuse("DS108", "directives (%YAML, %TAG) are not allowed", line, column, "delete the line")
        if not builder.at_start:
            builder.stop("DS109", "a second document starts here", line, column, "put each spec into its own file")
        return
    if isinstance(event, yaml.AliasEvent):
        name = str(event.anchor)[:40]
        hint = f'quote it, if it is a glob: "*{name}"; else {_NONE_OF_THIS}'
        builder.refuse("DS108", f"the alias *{name} is not allowed", line, column, hint)
        builder.value("", line, column)
        return
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
        if event.anchor:
            builder.refuse("DS108", f"the anchor &{event.anchor[:40]} is not allowed", line, column, _NONE_OF_THIS)
        if event.tag:
            builder.refuse("DS108", f"the tag {event.tag[:60]} is not allowed", line, column, "delete it")
    if isinstance(event, yaml.ScalarEvent):
        _scalar(event, builder, line, column)
    elif isinstance(event, yaml.MappingStartEvent):
        builder.begin({}, line, column)
    elif isinstance(event, yaml.SequenceStartEvent):
        builder.begin([], line, column)
    elif isinstance(event, yaml.CollectionEndEvent):
        builder.end()


def _scalar(event: yaml.ScalarEvent, builder: Builder, line: int, column: int) -> None:
    text = event.value
    if event.style not in (None, "") or event.tag:
        builder.value(text, line, column)
    elif text == "<<" and builder.awaits_key:
        builder.refuse("DS108", "merge keys (<<) are not allowed", line, column, _NONE_OF_THIS)
        builder.value(text, line, column)
    else:
        builder.value(_resolve(text, builder, line, column), line, column)


def _resolve(text: str, builder: Builder, line: int, column: int) -> Any:
    """Return what a plain scalar stands for, by the YAML 1.2 core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) or _FLOAT.fullmatch(text):
        return number(text, builder, line, column)
    if _OTHER_BASE.fullmatch(text):
        if len(text) > 18:
            builder.refuse("DS111", f"{text[:40]} does not fit into 64 bits", line, column)
            return 0
        return int(text, 0)
    if _NOT_FINITE.fullmatch(text):
        builder.refuse("DS111", f"{text} is not a finite number", line, column)
        return 0
    return text


def _malformed(error: yaml.YAMLError, text: str, builder: Builder) -> None:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or "malformed"
    context = getattr(error, "context", None) or ""
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    lines = text.splitlines()
    current = lines[line] if line < len(lines) else ""
    code, message = "DS105", f"malformed YAML: {problem}" + (f" ({context})" if context else "")
    hint = None
    here = current[column : column + 1]
    indent = current[: len(current) - len(current.lstrip())]
    if "alias" in context or "anchor" in context:
        message = "a plain value cannot start with " + ("*" if "alias" in context else "&")
        hint = f"quote it: {_quoted(current, column)}"
    elif "\t" in indent or here == "\t":
        message, hint = "a tab cannot indent YAML", "indent with spaces"
    elif "cannot start any token" in problem:
        message = f"a plain value cannot start with {here}"
        hint = f"quote it: {_quoted(current, column)}"
    elif "mapping values are not allowed" in problem:
        hint = "a value that holds ': ' must be quoted; keys of one mapping start in the same column"
    elif "unknown escape" in problem:
        hint = "in double quotes a backslash begins an escape: use single quotes ('\\.'), or double it"
    elif "duplicate" in problem and "directive" in problem:
        code = "DS108"
    elif "expected ',' or" in problem or "block end" in problem or "expected key" in problem:
        hint = "check the indentation and the brackets; quote values that hold any of [ ] { } , # or start with * or !"
    builder.stop(code, message, line + 1, column + 1, hint)


def _quoted(line: str, column: int) -> str:
    """Return the plain value around a column in quotes."""
    start = max(line.rfind(opening, 0, column + 1) for opening in (" ", "[", "{", ",", "\t")) + 1
    rest = line[start:]
    for closing in (" #", ", ", "}", "]", ","):
        rest = rest.split(closing)[0]
    return f'"{rest.strip()[:60]}"'
