"""`deltaspec tree`, by what it prints."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from deltaspec.backbone.tabulate import tabulate
from deltaspec.cli import main
from deltaspec.reports.tree import Mark, Tree, drawn, human

BERT = dict(
    model_type="bert", architectures=["BertForSequenceClassification"], hidden_size=8, num_hidden_layers=4,
    num_attention_heads=2, intermediate_size=16, vocab_size=32, max_position_embeddings=16,
)  # fmt: skip


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    return str(tmp_path)


def tree(*arguments):
    result = CliRunner().invoke(main, ["tree", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def written(path, deltas):
    path.write_text(json.dumps({"deltaspec": 1, "deltas": deltas}))
    return str(path)


def test_layers_are_folded(bert):
    code, output = tree(bert)
    assert code == 0
    assert output.splitlines() == [
        "BertForSequenceClassification   bert                       2.91K",
        "├─ bert                         BertModel                  2.89K",
        "│  ├─ embeddings                BertEmbeddings               416",
        "│  │  ├─ word_embeddings        Embedding          32→8      256  embed",
        "│  │  ├─ position_embeddings    Embedding          16→8      128  embed",
        "│  │  ├─ token_type_embeddings  Embedding           2→8       16  embed",
        "│  │  └─ LayerNorm              LayerNorm             8       16  norm",
        "│  ├─ encoder                   BertEncoder                 2.4K",
        "│  │  └─ layer.0-3 × 4          BertLayer                4 × 600  block",
        "│  │     ├─ attention           BertAttention                304  attn",
        "│  │     │  ├─ self             BertSelfAttention            216",
        "│  │     │  │  ├─ query         Linear              8→8       72  attn.q",
        "│  │     │  │  ├─ key           Linear              8→8       72  attn.k",
        "│  │     │  │  └─ value         Linear              8→8       72  attn.v",
        "│  │     │  └─ output           BertSelfOutput                88",
        "│  │     │     ├─ dense         Linear              8→8       72  attn.o",
        "│  │     │     └─ LayerNorm     LayerNorm             8       16  norm.attn",
        "│  │     ├─ intermediate        BertIntermediate             144",
        "│  │     │  └─ dense            Linear             8→16      144  mlp.up",
        "│  │     └─ output              BertOutput                   152",
        "│  │        ├─ dense            Linear             16→8      136  mlp, mlp.down",
        "│  │        └─ LayerNorm        LayerNorm             8       16  norm.mlp",
        "│  └─ pooler                    BertPooler                    72",
        "│     └─ dense                  Linear              8→8       72",
        "└─ classifier                   Linear              8→2       18  head",
        "",
        "2.91K parameters in 87 modules; roles of bert",
    ]


def test_sites_of_a_spec_are_marked_and_split_the_fold(bert, tmp_path):
    spec = written(tmp_path / "s.deltaspec.json", [
        {"name": "french", "method": "lora", "target": {"role": ["attn.q", "attn.v"], "layers": {"from": 2}}},
        {"name": "top", "method": "full"},
        {"name": "bias", "method": "full", "target": {"parameter": "**.pooler.dense.bias"}},
    ])  # fmt: skip
    code, output = tree(bert, "--spec", spec)
    lines = output.splitlines()
    assert code == 0
    assert [re.split(r" {2,}", line.strip("│├└─ "))[0] for line in lines if "block" in line] == [
        "layer.0-1 × 2",
        "layer.2-3 × 2",
    ]
    marked = [(re.split(r" {2,}", line.strip("│├└─ "))[0], line.split("◀ ")[1]) for line in lines if "◀" in line]
    assert marked == [("query", "french: lora"), ("value", "french: lora"), ("dense", "bias: full of bias"),
                      ("classifier", "top: full")]  # fmt: skip
    assert lines[-3:] == ["french: lora, 4 selected", "top: full, 1 selected", "bias: full, 1 selected"]


def test_findings_of_the_spec_come_after_the_tree(bert, tmp_path):
    spec = written(tmp_path / "s.deltaspec.json", [{"name": "d", "method": "lora", "target": "**.qurey"}])
    code, output = tree(bert, "--spec", spec)
    assert code == 1 and output.startswith("BertForSequenceClassification")
    assert "error[DS302]" in output and 'did you mean "**.query" (4 modules)?' in output


def test_depth_and_all(bert, tmp_path):
    spec = written(tmp_path / "s.deltaspec.json", [{"name": "d", "method": "lora", "target": "**.query"}])
    code, output = tree(bert, "--depth", "1", "--spec", spec)
    assert code == 0 and output.count("─ ") == 2 and "(4 sites inside)" in output
    code, output = tree(bert, "--all")
    assert output.count(" query ") == 4 and "Dropout" in output and " × " not in output
    assert output.count("─ ") == 86


def test_what_cannot_be_shown(tmp_path):
    code, output = tree(str(tmp_path))
    assert code == 1 and "error[DS321]" in output
    assert tree()[0] == 2 and tree(str(tmp_path), "--depth", "-1")[0] == 2


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
