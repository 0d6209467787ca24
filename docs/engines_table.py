"""Write the table of docs/engines.md from the rules of the engines; `--check` says whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from deltaspec.engines.rules import Rules, names, rules_of
from deltaspec.engines.vocabulary import FACTS

TEXT = Path(__file__).with_name("engines.md")
BEGIN, END = "<!-- engines: begin -->\n", "<!-- engines: end -->\n"


def table() -> str:
    """Return what each engine does about each fact, as Markdown."""
    engines = [rules_of(name) for name in names()]
    lines = [f"| | {' | '.join(engine.title for engine in engines)} |", f"|---{'|:-:' * len(engines)}|"]
    lines.append(f"| versions | {' | '.join(engine.versions for engine in engines)} |")
    lines += [
        f"| {known.what} | {' | '.join(cell(engine, fact) for engine in engines)} |" for fact, known in FACTS.items()
    ]
    return "\n".join(lines) + "\n"


def cell(engine: Rules, fact: str) -> str:
    """Return the letters of what an engine does about a fact."""
    if fact == "rank":
        limit = engine.rank
        if limit.default is None and limit.greatest is None:
            return "·"
        return " / ".join(str(number) for number in (limit.default, limit.greatest) if number is not None)
    letters = {}
    for rule in engine.rules:
        if rule.fact == fact:
            letter = rule.outcome[0]
            letters[letter if rule.only or rule.beside else letter.upper()] = None
    return " ".join(letters) or "·"


def main(arguments: list[str]) -> int:
    """Write the table, or say that it is not current."""
    text = TEXT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    new = before + BEGIN + table() + END + rest.partition(END)[2]
    if "--check" in arguments and new != text:
        print("docs/engines.md is not what the rules say: make generate writes it anew")
        return 1
    TEXT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
