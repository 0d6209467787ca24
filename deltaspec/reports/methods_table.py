"""The table of methods, made from what each method says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from deltaspec.backbone.table import ConvInfo, ParameterInfo, Row
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import Site

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
"""Marks around the table in a Markdown file."""
_NAMES = {
    "linear": "Linear",
    "conv1d": "Conv1D",
    "embedding": "Embedding",
    "conv": "Conv",
    "norm": "norms",
    "other": "blocks",
}
_WIDTH = 768
_COLUMNS = ("method", "what it learns", "at start", "merges", "rows mix", "strength", "modules", "paper")
_HEAD = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|\n"


def methods_table(methods: Mapping[str, Method]) -> str:
    """Write one line a method as Markdown."""
    return _HEAD + "".join(f"| {' | '.join(_cells(method))} |\n" for method in methods.values())


def with_table(text: str, methods: Mapping[str, Method]) -> str:
    """Put the table between the marks of a Markdown text. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there are no marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{methods_table(methods)}{END}{after}"


def _cells(method: Method) -> Iterator[str]:
    yield f"`{method.name}`"
    yield method.summary
    yield "identity" if method.promises.identity_at_start else "changed"
    yield {"add": "yes", "replace": "yes, replaces", None: "no"}[method.promises.weight]
    yield "yes" if method.promises.per_row else "no"
    yield method.strength or "all or nothing"
    yield ", ".join(accepted(method)) or "-"
    yield method.paper


def accepted(method: Method) -> list[str]:
    """Name the kinds of module that a method takes with its default parameters, found by asking it about each."""
    if method.attends:
        return ["attention"]
    params = method.Params.model_validate_json(json.dumps(method.example))
    if method.virtual_tokens(params):
        return ["token embedding"]
    sites = {kind: Site(_sample(kind), in_width=_WIDTH, width=_WIDTH) for kind in _NAMES}
    return [_NAMES[kind] for kind, site in sites.items() if method.refuse(site, params) is None]


def _sample(kind: str) -> Row:
    """Make a plain module of a kind, as a row of a table."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "linear": {"weight": (_WIDTH, _WIDTH), "bias": (_WIDTH,)},
        "conv1d": {"weight": (_WIDTH, _WIDTH), "bias": (_WIDTH,)},
        "embedding": {"weight": (_WIDTH, _WIDTH)},
        "conv": {"weight": (_WIDTH, _WIDTH, 3, 3), "bias": (_WIDTH,)},
        "norm": {"weight": (_WIDTH,), "bias": (_WIDTH,)},
        "other": {},
    }
    own = tuple(ParameterInfo(name, f"m.{name}", shape, "float32") for name, shape in shapes[kind].items())
    sized = kind in ("linear", "conv1d", "embedding", "conv")
    return Row(
        fqn="m",
        type=_NAMES[kind],
        bases=(_NAMES[kind],),
        kind=kind,
        roles=(),
        stack=None,
        layer=None,
        parameters=own,
        buffers=(),
        subtree_parameters=sum(p.count for p in own),
        children=0 if own else 1,
        in_features=_WIDTH if sized else None,
        out_features=_WIDTH if sized else None,
        conv=ConvInfo(1, False) if kind == "conv" else None,
    )
