"""Pretrained models that packages carry: MiniLM, an ALBERT and an EfficientNet."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import (
    AlbertForMaskedLM,
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
)
from two_deltas import disturb

import deltaspec
from deltaspec.contract.snapshot import differences, snapshot


def test_minilm(minilm_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    model = AutoModel.from_pretrained(minilm_dir).eval()
    before = snapshot(model, identity=True)
    batch: BatchEncoding = tokenizer(
        ["a delta", "is attached to a pretrained model"], padding=True, return_tensors="pt"
    )
    compiled = deltaspec.compile(
        model,
        {
            "deltaspec": 1,
            "deltas": [
                {"name": "norms", "method": "full", "target": {"role": "norm"}},
                {"name": "low", "method": "lora", "params": {"rank": 4}},
                {"name": "wide", "method": "adapter", "params": {"width": 4}},
            ],
        },
    )
    assert {delta.name: len(delta.sites) for delta in compiled.plan.deltas} == {"norms": 13, "low": 12, "wide": 12}
    with torch.no_grad():
        reference = model(**batch).last_hidden_state
        assert torch.equal(compiled(**batch).last_hidden_state, reference)
        disturb(compiled, 0.02)
        out = compiled(**batch).last_hidden_state
        compiled.save(tmp_path)
        assert torch.equal(deltaspec.restore(model, tmp_path)(**batch).last_hidden_state, out)
        compiled.only("norms", "low")
        merged = compiled.merge()
        torch.testing.assert_close(
            merged(**batch).last_hidden_state, compiled(**batch).last_hidden_state, rtol=1e-4, atol=1e-5
        )
        compiled.detach()
        assert torch.equal(compiled(**batch).last_hidden_state, reference)
    assert differences(before, snapshot(model, identity=True)) == []


def test_albert_whose_layers_are_one(albert_dir):
    model = AlbertForMaskedLM.from_pretrained(albert_dir).eval()
    inputs = {"input_ids": torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))}
    query = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    delta = {"name": "low", "method": "lora", "params": {"rank": 4}, "target": query}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})
    assert len(compiled.plan.sites) == 1
    with torch.no_grad():
        reference = model(**inputs).logits
        assert torch.equal(compiled(**inputs).logits, reference)
        disturb(compiled)
        expected = copy.deepcopy(model)
        tensors = dict(compiled.deltas["low"].tensors())
        expected.get_submodule(query).weight += 16 / 4 * tensors[f"{query}.up"] @ tensors[f"{query}.down"]
        torch.testing.assert_close(compiled(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(compiled(**inputs).logits, reference, atol=1e-2)
        torch.testing.assert_close(compiled.merge()(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_efficientnet_whose_convolutions_are_a_subclass(efficientnet_weights: Path):
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(efficientnet_weights, weights_only=True))
    inputs = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    delta = {
        "name": "low",
        "method": "lora",
        "params": {"rank": 4},
        "target": {"all": [{"type": "Conv2d"}, {"path": "_blocks.*._project_conv"}]},
    }
    head = {"name": "head", "method": "full", "target": "_fc"}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta, head]}, example_inputs=inputs)
    assert len(compiled.plan["low"].sites) == 16
    assert {type(compiled.backbone.get_submodule(s.fqn)).__name__ for s in compiled.plan["low"].sites} != {"Conv2d"}
    with torch.no_grad():
        reference = model(inputs)
        assert torch.equal(compiled(inputs), reference)
        disturb(compiled, 0.02)
        out = compiled(inputs)
        assert not torch.allclose(out, reference, atol=1e-3)
        torch.testing.assert_close(compiled.merge()(inputs), out, rtol=1e-4, atol=1e-4)
        assert torch.equal(compiled.detach()(inputs), reference)
    compiled.attach()
    compiled(inputs).sum().backward()
    assert all(p.grad is not None for p in compiled.trainable_parameters())
