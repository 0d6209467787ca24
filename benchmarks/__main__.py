"""Run benchmarks and write what they found beside this file: `python -m benchmarks [--trial FOLDER] [GROUP …]`.

`RESULTS.md` and `results.json` keep the rows of groups that are not run. A group that fails is reported at the end, and
the others go on; the exit status is then 1. `plots` alone draws the plots anew. A trial has 3 pairs and few deltas, and
writes into a folder of its own.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.groups import GROUPS, Group
from benchmarks.harness import LIMITS, Item, Row, machine
from benchmarks.results import merged, read, write

PLOTS = "plots"


def main(arguments: list[str], known: Mapping[str, Group] = GROUPS) -> int:
    """Run the named groups, or all; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [*known, PLOTS]
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"any of: {', '.join(names)}")
    parser.add_argument("--trial", type=Path, metavar="FOLDER", help="3 pairs at most, written to this folder")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.groups if name not in names]:
        parser.error(f"no group is named {', '.join(unknown)}; there are: {', '.join(names)}")
    folder = Path(__file__).parent
    if options.trial is not None:
        folder, LIMITS.pairs, LIMITS.loaded = options.trial, 3, 10
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return run(options.groups or names, known, folder)


def run(names: list[str], known: Mapping[str, Group], folder: Path) -> int:
    """Run groups, writing what there is after each; give the exit status."""
    when, about, failed = f"{datetime.now():%Y-%m-%d %H:%M}", machine(), list[str]()
    titles = {name: group.title for name, group in known.items()}
    data = read(folder / "results.json")
    start = time.perf_counter()
    for name in names:
        if name == PLOTS:
            continue
        items, begun = list[Item](), time.perf_counter()
        _say(f"-- {name} (after {begun - start:.0f} s)")
        error = _collect(known[name], items)
        if error:
            failed.append(f"{name}: {error}")
        data = merged(data, when, about, name, items, time.perf_counter() - begun, error)
        write(folder, data, titles, _drawn(folder))
        gc.collect()
    try:
        from benchmarks.plots import draw

        draw(data, folder / PLOTS)
        write(folder, data, titles, _drawn(folder))
    except Exception as error:  # whatever it is, it is reported, and does not cost the measurements
        traceback.print_exc()
        failed.append(f"{PLOTS}: {type(error).__name__}: {error}")
    _say(f"-- {folder / 'RESULTS.md'} written after {time.perf_counter() - start:.0f} s")
    for line in failed:
        _say(f"failed: {line}")
    return 1 if failed else 0


def _collect(group: Group, items: list[Item]) -> str:
    """Append what a group finds, as it does; give what went wrong, empty for nothing."""
    try:
        for item in group.load()():
            items.append(item)
            if isinstance(item, Row):
                _say(f"   {item.what}: {item.ours} | {item.peer} | {item.ratio} | {item.target} {item.met}")
    except Exception as error:  # whatever it is, it is reported, and does not cost the other groups
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _drawn(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / PLOTS).glob("*.svg"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
