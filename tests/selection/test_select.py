"""Selection against sets computed another way."""

import time

import pytest
import transformers
from counted import counting
from hypothesis import given
from hypothesis import strategies as st
from tables import MODELS, SIZES, TABLES, built, finding, fqns, names, run
from torch import nn
from whole import examples

from deltaspec.backbone.tabulate import tabulate
from deltaspec.language.load import load
from deltaspec.selection.explain import explain
from deltaspec.selection.select import Match, select


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


@examples(150)
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


def test_selection_looks_at_each_of_two_thousand_rows_a_few_times():
    config = transformers.LlamaConfig(**dict(SIZES, num_hidden_layers=155, head_dim=4, num_key_value_heads=1))
    table = tabulate(built("LlamaForCausalLM", config))
    assert len(table.rows) > 2000
    target = {"role": "attn.q", "path": "**.self_attn.*", "type": "Linear", "layers": {"every": 2}}
    target["not"] = {"regex": r".*\.0\..*"}
    spec = load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": target}]})
    (matches, findings), calls = counting(lambda: select(spec.deltas[0].target, table, {}, spec))
    assert len(matches) == 77 and findings == []
    assert calls < 60 * len(table.rows)


def test_selectors_that_refer_to_each_other_are_resolved_once():
    layers = {f"s{i}": {"any": [{"ref": f"s{i + 1}"}, {"ref": f"s{i + 1}"}]} for i in range(11)}
    target = {"ref": "s0"}
    (found, _), calls = counting(lambda: run("bert", target, {**layers, "s11": "**.query"}))
    assert len(found) == 4
    (_, findings), others = counting(lambda: run("bert", target, {**layers, "s11": "**.nix"}))
    assert [f.code for f in findings] == ["DS302"]
    assert max(calls, others) < 30_000
