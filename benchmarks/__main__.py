"""Run the benchmarks and write `RESULTS.md` and `results.json` beside this file: `python -m benchmarks [GROUP …]`."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import torch

from benchmarks.harness import Row, as_data, machine, table
from benchmarks.many import GROUPS as MANY
from benchmarks.rows import GROUPS as ROWS

GROUPS = ROWS | MANY


def main(groups: list[str]) -> None:
    """Measure the named groups, or all; write the files only when all were measured."""
    torch.set_num_threads(1)
    if unknown := [name for name in groups if name not in GROUPS]:
        sys.exit(f"no group is named {', '.join(unknown)}; there are: {', '.join(GROUPS)}")
    rows: list[Row] = []
    for name in groups or GROUPS:
        print(f"-- {name}", file=sys.stderr, flush=True)
        for row in GROUPS[name]():
            rows.append(row)
            print(
                f"   {row.what}: {row.ours} | {row.peer} | {row.ratio} | {row.target} {row.met}",
                file=sys.stderr,
                flush=True,
            )
    about = machine()
    text = table(rows)
    print(text)
    if groups:
        return
    here = Path(__file__).parent
    head = (
        f"# Results\n\nWritten by `make bench` on {date.today()}: {', '.join(f'{k} {v}' for k, v in about.items())}.\n"
    )
    how = (
        "Each row is measured in one process, ours and the peer in turn, at least 20 pairs after a warm-up; ratios are "
        "medians over the pairs. A target that is not met is marked `no`.\n"
    )
    (here / "RESULTS.md").write_text(f"{head}\n{how}\n{text}", encoding="utf-8")
    data = {"machine": about, "date": str(date.today()), "rows": as_data(rows)}
    (here / "results.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
