"""Write docs/architecture.svg and the table of layers in docs/architecture.md; `--check` says whether they are current.

Layers come from pyproject.toml, their lines from the rooms' docstrings. The steps of the picture are listed here; each
must be an import that is in the code, from the module that passes something on to the one that is given it.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "deltaspec"
TEXT = ROOT / "docs/architecture.md"
PICTURE = ROOT / "docs/architecture.svg"
BEGIN, END = "<!-- layers: begin -->\n", "<!-- layers: end -->\n"

STEPS = {
    "compiler.compile": ("", "a model, specs"),
    "planning.resolve": ("compiler.compile", "errors end here"),
    "language.load": ("planning.resolve", "a DeltaSpec"),
    "documents.document": ("language.validate", "read with positions"),
    "backbone.tabulate": ("planning.resolve", "a table of modules"),
    "roles.maps": ("backbone.walk", "attn.q, mlp.up"),
    "planning.sites": ("planning.resolve", "sites of each delta"),
    "selection.select": ("planning.sites", "selectors"),
    "names.patterns": ("selection.atoms", "**.fc2"),
    "methods.matrices": ("planning.sites", "shapes of tensors"),
    "backbone.observe": ("backbone.observations", "a trial run"),
    "compiler.build": ("compiler.compile", "from the Plan"),
    "backbone.clone": ("compiler.build", "same weights, new modules"),
    "deltas.initial": ("compiler.build", "tensors, as they start"),
    "runtime.active": ("compiler.build", "the active set"),
    "runtime.program_builder": ("runtime.active", "its forwards"),
    "graphs.regions": ("runtime.program_builder", "fx graphs"),
}
"""In the order in which they happen: a module, the one that calls it, and what it is asked for."""
WITHIN = {
    "backbone.observations": "planning.sites",
    "backbone.walk": "backbone.tabulate",
    "language.validate": "language.load",
    "selection.atoms": "selection.select",
}
"""A module that passes something on without being a step: the step it belongs to."""
LIMITS = ("Changes", "Imports", "Knows", "Makes", "Prints", "Reads", "Uses", "Wires", "Works")
"""First words of the paragraph of a room's docstring that says what may not stand in it."""

LEFT, STEP, APART, TOP, RIGHT = 186, 46, 128, 76, 130
"""Where the first step stands, from one to the next, the same in one band, the first band, room for the last words."""
HIGH, LOW, GAP = 46, 26, 7
"""A band with steps, one without, and what is between them: lines run there."""
STYLE = """
svg { background: #fff; color-scheme: light dark }
text { font: 13.5px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2933 }
text { stroke-width: 4px; paint-order: stroke }
.title { font-size: 18px; font-weight: 600 } .small { font-size: 12px; fill: #55606e } .idle { fill: #8a94a3 }
.name { font-weight: 600 } .on { stroke: #e6edf7 } .off { stroke: #f3f5f8 }
rect.on { fill: #e6edf7 } rect.off { fill: #f3f5f8 }
rect { stroke: none !important } .dot { fill: #2f63a8 } .call { stroke: #7a9cc9; stroke-width: 1.8; fill: none }
.count { font-size: 10.5px; fill: #fff; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117 } text { fill: #e6edf3 } .small { fill: #a3afbc } .idle { fill: #6b7684 }
  .on { stroke: #1b2738 } .off { stroke: #141a22 } rect.on { fill: #1b2738 } rect.off { fill: #141a22 }
  .count { fill: #0d1117 } .call { stroke: #4d78b0 } .dot { fill: #84b4f3 }
}
"""


def layers() -> list[list[str]]:
    """Return the rooms of each layer, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (found,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [layer.split(" | ") for layer in found]


def docstring(room: str) -> list[str]:
    """Return the paragraphs of a room's docstring, each in one line."""
    path = PACKAGE / room / "__init__.py"
    tree = ast.parse((path if path.exists() else PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
    return [" ".join(paragraph.split()) for paragraph in (ast.get_docstring(tree) or "").split("\n\n")]


def table() -> str:
    """Return the layers as a Markdown table: a line each, what is in it and what not."""
    lines = ["| layer, from the top | what is in it | its limits |", "|---|---|---|"]
    for rooms in layers():
        for room in rooms:
            first, *rest = docstring(room)
            limits = next((text for text in rest if text.split()[0] in LIMITS), "")
            lines.append(f"| `{room}` | {first} | {limits} |")
    return "\n".join(lines) + "\n"


def imported(module: str) -> set[str]:
    """Return the modules of the package that a module imports, at its top or inside a function."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltaspec."):
            inner = str(node.module).removeprefix("deltaspec.")
            found |= {inner, *(f"{inner}.{alias.name}" for alias in node.names)}
    return found


def refuse_untrue() -> None:
    """Raise ValueError for a step that is no import, or that goes up."""
    depth = {room: number for number, rooms in enumerate(layers()) for room in rooms}
    calls = [
        *((caller, module) for module, (caller, _) in STEPS.items() if caller),
        *((b, a) for a, b in WITHIN.items()),
    ]
    for caller, module in calls:
        if module not in imported(caller):
            raise ValueError(f"docs/draw_architecture.py: {caller} does not import {module}; mend STEPS")
        if depth[caller.partition(".")[0]] > depth[module.partition(".")[0]]:
            raise ValueError(f"docs/draw_architecture.py: {caller} stands below {module}; mend STEPS")


def picture() -> str:
    """Return the way of a spec as SVG: a band for each layer, a dot for each step, a line for each call."""
    refuse_untrue()
    used = {module.partition(".")[0] for module in STEPS}
    bands, row, y = [], {}, TOP
    for rooms in layers():
        height = HIGH if used & set(rooms) else LOW
        names = " · ".join(room if room in used else f'<tspan class="idle">{room}</tspan>' for room in rooms)
        kind = "on" if height == HIGH else "off"
        bands.append(f'<rect class="{kind}" x="8" y="{y}" width="WIDTH" height="{height}" rx="6"/>')
        bands.append(f'<text class="{kind}" x="20" y="{y + height // 2 + 5}">{names}</text>')
        row |= dict.fromkeys(rooms, (y, y + height // 2, y + height))
        y += height + GAP
    place: dict[str, tuple[int, int, int]] = {}
    x, last = LEFT, None
    for module in STEPS:
        number, middle, bottom = row[module.partition(".")[0]]
        x += 0 if last is None else APART if last == number else STEP
        place[module], last = (x, middle, bottom), number
    lines, dots = [], []
    for module, (caller, _) in STEPS.items():
        if caller:
            (x0, y0, bottom), (x1, y1, _) = place[WITHIN.get(caller, caller)], place[module]
            lane = bottom + GAP // 2
            lines.append(f'<path class="call" d="M{x0} {y0} V{lane} H{x1} V{y1}"/>')
    for count, (module, (_, words)) in enumerate(STEPS.items(), start=1):
        x, y0, _ = place[module]
        dots += [
            f'<circle class="dot" cx="{x}" cy="{y0}" r="10"/>',
            f'<text class="count" x="{x}" y="{y0 + 4}" text-anchor="middle">{count}</text>',
            f'<text class="name on" x="{x + 15}" y="{y0 - 3}">{module.partition(".")[2]}</text>',
            f'<text class="small on" x="{x + 15}" y="{y0 + 13}">{words}</text>',
        ]
    width, height = x + RIGHT, y + 26
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="The way of a spec through the layers of deltaspec">'
    )
    return "\n".join(
        [
            head,
            f"<style>{STYLE}</style>",
            '<text class="title" x="16" y="31">The way of a spec through the layers</text>',
            '<text class="small" x="16" y="55">deltaspec.compile(model, spec), step by step. '
            "A line is a call. Calls only go down; results come up by return.</text>",
            *(band.replace("WIDTH", str(width - 16)) for band in bands),
            *lines,
            *dots,
            f'<text class="small" x="16" y="{y + 14}">Drawn by docs/draw_architecture.py from the code.</text>',
            "</svg>\n",
        ]
    )


def main(arguments: list[str]) -> int:
    """Write both files, or say which of them is not current."""
    text = TEXT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    wanted = {TEXT: before + BEGIN + table() + END + rest.partition(END)[2], PICTURE: picture()}
    stale = [path for path, new in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != new]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says: make generate writes it anew")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
