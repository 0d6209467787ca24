"""YAML, from the parser's events: the 1.2 core schema, and nothing of the rest (anchors, tags, merge keys …)."""

from __future__ import annotations

import re
from typing import Any

import yaml

from deltaspec.documents.builder import Builder, number
from deltaspec.documents.malformed import explain
from deltaspec.documents.slips import conflict, in_plain, split

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
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
    lines = split(text)
    if (slip := conflict(lines, within=False)) is not None:
        builder.stop("DS116", slip.message, slip.line + 1, slip.column + 1, slip.suggestion)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            _take(event, builder)
    except yaml.YAMLError as error:
        builder.stop_at("DS105")  # what was found already is the cause
        explain(error, lines, builder)


def _take(event: Any, builder: Builder) -> None:
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


def _scalar(event: Any, builder: Builder, line: int, column: int) -> None:
    text = event.value
    if event.style not in (None, "") or event.tag:
        builder.value(text, line, column)
    elif text == "<<" and builder.awaits_key:
        builder.refuse("DS108", "merge keys (<<) are not allowed", line, column, _NONE_OF_THIS)
        builder.value(text, line, column)
    else:
        if (slip := in_plain(text, builder.awaits_key)) is not None:
            first = (
                event.start_mark.line == event.end_mark.line or " " not in text[: slip[0]]
            )  # it is in its first line
            offset = slip[0] if first else 0
            builder.refuse("DS105", slip[1], line, column + offset, slip[2])
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
