"""sentence-transformers: training, saving and reloading, deltas on the whole pipeline or its transformer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from trained import arguments, losses, texts, tokenizer
from transformers import BertConfig, BertModel

import deltaspec
from deltaspec.training import DeltaTrainerMixin

SPEC = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "params": {"rank": 4}, "target": "**.query"}]}
SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


class Trainer(DeltaTrainerMixin, SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **SIZE)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def pipeline(base, *more):
    return SentenceTransformer(modules=[Transformer(base), Pooling(16), *more], device="cpu")


def compiled_whole(base):
    model = pipeline(base)
    inputs = model.preprocess(["w1 w2"]) if hasattr(model, "preprocess") else model.tokenize(["w1 w2"])
    return deltaspec.compile(model, SPEC, example_inputs=(inputs,))


def train(model, folder, resume=None):
    settings = SentenceTransformerTrainingArguments(**arguments(folder))
    data = Dataset.from_dict({"anchor": texts(1, 24), "positive": texts(2, 24)})
    trainer = Trainer(model=model, args=settings, train_dataset=data, loss=MultipleNegativesRankingLoss(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_compiled_pipeline_trains_is_saved_and_reloaded(tmp_path, base):
    compiled = compiled_whole(base)
    first = train(compiled.backbone, tmp_path)
    assert (
        not list((tmp_path / "checkpoint-2").glob("*/*")) and not (tmp_path / "checkpoint-2/model.safetensors").exists()
    )
    again = train(compiled_whole(base).backbone, tmp_path, str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(first) and len(set(losses(first))) == 3
    compiled.eval()
    compiled.backbone.save(str(tmp_path / "saved"))
    for folder in ("saved", "checkpoint-3"):
        model = pipeline(base)
        back = deltaspec.restore(model, tmp_path / folder, example_inputs=(model.preprocess(["w1 w2"]),))
        wanted, plain = compiled.backbone.encode(["w3 w4"]), model.encode(["w3 w4"])
        assert (back.backbone.encode(["w3 w4"]) == wanted).all() and (plain != wanted).any()
    merged = compiled.merge()
    merged.save(str(tmp_path / "merged"))
    found = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(["w3 w4"])
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_compiled_transformer_inside_trains_with_the_layers_around_it(tmp_path, base):
    def build():
        torch.manual_seed(1)
        model = pipeline(base, Dense(16, 8))
        compiled = deltaspec.compile(model[0].model, SPEC)
        model[0].model = compiled.backbone
        return model, compiled

    model, compiled = build()
    first = train(model, tmp_path)
    twin, _ = build()
    again = train(twin, tmp_path, str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(first)
    assert (twin.eval().encode(["w3 w4"]) == model.eval().encode(["w3 w4"])).all()
    back = deltaspec.restore(BertModel.from_pretrained(base), tmp_path / "checkpoint-3").deltas["d"]
    assert all(map(torch.equal, back.parameters(), compiled.deltas["d"].parameters()))
