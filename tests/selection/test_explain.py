"""Why a selector takes or refuses one module, atom by atom."""

from tables import TABLES

from deltaspec.language.load import load
from deltaspec.selection.explain import explain


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
