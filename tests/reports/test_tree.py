"""The tree of a model: ties, shared modules, narrow terminals, counts for people."""

import torch
from torch import nn

from deltaspec.backbone.tabulate import tabulate
from deltaspec.reports.tree import Mark, Tree, drawn, human


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.first = self.second = nn.Linear(2, 2)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        )


def test_ties_shared_modules_and_plain_containers():
    lines = {line.guide + line.name: line for line in Tree(tabulate(Tied()), {}).lines()}
    assert lines["├─ embed"].note == "tied to head" and lines["├─ head"].note == "tied to embed"
    assert lines["├─ first"].note == "also second"
    assert "   ├─ 0" in lines and "   └─ 3-4 × 2" in lines and not any("ReLU" in line.type for line in lines.values())
    assert next(iter(lines)) == "Tied" and lines["Tied"].parameters == human(36 + 6 + 224 + 16 + 2 * 584)


def test_a_narrow_terminal_keeps_names_and_marks():
    with torch.device("meta"):
        model = nn.ModuleDict({"body": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)})
    table = tabulate(model)
    marks = {row.fqn: [Mark("french", "lora", 0)] for row in table.rows if row.fqn.endswith("linear1")}
    lines = list(Tree(table, marks).lines())
    wide = drawn(lines).plain.splitlines()
    for width in (80, 60, 50):
        text = drawn(lines, width).plain.splitlines()
        assert max(map(len, text)) <= width and len(text) == len(wide)
        assert sum("◀ french: lora" in line for line in text) == 1 and "in_proj" not in "".join(text)
        assert all(line.name in shown for line, shown in zip(lines, text, strict=True))


def test_counts_for_people():
    assert [human(n) for n in (0, 768, 999, 1000, 1536, 999_499, 999_500, 109_514_298, 7_000_000_000, 10**13)] == [
        "0", "768", "999", "1K", "1.54K", "999K", "1M", "110M", "7B", "10T",
    ]  # fmt: skip
