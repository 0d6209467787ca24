"""Run the checks: `python -m checks.cuda [--device cpu] [--only TEXT] [--write FILE]`.

Without a CUDA device the reason is printed and nothing is run; the exit status is then 0. It is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from checks.cuda import exactness, packed, training
from checks.cuda.base import Check, Skipped

MOST_SECONDS = 480
"""Seconds after which no check is begun any more: those that are left fail, so that the table is no false comfort."""
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
Line = tuple[str, str, str, float, str]
"""Group, name, verdict, seconds, and what was seen."""


def main(arguments: Sequence[str]) -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m checks.cuda", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the checks themselves")
    parser.add_argument("--only", default="", metavar="TEXT", help="those checks whose group or name has this text")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this text, between its marks")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and (reason := lacking()):
        print(f"check-cuda: skipped: {reason}")
        return 0
    chosen = [c for c in known() if options.only in f"{c.group} {c.name}"]
    if not chosen:
        parser.error(f"no check has {options.only!r} in its group or name; there are: {', '.join(groups())}")
    lines, start = list[Line](), time.perf_counter()
    for check in chosen:
        lines.append(_run(check, device, time.perf_counter() - start))
    seconds = time.perf_counter() - start
    _print(lines, f"{machine(device)}, {seconds:.0f} s")
    if options.write is not None:
        write(options.write, lines, f"{machine(device)}, {seconds:.0f} s")
    return int(any(verdict == "fails" for _, _, verdict, _, _ in lines))


def known() -> list[Check]:
    """Return all checks."""
    return [*exactness.checks(), *training.checks(), *packed.checks()]


def groups() -> list[str]:
    """Return the names of the groups."""
    return list(dict.fromkeys(check.group for check in known()))


def lacking() -> str | None:
    """Return why there is no CUDA device to run on; None where there is one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA (docs/cuda.md says how to make .venv-cuda)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (nvidia-smi says what the driver sees)"
    return None


def machine(device: torch.device) -> str:
    """Name what the checks ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {libraries}, Python {platform.python_version()}"


def _run(check: Check, device: torch.device, elapsed: float) -> Line:
    begun = time.perf_counter()
    if elapsed > MOST_SECONDS:
        return check.group, check.name, "fails", 0.0, f"not begun: {MOST_SECONDS} s were over"
    try:
        seen, verdict = check.run(device), "holds"
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Skipped as reason:
        seen, verdict = str(reason), "skipped"
    except Exception as error:  # whatever a check runs into is its outcome; the others go on
        traceback.print_exc()
        seen, verdict = " ".join(f"{type(error).__name__}: {error}".split())[:200], "fails"
    return check.group, check.name, verdict, time.perf_counter() - begun, seen


def _print(lines: Sequence[Line], about: str) -> None:
    table = Table(title=f"check-cuda: {about}")
    for column in ("group", "check", "", "seconds", "seen"):
        table.add_column(column, overflow="fold")
    colours = {"holds": "green", "fails": "bold red", "skipped": "yellow"}
    for group, name, verdict, seconds, seen in lines:
        table.add_row(group, name, f"[{colours[verdict]}]{verdict}[/]", f"{seconds:.1f}", seen)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write(path: Path, lines: Sequence[Line], about: str) -> None:
    """Put the table into a text, between its marks. Raises ValueError where it has none."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the lines {BEGIN.strip()} and {END.strip()}")
    rows = (f"| {g} | {n} | {v} | {s:.1f} | {seen.replace('|', chr(92) + '|')} |" for g, n, v, s, seen in lines)
    head = f"{about}\n\n| group | check | | seconds | seen |\n|---|---|---|---:|---|\n"
    path.write_text(before + begin + head + "\n".join(rows) + "\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
