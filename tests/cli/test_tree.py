"""`deltaspec tree`, by what it prints."""

import json
import re

import pytest
from click.testing import CliRunner

from deltaspec.cli import main

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
