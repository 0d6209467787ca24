"""Malformed YAML: the line that its author got wrong, named as what it is, whichever parser stopped wherever."""

import pytest
import yaml
from refusals import findings, hint

from deltaspec.documents.document import from_text

HEAD = "deltaspec: 1\ndeltas:\n"
DELTA = "  - name: a\n    method: lora\n"
SPACE = "DS105 a space is missing after the colon"
COMMENT = "begins no comment in YAML"
QUOTE = "DS105 a quote that is not closed in its line"
NBSP = "DS105 U+00A0 NO-BREAK SPACE is no white space here"
COLON = "DS105 a key without a colon"
CONFLICT = "DS116 an unresolved merge conflict"

MALFORMED = [
    (HEAD + "<<<<<<< HEAD\n" + DELTA + "=======\n  - name: b\n>>>>>>> main\n", f"3:1 {CONFLICT}: <<<<<<< HEAD"),
    (HEAD + DELTA + "=======\n" + DELTA, f"5:1 {CONFLICT}: ======="),
    (HEAD + DELTA + ">>>>>>> main\n", f"5:1 {CONFLICT}: >>>>>>> main"),
    (HEAD + DELTA + "\r\n||||||| 3fa\r\n", f"6:1 {CONFLICT}: ||||||| 3fa"),
    (HEAD + "  - name: 'a\n<<<<<<< HEAD\n'\n", f"4:1 {CONFLICT}: <<<<<<< HEAD"),
    (HEAD + "  - name: a\n    method:lora\n    target: x\n", f"4:12 {SPACE}"),
    (HEAD + "  - name:a\n    method: lora\n", f"3:10 {SPACE}"),
    ("deltaspec:1\ndeltas:\n" + DELTA, f"1:11 {SPACE}"),
    (HEAD + "  - {name: a, method:lora}\n", f"3:22 {SPACE}"),
    (HEAD + DELTA + '    target:"**.q"\n', f"5:12 {SPACE}"),
    (HEAD + DELTA + "    params:{rank: 8}\n", f"5:12 {SPACE}"),
    (HEAD + '  - "name":a\n    method: lora\n', f"3:12 {SPACE}"),
    ("// a comment\n" + HEAD + DELTA, f"1:1 DS105 // {COMMENT}"),
    ("/*\n * a comment\n */\n" + HEAD + DELTA, f"1:1 DS105 /* {COMMENT}"),
    ("deltaspec: 1 // a comment\ndeltas:\n" + DELTA, f"1:14 DS105 // {COMMENT}"),
    (HEAD + "  - name: a\n    // a comment\n    method: lora\n", f"4:5 DS105 // {COMMENT}"),
    (HEAD + "  - name: a // see: there\n    method: lora\n", f"3:13 DS105 // {COMMENT}"),
    (HEAD + DELTA + '    target: "**.q" /* all */\n', f"5:20 DS105 /* {COMMENT}"),
    (HEAD + DELTA + "    params: {rank: 8} // small\n", f"5:23 DS105 // {COMMENT}"),
    (HEAD + "  - {name: a, // which\n     method: lora}\n", f"3:15 DS105 // {COMMENT}"),
    (HEAD + '  - name: "a\n    method: lora\n', f"3:11 {QUOTE}"),
    (HEAD + '  - name: "a\n    method: lora\n    target: "**.q"\n', f"3:11 {QUOTE}"),
    (HEAD + "  - name: 'a\n    method: 'lora'\n", f"3:11 {QUOTE}"),
    (HEAD + DELTA + "    target: {path: '**.q}\n", f"5:20 {QUOTE}"),
    (HEAD + DELTA + "    params: {text: 'don't'}\n", "5:25 DS105 text after the quote that ends the value"),
    (HEAD + DELTA + '    target: ["**.q, "**.v"]\n', "5:22 DS105 text after the quote that ends the value"),
    (HEAD + "  - name:\u00a0a\n    method: lora\n", f"3:10 {NBSP}"),
    (HEAD + "\u00a0\u00a0- name: a\n    method: lora\n", f"3:1 {NBSP}"),
    (HEAD + "  - name: a\n\u00a0\u00a0\u00a0\u00a0method: lora\n", f"4:1 {NBSP}"),
    (HEAD + '  - name: "a"\u00a0\n    method: lora\n', f"3:14 {NBSP}"),
    ("deltaspec: 1\u00a0\ndeltas:\n" + DELTA, f"1:13 {NBSP}"),
    (HEAD + "  -\u3000name: a\n    method: lora\n", "3:4 DS105 U+3000 IDEOGRAPHIC SPACE is no white space here"),
    (HEAD + "  - name: “a”\n    method: lora\n", "3:11 DS105 U+201C LEFT DOUBLE QUOTATION MARK does not quote"),
    (HEAD + "  - name\uff1a a\n    method: lora\n", "3:9 DS105 U+FF1A FULLWIDTH COLON is not :"),
    (HEAD + "  - name: a\n  \tmethod: lora\n", "4:3 DS105 a tab cannot indent YAML"),
    (HEAD + "  - name: a\n    method lora\n    target: x\n", f"4:5 {COLON}: method lora"),
    (HEAD + "  - name a\n    method: lora\n", f"3:5 {COLON}: name a"),
    ("deltaspec: 1\ndeltas\n" + DELTA, f"2:1 {COLON}: deltas"),
    (HEAD + DELTA + "  name: b\n  method: lora\n", "5:3 DS105 an item of a list without its -"),
    (HEAD + DELTA + "  -name: b\n", "5:3 DS105 a space is missing after the -"),
    (HEAD + DELTA + '    target:\n      -"**.q"\n', "6:7 DS105 a space is missing after the -"),
    (HEAD + "  • name: a\n    method: lora\n", "3:3 DS105 U+2022 BULLET begins no item of a list"),
    (HEAD + "  - name: a\n   method: lora\n", "4:4 DS105 the indentation of this line fits none above"),
    (HEAD + "  - name: a\n     method: lora\n",
     "4:6 DS105 this line is indented deeper than the one above, and so runs on from it"),
    (HEAD + DELTA + '    target: ["**.q"\n    dtype: float32\n', "5:13 DS105 the [ that opens here is not closed"),
    ('{\n "deltaspec": 1\n "deltas": []\n}', "2:16 DS105 a comma is missing here"),
    (HEAD + DELTA + '    target: {path: ["**.q"}\n', "5:20 DS105 the [ that opens here is not closed"),
    (HEAD + DELTA + '    target: ["**.q"]]\n', "5:21 DS105 this ] closes nothing"),
    ("```yaml\n" + HEAD + DELTA + "```\n", "1:1 DS105 a fence of Markdown"),
]  # fmt: skip


@pytest.mark.parametrize("loader", ["libyaml", "python"])
@pytest.mark.parametrize(("text", "expected"), MALFORMED)
def test_the_line_that_is_wrong(text, expected, loader, monkeypatch):
    if loader == "python":
        monkeypatch.setattr("deltaspec.documents.yaml._LOADER", yaml.SafeLoader)
    assert findings(text)[0] == expected


def test_the_way_out_can_be_followed():
    assert hint(HEAD + "  - name: a\n    method:lora\n") == "write method: lora"
    assert hint("// c\n" + HEAD) == "a comment begins with #; quote it, if it is text"
    assert hint(HEAD + "  - name:\u00a0a\n") == "type a plain space in its place"


@pytest.mark.parametrize(
    "text",
    ["a: see http://x.org//y", 'a: "x // y"', "a: 'é\u00a0à'", "a: 8:16", "a: |\n  =======\n  // b",
     "a: dites “oui” à tous", "a: x # “b”\u00a0// c"],
)  # fmt: skip
def test_text_that_only_looks_alike_is_read(text):
    assert set(from_text(text).data) == {"a"}
