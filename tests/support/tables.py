"""Tables of small models, and selections on them."""

import re

import torch
import transformers
from torch import nn

from deltaspec.backbone.tabulate import tabulate
from deltaspec.language.load import load
from deltaspec.selection.select import select

SIZES = dict(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, vocab_size=32)
BART = dict(d_model=8, vocab_size=32, encoder_layers=4, decoder_layers=2, max_position_embeddings=16)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)


def built(name, config):
    with torch.device("meta"):
        return getattr(transformers, name)(config)


class Plain(nn.Module):
    """Shared, single and repeated modules, and parameters of its own, at the root as well."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(5)])
        self.tail = nn.Sequential(nn.Conv1d(4, 6, 3), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
        self.again = self.tail[2]


MODELS = {
    "bert": built("BertForSequenceClassification", transformers.BertConfig(**SIZES)),
    "bare": built("BertModel", transformers.BertConfig(**SIZES)),
    "bart": built("BartForConditionalGeneration", transformers.BartConfig(**BART)),
    "gpt2": built("GPT2LMHeadModel", transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32)),
    "plain": Plain(),
}
TABLES = {name: tabulate(model) for name, model in MODELS.items()}


def run(model, target, selectors=None):
    document = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": target}]}
    if selectors:
        document["selectors"] = selectors
    spec = load(document)
    return select(spec.deltas[0].target, TABLES[model], spec.selectors, spec)


def names(model, target, selectors=None):
    """Return the selected names; the selector must be right."""
    matches, findings = run(model, target, selectors)
    assert findings == []
    return [match.fqn for match in matches]


def finding(model, target, selectors=None):
    """Return the one finding of a wrong selector."""
    _, findings = run(model, target, selectors)
    assert len(findings) == 1, [str(f) for f in findings]
    return findings[0]


def fqns(model, pattern):
    return [name for name, _ in MODELS[model].named_modules() if name and re.fullmatch(pattern, name)]
