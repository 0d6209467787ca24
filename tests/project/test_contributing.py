"""What CONTRIBUTING says that a new method touches is what the newest one did."""

import re
from pathlib import Path

from repository import ROOT

NEWEST = "delora"
FOLDERS = ("deltaspec", "tests", "specs", "schemas")


def test_the_files_that_a_method_touches_are_those_that_are_listed():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## How to add a method\n")[2].partition("\nEvery other test")[0]
    items = "\n".join(line for line in section.splitlines() if line.startswith("- "))
    listed = {name.replace("<name>", NEWEST) for name in re.findall(r"`([\w./<>-]+\.(?:py|yaml|md|json))`", items)}
    here = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())]
    naming = {
        path.relative_to(ROOT).as_posix()
        for path in here
        if path.suffix in (".py", ".yaml", ".md", ".json") and path != Path(__file__)
        if path.parent != ROOT / "deltaspec/engines"  # they say which methods other programs have
        if NEWEST in path.read_text(encoding="utf-8").lower()
    }
    assert naming == listed
