"""A spec as data: every part of the grammar, places, equality, digests."""

import copy
import json
import pickle

import pytest

from deltaspec.documents.document import from_text
from deltaspec.language.load import load, parse

FULL = """\
deltaspec: 1
model: {type: bart}
seed: 3
selectors:
  upper_qv: {role: [attn.q, attn.v], layers: {from: 3}}
deltas:
  - name: french
    method: lora
    params: {rank: 8, alpha: 16, dropout: 0.05}
    target:
      any:
        - {ref: upper_qv}
        - {path: "model.encoder.layers.*.fc2"}
      not: {layers: {last: 1}}
    overrides:
      - {match: {role: attn.v}, params: {rank: 4}}
    expect: {sites: 18, trainable: {max: 1000}}
  - {name: head, method: full, target: classification_head, attached: false}
  - {name: biases, method: bitfit, target: ["**.q", {shape: {in: ">=4096", out: 3}, parameter: bias, layers: [0, 2]}]}
expect:
  trainable: {max_fraction: 0.01}
  untouched: [{role: head}, "**.norm"]
"""


def test_every_part_of_the_grammar_arrives():
    spec = parse(from_text(FULL, "s"))
    french, head, biases = spec.deltas
    assert (spec.version, spec.seed, spec.model.type, spec.name) == (1, 3, "bart", "s")
    assert spec.selectors["upper_qv"].role == ("attn.q", "attn.v")
    assert spec.selectors["upper_qv"].layers.from_ == 3
    assert (french.params.rank, french.params.alpha, french.params.dropout) == (8, 16.0, 0.05)
    assert [s.ref for s in french.target.any_of] == ["upper_qv", None]
    assert french.target.any_of[1].path == ("model.encoder.layers.*.fc2",)
    assert french.target.none_of.layers.last == 1
    assert french.params_with(french.overrides[0]).rank == 4
    assert french.params_with(french.overrides[0]).alpha == 16
    assert (french.expect.sites.min, french.expect.sites.max, french.expect.trainable.max) == (18, 18, 1000)
    assert (head.target.path, head.attached, french.attached) == (("classification_head",), False, True)
    first, second = biases.target.any_of
    assert first.path == ("**.q",)
    assert (second.shape.in_, second.shape.out, second.parameter, second.layers.only) == (
        ">=4096",
        3,
        ("bias",),
        (0, 2),
    )
    assert spec.expect.trainable.max_fraction == 0.01
    assert [(s.role, s.path) for s in spec.expect.untouched] == [(("head",), ()), ((), ("**.norm",))]


def test_places_lead_back_into_the_document():
    spec = parse(from_text(FULL, "s"))
    lines = FULL.splitlines()

    def at(path, key=False):
        line, column = spec.locate(path, key)
        return lines[line - 1][column - 1 :]

    fc2 = spec.deltas[0].target.any_of[1]
    assert at((*fc2.location, "path")).startswith('"model.encoder')
    assert at((*fc2.location, "path", 0)).startswith('"model.encoder')
    assert at((*spec.selectors["upper_qv"].location, "role", 1)).startswith("attn.v]")
    assert at((*spec.deltas[1].target.location, "path", 0)).startswith("classification_head,")
    assert at((*spec.deltas[2].target.any_of[0].location, "path", 0)).startswith('"**.q"')
    assert at((*spec.expect.untouched[1].location, "path", 0)).startswith('"**.norm"')
    assert at(("deltas", 0, "expect"), key=True).startswith("expect: {sites")
    assert str(spec.diagnostic("DS301", "no", fc2.location, "try")) == "s:13:11: error[DS301] no\n  = help: try"


def test_a_spec_writes_itself_out_and_reads_back_equal(tmp_path):
    spec = parse(from_text(FULL, "s"))
    again = load(spec.to_data())
    assert again == spec
    assert (again.digest, hash(again), again.name) == (spec.digest, hash(spec), "<spec>")
    assert again.to_data() == spec.to_data()
    for name, text in (("a.deltaspec.json", json.dumps(spec.to_data())), ("a.deltaspec.yaml", FULL)):
        (tmp_path / name).write_text(text)
        assert load(tmp_path / name) == spec
        assert load(str(tmp_path / name)).name == str(tmp_path / name)
    assert load(spec) is spec


def test_the_digest_is_of_what_a_spec_means():
    one = load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "**.q"}]})
    same = load(
        {
            "deltas": [{"target": {"path": ["**.q"]}, "params": {"rank": 8}, "method": "lora", "name": "d"}],
            "deltaspec": 1,
        }
    )
    other = load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "**.k"}]})
    assert one == same
    assert one != other
    assert one != "something else"


def test_a_spec_is_immutable_and_travels():
    spec = parse(from_text(FULL, "s"))
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 4
    for copied in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert copied == spec
        assert copied.locate(("seed",)) == spec.locate(("seed",))


def test_walk_gives_nested_selectors_in_document_order():
    spec = parse(from_text(FULL, "s"))
    assert [s.location[3:] for s in spec.deltas[0].target.walk()] == [(), ("any", 0), ("any", 1), ("not",)]


def test_a_target_may_be_left_out():
    assert load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora"}]}).deltas[0].target is None
