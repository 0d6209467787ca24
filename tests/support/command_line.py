"""A directory with a model's config and a spec, and the command line run in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Run = Callable[..., Result]

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SPEC = """\
deltaspec: 1
model: {type: bert}
deltas:
  - name: french
    method: lora
    params: {rank: 2}
    target: {role: [attn.q, attn.v], layers: {from: 1}}
    expect: {sites: 4}
  - {name: head, method: full, target: classifier}
"""


def change(old: str, new: str, spec: str = "french.deltaspec.yaml") -> None:
    text = Path(spec).read_text()
    assert old in text
    Path(spec).write_text(text.replace(old, new))
