"""Beside transformers: a compiled model is called, and asked, as the model it was made of."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, TRANSFORMERS, ids
from torch import nn
from two_deltas import build


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_optional_outputs(architecture):
    model = ARCHITECTURES[architecture].model()
    model.set_attn_implementation("eager")
    compiled = build(architecture, model)
    inputs = ARCHITECTURES[architecture].inputs()
    with torch.no_grad():
        out = compiled(**inputs, output_attentions=True, output_hidden_states=True)
        plain = compiled(**inputs)
        listed = compiled(**inputs, return_dict=False)
        base = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(listed[0], out.logits)
    for name in ("hidden_states", "attentions", "encoder_hidden_states", "cross_attentions"):
        if base.get(name):
            assert [tuple(t.shape) for t in out[name]] == [tuple(t.shape) for t in base[name]]
            assert any(not torch.equal(a, b) for a, b in zip(out[name], base[name], strict=True))


def test_labels_and_positional_arguments():
    compiled = build("bert")
    labels = torch.tensor([0, 2])
    out = compiled(ids(), labels=labels)
    expected = nn.functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, expected)
    mask = torch.ones_like(ids())
    mask[:, -2:] = 0
    with torch.no_grad():
        assert torch.equal(compiled(ids(), mask).logits, compiled(input_ids=ids(), attention_mask=mask).logits)
        assert not torch.equal(compiled(ids(), mask).logits, compiled(ids()).logits)


def test_wrong_arguments_fail_as_they_do_on_the_original():
    compiled = build("bert")
    with pytest.raises(TypeError):
        compiled(ids(), nonsense=1, attention_mask=None, input_ids=ids())


def test_the_root_forwards_what_the_backbone_has():
    compiled = build("llama")
    assert compiled.config is compiled.backbone.config
    assert compiled.device == torch.device("cpu") and compiled.dtype is torch.float32
    assert compiled.get_input_embeddings() is compiled.backbone.get_input_embeddings()
    assert compiled.generation_config is compiled.backbone.generation_config
    assert compiled.num_parameters() >= ARCHITECTURES["llama"].model().num_parameters()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = compiled.no_such_thing
