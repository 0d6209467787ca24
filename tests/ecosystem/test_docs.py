"""The snippets of docs/trainers.md, run as they stand there, in order."""

from __future__ import annotations

import re

import torch
from datasets import Dataset
from repository import ROOT
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.utils.data import DataLoader
from trained import IDS, ROWS, SIZE, SPEC, llama, texts, tokenizer
from transformers import BertConfig, BertModel


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(hidden_size=64, intermediate_size=128).save_pretrained("base")
    small = {name: value for name, value in SIZE.items() if name != "num_key_value_heads"}
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **small)).save_pretrained("encoder")
    tokenizer().save_pretrained("encoder")
    encoder = SentenceTransformer(modules=[Transformer("encoder"), Pooling(16)], device="cpu")
    names = {
        "model": llama(), "spec": SPEC, "rows": ROWS, "tokenizer": tokenizer(), "folder": "base", "encoder": encoder,
        "texts": Dataset.from_dict({"text": texts(1, 24)}),
        "pairs": Dataset.from_dict({"prompt": texts(1), "chosen": texts(2), "rejected": texts(3)}),
        "anchors": Dataset.from_dict({"anchor": texts(1, 24), "positive": texts(2, 24)}),
        "encoder_spec": {"deltaspec": 1, "deltas": [{"name": "e", "method": "lora", "target": "**.query"}]},
        "loader": DataLoader(IDS, batch_size=4), "batch": IDS[:4],
    }  # fmt: skip
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trainers.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 8
    for snippet in found:
        exec(compile(snippet, "docs/trainers.md", "exec"), names)
    assert torch.isfinite(torch.tensor([p.abs().max().item() for p in names["c"].trainable_parameters()])).all()
    for folder in ("out/checkpoint-4", "sft/checkpoint-2", "dpo/checkpoint-2", "deltas", "lit", "plain", "several"):
        assert (tmp_path / folder / "manifest.json").exists(), folder
    assert (tmp_path / "qlora/checkpoint-1/manifest.json").exists()
