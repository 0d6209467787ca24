"""Selection against sets computed another way, the findings of wrong selectors, and their explanations."""

import re
import time

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaspec.backbone.tabulate import tabulate
from deltaspec.language.load import load
from deltaspec.selection.explain import explain
from deltaspec.selection.select import Match, select

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


def test_paths():
    assert names("bert", "**.query") == fqns("bert", r".*\.query") and len(names("bert", "**.query")) == 4
    assert names("bert", "bert.encoder.layer.*") == [f"bert.encoder.layer.{i}" for i in range(4)]
    assert names("bert", "bert.encoder.layer.[1]".replace("[1]", "1")) == ["bert.encoder.layer.1"]
    assert names("bert", "**.layer.*.**.dense") == fqns("bert", r".*\.layer\.\d\..*dense")
    assert names("bert", "*") == ["bert", "dropout", "classifier"]
    assert names("bert", "**") == [name for name, _ in MODELS["bert"].named_modules() if name]
    assert names("bert", ["**.key", "**.query"]) == fqns("bert", r".*\.(key|query)")  # in the model's order


def test_regexes_match_whole_names():
    assert names("bert", {"regex": r".*\.(query|value)"}) == fqns("bert", r".*\.(query|value)")
    assert finding("bert", {"regex": "query"}).suggestion.endswith('did you mean ".*query" (4 modules)?')


def test_types_by_any_base_class():
    linears = [n for n, m in MODELS["plain"].named_modules() if isinstance(m, nn.Linear)]
    assert names("plain", {"type": "Linear"}) == linears
    assert names("plain", {"type": ["_ConvNd", "LayerNorm"]}) == ["tail.0", "tail.1"]
    assert names("gpt2", {"type": "Conv1D"}) == fqns("gpt2", r".*\.c_(attn|proj|fc)")


def test_a_shared_module_counts_once_under_each_of_its_names():
    assert names("plain", "again") == names("plain", "tail.2") == ["tail.2"]
    assert names("plain", ["again", "tail.2"]) == ["tail.2"]
    assert names("plain", {"regex": "aga.n"}) == ["tail.2"]
    assert names("plain", {"parameter": "again.weight"}) == ["tail.2.weight"]


def test_roles_and_layers():
    assert names("bert", {"role": ["attn.q", "attn.v"], "layers": {"from": 1, "to": 2}}) == [
        f"bert.encoder.layer.{i}.attention.self.{n}" for i in (1, 2) for n in ("query", "value")
    ]
    assert names("bert", {"role": "norm"}) == [
        n for n, m in MODELS["bert"].named_modules() if isinstance(m, nn.LayerNorm)
    ]


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [
        ({"from": 1}, {1, 2, 3}, {1}),
        ({"to": 1}, {0, 1}, {0, 1}),
        ({"from": 1, "to": 2}, {1, 2}, {1}),
        ({"first": 1}, {0}, {0}),
        ({"last": 1}, {3}, {1}),  # each stack's own last one
        ({"last": 3}, {1, 2, 3}, {0, 1}),
        ({"every": 2}, {0, 2}, {0}),
        ({"every": 2, "from": 1}, {1, 3}, {1}),
        ({"first": 3, "last": 2}, {2}, {0, 1}),
        ([0, 3], {0, 3}, {0}),
        ({"only": [1]}, {1}, {1}),
    ],
)
def test_layers_are_relative_to_their_own_stack(layers, encoder, decoder):
    found = names("bart", {"role": "attn.q", "layers": layers})
    expected = [f"model.{side}.layers.{i}.self_attn.q_proj" for side, numbers in
                (("encoder", encoder), ("decoder", decoder)) for i in sorted(numbers)]  # fmt: skip
    assert found == expected


def test_shapes():
    assert names("plain", {"shape": {"in": 8}}) == [f"blocks.{i}.down" for i in range(5)]
    assert names("plain", {"shape": {"in": ">=4", "out": "<4"}}) == ["tail.2"]
    assert names("plain", {"shape": {"out": "!=8"}, "type": "Linear"}) == [f"blocks.{i}.down" for i in range(5)] + [
        "tail.2"
    ]
    assert names("plain", {"shape": {"out": "==6"}}) == ["tail.0"]


def test_parameters_are_selected_instead_of_their_modules():
    assert run("plain", {"parameter": "tail.*.bias"})[0] == tuple(
        Match(row, "bias") for row in TABLES["plain"].rows if row.fqn in ("tail.0", "tail.1")
    )
    assert names("plain", {"parameter": "token"}) == ["token"]  # the root's own
    assert names("plain", {"parameter": "bias", "layers": {"first": 1}}) == ["blocks.0.up.bias", "blocks.0.down.bias"]
    assert names("plain", {"parameter": "**.bias", "type": "Conv1d"}) == ["tail.0.bias"]


def test_modules_and_parameters_together():
    # A module stands for its parameters; what `not` takes out of it leaves the others, one by one.
    assert names("plain", ["tail.0", {"parameter": "tail.0.bias"}]) == ["tail.0"]
    assert names("plain", {"path": "tail.*", "not": {"parameter": "bias"}}) == [
        "tail.0.weight",
        "tail.1.weight",
        "tail.2",
    ]
    assert names("plain", ["tail.0", {"parameter": "tail.1.bias"}]) == ["tail.0", "tail.1.bias"]


def test_named_selectors():
    selectors = {"upper": {"layers": {"from": 2}}, "upper_q": {"ref": "upper", "role": "attn.q"}}
    assert names("bert", {"any": [{"ref": "upper_q"}, "classifier"]}, selectors) == [
        "bert.encoder.layer.2.attention.self.query", "bert.encoder.layer.3.attention.self.query", "classifier",
    ]  # fmt: skip
    assert names("bert", {"path": "**.query", "not": {"ref": "upper"}}, selectors) == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)
    ]


def test_the_root_is_never_a_site():
    for target in ("**", {"regex": ".*"}, {"type": "Module"}, {"path": "bert", "not": "classifier"}):
        matches, _ = run("bert", target)
        assert all(match.row.fqn for match in matches)
    wrong = finding("bert", {"type": "BertForSequenceClassification"})
    assert wrong.code == "DS302" and "the model itself" in wrong.suggestion


# The algebra, against plain set operations.
ROWS = [row.fqn for row in TABLES["bart"].rows if row.fqn]
LAYERS = {row.fqn: row.layer for row in TABLES["bart"].rows}
ROLES = {row.fqn: set(row.roles) for row in TABLES["bart"].rows}
LEAVES = {
    "**.q_proj": {n for n in ROWS if n.endswith(".q_proj")},
    "**.encoder.**": {n for n in ROWS if "encoder" in n.split(".")},
    "**.fc2": {n for n in ROWS if n.endswith(".fc2")},
    "lm_head": {"lm_head"},
    "**": set(ROWS),
}
KEYS = st.sampled_from(
    [({"path": path}, found) for path, found in LEAVES.items()]
    + [({"role": role}, {n for n in ROWS if role in ROLES[n]}) for role in ("attn", "attn.q", "norm", "cross_attn.v")]
    + [({"layers": {"first": k}}, {n for n in ROWS if LAYERS[n] is not None and LAYERS[n] < k}) for k in (1, 2)]
    + [({"layers": [1]}, {n for n in ROWS if LAYERS[n] == 1})]
    + [({"type": "Linear"}, {n for n, m in MODELS["bart"].named_modules() if isinstance(m, nn.Linear)})]
)


def conjunction(parts):
    """Put parts with different keys into one mapping, whose keys AND."""
    document, expected = {}, set(ROWS)
    for part, found in parts:
        if not set(part) & set(document):
            document |= part
            expected &= found
    return document, expected


def composed(children):
    some = st.lists(children, min_size=1, max_size=3)
    unions = some.map(lambda c: ({"any": [d for d, _ in c]}, set().union(*(f for _, f in c))))
    meets = some.map(lambda c: ({"all": [d for d, _ in c]}, set(ROWS).intersection(*(f for _, f in c))))
    minus = st.tuples(KEYS, children).map(lambda c: (c[0][0] | {"not": c[1][0]}, c[0][1] - c[1][1]))
    both = st.tuples(KEYS, unions, minus).map(lambda c: conjunction(c))
    return unions | meets | minus | both


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.lists(KEYS, min_size=1, max_size=3).map(conjunction), composed, max_leaves=8))
def test_any_all_and_not_are_set_operations(case):
    document, expected = case
    matches, findings = run("bart", document)
    assert {match.fqn for match in matches} == expected
    assert [m.fqn for m in matches] == [n for n in ROWS if n in expected]
    if not expected:
        assert any(f.code == "DS305" for f in findings)
    elif not findings:
        table = TABLES["bart"]
        spec = load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": document}]})
        for row in (table.rows[k] for k in (1, 7, 40, len(table.rows) - 1)):
            reasons = explain(spec.deltas[0].target, table, row, {})
            assert all(r.accepted for r in reasons if r.depth == 0) == (row.fqn in expected)
    silent, none = run("bart", document | {"optional": True})
    assert none == [] and [m.fqn for m in silent] == [m.fqn for m in matches]


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


def test_optional_excuses_what_matches_nothing():
    assert run("bert", {"any": ["**.query", {"path": "**.nope", "optional": True}]})[1] == []
    assert run("bert", {"path": "**.nope", "optional": True}) == ((), [])
    assert run("bert", {"any": ["no", "nor"], "optional": True}) == ((), [])
    assert run("plain", {"role": "attn.q", "optional": True}) == ((), [])
    assert run("bert", {"path": "**.query", "layers": {"to": 99}, "optional": True})[1] == []
    assert run("bert", {"ref": "x"}, {"x": {"path": "nope", "optional": True}}) == ((), [])
    kept, findings = run("bert", {"path": "**.query", "not": {"path": "nope", "optional": True}})
    assert len(kept) == 4 and findings == []
    assert [f.code for f in run("bert", {"any": [{"path": "no", "optional": True}, "nor"]})[1]] == ["DS302"]


def test_all_findings_at_once_at_their_places(tmp_path):
    file = tmp_path / "wrong.deltaspec.yaml"
    file.write_text(
        "deltaspec: 1\n"
        "selectors:\n"
        "  low: {layers: {to: 44}}\n"
        "deltas:\n"
        "  - name: d\n"
        "    method: lora\n"
        "    target:\n"
        "      any:\n"
        "        - '**.qurey'\n"
        "        - {role: [attn.q, mlp.gate]}\n"
        "        - {ref: low}\n"
        "        - {ref: low, path: '**.key'}\n"
        "      not: {path: ['**.query', '**.nix']}\n"
    )
    spec = load(file)
    _, findings = select(spec.deltas[0].target, TABLES["bert"], spec.selectors, spec)
    assert [(f.line, f.column, f.code) for f in findings] == [
        (9, 11, "DS302"),
        (10, 27, "DS303"),
        (3, 17, "DS304"),  # once, for two refs
        (13, 32, "DS302"),
    ]
    assert str(findings[0]).startswith(f"{file}:9:11: error[DS302]")


def test_a_regex_has_a_time_limit_on_the_whole_table(monkeypatch):
    monkeypatch.setattr("deltaspec.selection.atoms.REGEX_SECONDS", 0.0)
    found = finding("bert", {"regex": ".*e.*e.*e.*query"})
    assert found.code == "DS307" and "takes more than 0.0 s on the names of this model" in found.message


def test_a_regex_that_backtracks_on_long_names_ends_in_time():
    model = nn.Module()
    for number in range(300):
        model.add_module("a" * 200 + str(number), nn.Identity())
    table = tabulate(model)
    spec = load(
        {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"regex": ".*a.*a.*a.*a.*[^a0-9]"}}]}
    )
    start = time.process_time()
    matches, findings = select(spec.deltas[0].target, table, {}, spec)
    assert time.process_time() - start < 2
    assert matches == () and len(findings) == 1 and findings[0].code in ("DS302", "DS307")


def test_selection_over_two_thousand_rows_takes_milliseconds():
    config = transformers.LlamaConfig(**dict(SIZES, num_hidden_layers=155, head_dim=4, num_key_value_heads=1))
    table = tabulate(built("LlamaForCausalLM", config))
    assert len(table.rows) > 2000
    target = {"role": "attn.q", "path": "**.self_attn.*", "type": "Linear", "layers": {"every": 2}}
    target["not"] = {"regex": r".*\.0\..*"}
    spec = load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": target}]})
    times = []
    for _ in range(5):
        start = time.process_time()
        matches, findings = select(spec.deltas[0].target, table, {}, spec)
        times.append(time.process_time() - start)
    assert len(matches) == 77 and findings == []
    assert min(times) < 0.1  # five atoms: about 12 ms on an idle machine


def test_selectors_that_refer_to_each_other_are_resolved_once():
    layers = {f"s{i}": {"any": [{"ref": f"s{i + 1}"}, {"ref": f"s{i + 1}"}]} for i in range(11)}
    start = time.process_time()
    for _ in range(5):
        assert len(run("bert", {"ref": "s0"}, {**layers, "s11": "**.query"})[0]) == 4
    _, findings = run("bert", {"ref": "s0"}, {**layers, "s11": "**.nix"})
    assert [f.code for f in findings] == ["DS302"]
    assert time.process_time() - start < 0.5


def test_explain_says_atom_by_atom():
    target = {
        "role": ["attn.q", "attn.v"],
        "layers": {"from": 3},
        "any": [{"ref": "linears"}, {"path": "classifier"}],
        "not": "**.value",
    }
    selectors = {"linears": {"type": "Linear"}}
    spec = load({"deltaspec": 1, "selectors": selectors,
                 "deltas": [{"name": "d", "method": "lora", "target": target}]})  # fmt: skip
    rows = {row.fqn: row for row in TABLES["bert"].rows}
    row = rows["bert.encoder.layer.1.attention.self.query"]
    reasons = explain(spec.deltas[0].target, TABLES["bert"], row, spec.selectors)
    assert [str(reason) for reason in reasons] == [
        "role [attn.q, attn.v]: accepted, its roles are attn.q",
        "layers {from: 3}: refused, layer 1 of bert.encoder.layer",
        "any: accepted, 1 of 2 hold",
        "  ref linears: accepted",
        "    type Linear: accepted, it is a Linear",
        '  path "classifier": refused, the name is bert.encoder.layer.1.attention.self.query',
        "not: accepted, it does not hold",
        '  path "**.value": refused, the name is bert.encoder.layer.1.attention.self.query',
    ]
    assert reasons[1].location == ("deltas", 0, "target", "layers")
    root = explain(spec.deltas[0].target, TABLES["bert"], rows[""], spec.selectors)
    assert [r.accepted for r in root] == [False]


def test_explain_parameters():
    spec = load({"deltaspec": 1, "deltas": [{"name": "d", "method": "full", "target": {"parameter": "**.bias"}}]})
    rows = {row.fqn: row for row in TABLES["plain"].rows}
    (yes,) = explain(spec.deltas[0].target, TABLES["plain"], rows["tail.0"], {})
    (no,) = explain(spec.deltas[0].target, TABLES["plain"], rows["tail.2"], {})
    assert str(yes) == 'parameter "**.bias": accepted, its parameter bias'
    assert str(no) == 'parameter "**.bias": refused, its own parameters are weight'
