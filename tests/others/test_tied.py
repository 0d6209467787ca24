"""Tied weights of transformers' models: trained as one, merged, saved and loaded as transformers does."""

from __future__ import annotations

import pytest
import torch
from models import ids
from tiny_models import BUILDERS

import deltaspec


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_one_trained_copy_of_tied_weights_is_one_weight_again_and_reloads(family, strength, tmp_path):
    model, tokens = BUILDERS[family]().eval(), ids().remainder(40) + 3
    model.config.tie_word_embeddings = True
    model.tie_weights()
    [name] = [n for n, module in model.named_modules() if module is model.get_output_embeddings()]
    delta = {"name": "d", "method": "full", "params": {"tied": "together"}, "target": name}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})
    compiled.attach("d", strength=strength)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters():
            parameter.add_(torch.randn_like(parameter))
    given = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if family == "t5" else {})
    merged = compiled.merge().eval()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    merged.save_pretrained(tmp_path)
    found = [each(**given).logits for each in (compiled, merged, type(model).from_pretrained(tmp_path).eval())]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], found[2])
