"""The results on disk: what a run measured takes the place of what it measured before, and leaves the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import Item, Row, Table

Data = dict[str, Any]
"""`{"runs": {when: machine}, "groups": {name: {"failed", "seconds", "rows", "tables", "series"}}}`.

Each row, table and curve names the run that measured it.
"""
_KEYS = {"rows": ("what",), "tables": ("title",), "series": ("plot", "name")}


def read(path: Path) -> Data:
    """Read results, none if there are none yet, or only in an older form."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return data if "groups" in data else {"runs": {}, "groups": {}}


def write(folder: Path, data: Data, titles: Mapping[str, str], plots: Iterable[str]) -> None:
    """Write `results.json` and `RESULTS.md`."""
    (folder / "results.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "RESULTS.md").write_text(render(data, titles, plots), encoding="utf-8")


def merged(
    data: Data,
    run: str,
    machine: Mapping[str, str],
    group: str,
    items: Iterable[Item],
    seconds: float = 0,
    failed: str = "",
) -> Data:
    """Return the results with one group measured anew; what a failed one did not come to stays from the run before.

    Runs of which nothing is left are forgotten.
    """
    found: Data = {"failed": failed, "seconds": round(seconds), "rows": [], "tables": [], "series": []}
    for item in items:
        kind = "rows" if isinstance(item, Row) else "tables" if isinstance(item, Table) else "series"
        found[kind].append({**json.loads(json.dumps(asdict(item))), "run": run})
    if failed:
        before = data["groups"].get(group, {})
        for kind, names in _KEYS.items():
            known = {tuple(item[name] for name in names) for item in found[kind]}
            left = [item for item in before.get(kind, ()) if tuple(item[name] for name in names) not in known]
            found[kind] = found[kind] + left
    groups = {**data["groups"], group: found}
    used = {item["run"] for each in groups.values() for kind in _KEYS for item in each[kind]}
    runs = {when: about for when, about in {**data["runs"], run: dict(machine)}.items() if when in used or when == run}
    return {"runs": runs, "groups": groups}


def render(data: Data, titles: Mapping[str, str], plots: Iterable[str] = ()) -> str:
    """Write all results as Markdown: groups in the order of their titles, those without a title left out."""
    known = {name: data["groups"][name] for name in titles if name in data["groups"]}
    parts = [
        "# Results",
        "Written by `make bench`. What a row compares took turns in one process, at least 20 times each after a "
        "warm-up; ratios are medians over the pairs, with quartiles. A target that is not met is marked **no**, and "
        "its note says what explains it. `make bench ARGS='GROUP …'` measures some groups anew; the rows of the others "
        "stay.",
        _targets(known),
    ]
    parts += [f"![{name}](plots/{name}.svg)" for name in plots]
    for name, group in known.items():
        parts += _group(name, titles[name], group, data["runs"])
    missing = [name for name in titles if name not in known]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _targets(groups: Mapping[str, Data]) -> str:
    judged = [row for group in groups.values() for row in group["rows"] if row["met"] in ("yes", "no")]
    missed = [row for row in judged if row["met"] == "no"]
    text = f"{len(judged) - len(missed)} of {len(judged)} targets are met."
    if missed:
        text += " Missed:\n\n" + "\n".join(f"- {row['what']}: {row['ratio']}, target {row['target']}" for row in missed)
    return text


def _group(name: str, title: str, group: Data, runs: Mapping[str, Mapping[str, str]]) -> list[str]:
    rows, tables = group["rows"], group["tables"]
    used = list(dict.fromkeys(item["run"] for kind in _KEYS for item in group[kind]))
    parts = [f"## {title}"]
    if group["failed"]:
        parts.append(f"**The last run of this group failed** ({group['failed']}); rows it did not come to are older.")
    for run in used:
        about = ", ".join(f"{key} {value}" for key, value in runs[run].items())
        parts.append(f"`python -m benchmarks {name}`, {run}{_only(rows, run, used)}: {about}.")
    if rows:
        parts.append(_markdown(_HEAD, [_cells(row) for row in rows]))
        if notes := [f"- **{row['what']}**: {row['note']}" for row in rows if row["note"]]:
            parts.append("\n".join(notes))
    for table in tables:
        parts += [f"**{table['title']}**", _markdown(table["head"], table["lines"])]
        parts += [table["note"]] if table["note"] else []
    return parts


_HEAD = ("what", "deltaspec", "PEFT", "ratio: median (quartiles)", "target", "met")


def _cells(row: Data) -> tuple[str, ...]:
    met = "**no**" if row["met"] == "no" else row["met"]
    return row["what"], row["ours"], row["peer"], row["ratio"], row["target"], met


def _only(rows: Iterable[Data], run: str, used: list[str]) -> str:
    """Name the rows of an older run, where there are several runs."""
    if len(used) == 1 or run == used[0]:
        return ""
    return f" (only: {'; '.join(row['what'] for row in rows if row['run'] == run)})"


def _markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    text = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *lines)]
    return "\n".join(text)
