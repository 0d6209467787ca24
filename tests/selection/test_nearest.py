"""Findings of wrong selectors: what is said of them, and that what is suggested is true."""

import re

import pytest
from tables import finding, names

# Wrong selectors, and what is said about them: model, target, code, part of the message, part of the suggestion.
WRONG = [
    ("bart", "**.fc9", "DS302", 'no module matches path "**.fc9"', 'did you mean "**.fc2" (6 modules)?'),
    ("bart", "fc2", "DS302", 'path "fc2"', 'did you mean "**.fc2" (6 modules)?'),
    ("bert", "self.query", "DS302", "", '"**.self.query" (4 modules)'),
    ("bert", "encoder.layer.*.output", "DS302", "", '"bert.encoder.layer.*.output" (4 modules)'),
    ("bare", "bert.encoder.layer.*.output", "DS302", "", '"encoder.layer.*.output" (4 modules)'),
    ("bare", "bert.encoder.layer.1", "DS302", "", '"encoder.layer.1" (1 module)'),
    ("bert", "bert.encoder.*.query", "DS302", "", '"bert.encoder.**.query" (4 modules)'),
    ("bert", "bert.encoder.layer.9.output", "DS302", "", "there is no 9 in bert.encoder.layer: it has 0..3"),
    ("bert", "bert.9", "DS302", "", "bert has embeddings, encoder"),
    ("bert", "**.99", "DS302", "", "own names here: bert"),
    ("bert", "bert.encodr.layer.*.output", "DS302", "", '"bert.encoder.layer.*.output" (4 modules)'),
    ("bert", "**.QUERY", "DS302", "", '"**.query" (4 modules)'),
    ("bert", "bert.encoder.layer.*.zzz", "DS302", "", "bert.encoder.layer.* has attention, intermediate, output"),
    ("bert", "bert.encoder.layer.0.attention.self.query.weight", "DS302", "", "this names 1 parameter"),
    ("bert", "**.q_proj", "DS302", "", "q_proj is another architecture's name: did you mean role: attn.q (4 modules)?"),
    ("gpt2", "**.q_proj", "DS302", "", "did you mean role: attn.qkv (2 modules)?"),
    ("bert", "**.zzz", "DS302", "", "own names here: bert, embeddings, word_embeddings"),
    ("bert", "zzz", "DS302", "", "the model has bert, dropout, classifier"),
    ("bert", "classifier.weight", "DS302", "", 'this names 1 parameter: write parameter: "classifier.weight"'),
    ("bert", {"type": "Linaer"}, "DS302", "no module matches type Linaer", "did you mean Linear"),
    ("bert", {"type": "torch.nn.Linear"}, "DS302", "", "did you mean Linear (26 modules)?"),
    ("gpt2", {"type": "Conv2d"}, "DS302", "", "did you mean Conv1D (8 modules)?"),
    ("plain", {"type": "Xyzzy"}, "DS302", "", "classes with parameters here: Conv1d, LayerNorm, Linear"),
    ("bert", {"regex": r".*\.qery"}, "DS302", 'regex ".*', None),
    ("bert", {"shape": {"in": ">99999"}}, "DS302", 'shape {in: ">99999"}', "widths here (in, out): (2, 8)"),
    ("gpt2", {"role": "attn.q"}, "DS303", "gpt2 fuses q, k and v in attn.qkv", "select attn.qkv"),
    ("bert", {"role": "mlp.gate"}, "DS303", "no module of this bert has role mlp.gate", "roles here: attn, attn.k"),
    ("bert", {"role": "cross_attn"}, "DS303", "", "roles here"),
    ("plain", {"role": "attn.q"}, "DS303", "the roles of Plain are not known", "use path: or type: instead; known are"),
    ("bert", {"path": "**", "layers": {"from": 3, "to": 9}}, "DS304", "no layer 9",
     "bert.encoder.layer has layers 0..3"),
    ("bert", {"path": "**", "layers": [0, 7, 8]}, "DS304", "no layer 7, 8", "0..3"),
    ("bart", {"path": "**", "layers": {"last": 5}}, "DS304", "no layer 4",
     "model.encoder.layers has layers 0..3; model.decoder.layers has layers 0..1"),
    ("bert", {"role": "attn.q", "type": "LayerNorm"}, "DS305",
     "nothing matches all of: type LayerNorm (9 modules), role attn.q (4 modules)",
     "without role attn.q it would match 9 modules"),
    ("bert", {"path": "**.query", "not": "**.query"}, "DS305", 'not (path "**.query")', "would match 4 modules"),
    ("bert", {"path": "**.query", "not": "**.qurey"}, "DS302", 'path "**.qurey"', '"**.query"'),
    ("bert", {"any": ["**.query", {"path": "**.key", "layers": {"first": 1}, "type": "LayerNorm"}]}, "DS305", "", ""),
    ("bert", {"parameter": "wieght"}, "DS308", 'no parameter matches parameter "wieght"', "did you mean weight?"),
    ("bert", {"parameter": "encoder.layer.0.output.dense.bias"}, "DS308", "", '"**.encoder.layer.0.output.dense.bias"'),
]  # fmt: skip


@pytest.mark.parametrize(("model", "target", "code", "message", "suggestion"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_selectors(model, target, code, message, suggestion):
    found = finding(model, target)
    assert found.code == code and message in found.message
    assert suggestion is None or suggestion in (found.suggestion or "")


@pytest.mark.parametrize(
    "case", [c for c in WRONG if isinstance(c[1], str) or set(c[1]) == {"path"}], ids=lambda c: str(c[1])
)
def test_suggested_paths_are_true(case):
    model, target, *_ = case
    suggested = re.search(r'did you mean "(.+)" \((\d+) modules?\)', finding(model, target).suggestion or "")
    if suggested:
        assert len(names(model, suggested[1])) == int(suggested[2])
