"""Findings about specs: every message that a wrong spec gets, with its place and its way out."""
# ruff: noqa: E501  # one wrong spec and its message a line

import textwrap
import time

import pytest

from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.document import from_text
from deltaspec.language.load import parse
from deltaspec.language.validate import validate
from deltaspec.roles.vocabulary import ROLES


def messages(text: str) -> list[str]:
    with pytest.raises(DeltaSpecError) as caught:
        parse(from_text(textwrap.dedent(text), "s"))
    for d in caught.value.diagnostics:
        assert d.code in CODES
        for leak in (
            "pydantic",
            "jsonschema",
            "Input should",
            "is not valid under",
            "Traceback",
            "errors.pydantic.dev",
        ):
            assert leak not in str(d)
    return str(caught.value).splitlines()


def delta(text: str) -> list[str]:
    """Findings about one delta, written as the rest of a flow mapping, from column 11 of line 2."""
    return messages(f"deltaspec: 1\ndeltas: [{{{text} }}]\n")


@pytest.mark.parametrize("role", ROLES)
def test_all_roles_are_known(role):
    assert not validate({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"role": role}}]})


# --- messages ---------------------------------------------------------------------------------------------------------

OF_ONE_DELTA = [
    # unknown keys, and the names of other libraries
    ("name: d, method: lora, params: {r: 8}", 's:2:43: error[DS201] unknown key "r"', 'did you mean "rank"?'),
    ("name: d, method: lora, params: {lora_alpha: 8}", 's:2:43: error[DS201] unknown key "lora_alpha"', 'did you mean "alpha"?'),
    ("name: d, method: lora, params: {lora_dropout: 0}", 's:2:43: error[DS201] unknown key "lora_dropout"', 'did you mean "dropout"?'),
    ("name: d, method: lora, params: {lora_r: 8}", 's:2:43: error[DS201] unknown key "lora_r"', 'did you mean "rank"?'),
    ("name: d, method: lora, params: {use_rslora: true}", 's:2:43: error[DS201] unknown key "use_rslora"', "write scaling: rslora instead"),
    ("name: d, method: lora, params: {target_modules: [q]}", 's:2:43: error[DS201] unknown key "target_modules"', 'say where with target, beside params: target: "**.q"'),
    ("name: d, method: lora, modified_modules: [q]", 's:2:34: error[DS201] unknown key "modified_modules"', 'say where with target, beside params: target: "**.q"'),
    ("name: d, method: lora, params: {modules_to_save: [q]}", 's:2:43: error[DS201] unknown key "modules_to_save"', 'write a delta of its own: {name: head, method: full, target: "**.q"}'),
    ("name: d, method: adapter, params: {bottleneck_dim: 8}", 's:2:46: error[DS201] unknown key "bottleneck_dim"', 'did you mean "width"?'),
    ("name: d, method: adapter, params: {non_linearity: relu}", 's:2:46: error[DS201] unknown key "non_linearity"', 'did you mean "activation"?'),
    ("name: d, method: adapter, params: {reduction_factor: 8}", 's:2:46: error[DS201] unknown key "reduction_factor"', 'did you mean "reduction"?'),
    ("name: d, method: lora, params: {rnk: 8}", 's:2:43: error[DS201] unknown key "rnk"', 'did you mean "rank"?'),
    ("name: d, method: lora, params: {alhpa: 8}", 's:2:43: error[DS201] unknown key "alhpa"', 'did you mean "alpha"?'),
    ("name: d, method: bitfit, params: {zzz: 8}", 's:2:45: error[DS201] unknown key "zzz"', "known keys: add_missing, parts"),
    ("name: d, method: lora, params: {target: x}", 's:2:43: error[DS201] unknown key "target"', "target belongs to the delta: write it beside params, not inside"),
    ("name: d, method: lora, rank: 8", 's:2:34: error[DS201] unknown key "rank"', "parameters go under params: params: {rank: …}"),
    ("name: d, method: lora, r: 8", 's:2:34: error[DS201] unknown key "r"', "parameters go under params: params: {rank: …}"),
    ("name: d, method: lora, role: attn.q", 's:2:34: error[DS201] unknown key "role"', "selectors go under target: target: {role: …}"),
    ("name: d, method: lora, parms: {}", 's:2:34: error[DS201] unknown key "parms"', 'did you mean "params"?'),
    ("name: d, method: lora, target: {exclude: x, path: y}", 's:2:43: error[DS201] unknown key "exclude"', 'did you mean "not"?'),
    ("name: d, method: lora, target: {paht: y}", 's:2:43: error[DS201] unknown key "paht"', 'did you mean "path"?'),
    ("name: d, method: lora, target: {layers: {start: 1}}", 's:2:52: error[DS201] unknown key "start"', 'did you mean "from"?'),
    # missing keys
    ("method: lora", 's:2:10: error[DS202] deltas[0] lacks the key "name"', "name the delta: it is attached, saved and reported by its name"),
    ("name: d", 's:2:10: error[DS202] deltas[0] lacks the key "method"', "say which delta-tuning method, such as method: lora"),
    ("name: d, method: lora, overrides: [{params: {rank: 1}}]", 's:2:46: error[DS202] overrides[0] lacks the key "match"', "say for which sites, such as match: {role: attn.v}"),
    # types
    ('name: d, method: lora, params: {rank: "8"}', 's:2:49: error[DS203] rank must be an integer or a mapping with budget, not the text "8"', "write 8, without quotes"),
    ("name: d, method: lora, params: {rank: 8.5}", "s:2:49: error[DS203] rank must be an integer or a mapping with budget, not 8.5", None),
    ("name: d, method: lora, params: {rank: 8.0}", "s:2:49: error[DS203] rank must be an integer or a mapping with budget, not 8.0", "write 8"),
    ("name: d, method: lora, params: {rank: true}", "s:2:49: error[DS203] rank must be an integer or a mapping with budget, not true", None),
    ("name: d, method: lora, params: {rank: }", "s:2:49: error[DS203] rank must be an integer or a mapping with budget, but has no value", "delete the key, or give it a value"),
    ("name: d, method: lora, params: {rank: 1_000}", 's:2:49: error[DS203] rank must be an integer or a mapping with budget, not the text "1_000"', "write 1000"),
    ("name: d, method: lora, params: {alpha: high}", 's:2:50: error[DS203] alpha must be a number, not the text "high"', None),
    ("name: d, method: lora, params: {bias: yes}", 's:2:49: error[DS203] bias must be true or false, not the text "yes"', "write true"),
    ("name: d, method: lora, attached: off", 's:2:44: error[DS203] attached must be true or false, not the text "off"', "write false"),
    ("name: 3, method: lora", "s:2:17: error[DS203] name must be text, not 3", 'quote it: "3"'),
    ("name: d, method: lora, params: [1]", "s:2:42: error[DS203] params must be a mapping, not a list", "write a mapping: key: value"),
    ("name: d, method: lora, target: 3", "s:2:42: error[DS203] target must be a selector: a path, a list or a mapping, not 3", None),
    ("name: d, method: lora, target: {layers: 3}", "s:2:51: error[DS203] layers must be a mapping or a list, not 3", "write a list: [3]"),
    ("name: d, method: lora, expect: {sites: x}", 's:2:50: error[DS203] sites must be an integer or a mapping, not the text "x"', None),
    # values
    ("name: d, method: lora, params: {rank: 0}", "s:2:49: error[DS204] rank must be at least 1, not 0", None),
    ("name: d, method: lora, params: {alpha: -1}", "s:2:50: error[DS204] alpha must be greater than 0, not -1", None),
    ("name: d, method: lora, params: {dropout: 1}", "s:2:52: error[DS204] dropout must be less than 1, not 1", None),
    ("name: d, method: lora, target: {layers: [-1]}", "s:2:52: error[DS204] layers[0] must be at least 0, not -1", None),
    ("name: d, method: lora, params: {scaling: rs}", 's:2:52: error[DS205] scaling knows no value "rs"', "known values: standard, rslora"),
    ("name: d, method: lora, target: {role: attn.query}", 's:2:49: error[DS205] role knows no value "attn.query"', 'did you mean "attn.q"?'),
    ("name: d, method: lora, target: {role: [attn.q, mlp.dwn]}", 's:2:58: error[DS205] role knows no value "mlp.dwn"', 'did you mean "mlp.down"?'),
    ("name: d, method: LoRA", 's:2:28: error[DS206] unknown method "LoRA"', 'did you mean "lora"?'),
    ("name: d, method: prefix-tuning", 's:2:28: error[DS206] unknown method "prefix-tuning"', 'did you mean "prefix"?'),
    ("name: d, method: PromptTuning", 's:2:28: error[DS206] unknown method "PromptTuning"', 'did you mean "soft_prompt"?'),
    ("name: d, method: full-finetuning", 's:2:28: error[DS206] unknown method "full-finetuning"', 'did you mean "full"?'),
    ("name: d, method: houlsby", 's:2:28: error[DS206] unknown method "houlsby"', 'did you mean "adapter"?'),
    ("name: -d, method: lora", 's:2:17: error[DS208] "-d" is not a name', "names are letters, digits, - and _, with . and / between them: french, user/lora, 1_task"),
    ('name: "d\\n", method: lora', 's:2:17: error[DS208] "d\\n" is not a name', "names are letters, digits, - and _, with . and / between them: french, user/lora, 1_task"),
    ("name: ../d, method: lora", 's:2:17: error[DS208] "../d" is not a name', "names are letters, digits, - and _, with . and / between them: french, user/lora, 1_task"),
    ("name: d, method: lora, target: {shape: {in: big}}", 's:2:55: error[DS208] "big" is not a comparison', 'write a width (4096), or one of >= <= > < == != and a width (">=4096")'),
    ("name: d, method: lora, target: ''", "s:2:42: error[DS208] target is empty", "delete the key, or give it a value"),
    ("name: d, method: lora, target: []", "s:2:42: error[DS209] target is an empty list", "leave target out for the method's default roles, or say where"),
    ("name: d, method: lora, target: {}", "s:2:42: error[DS209] target is an empty mapping", "leave target out for the method's default roles, or say where"),
    ("name: d, method: lora, target: {any: []}", "s:2:48: error[DS209] any is an empty list", "delete it, or put something into it"),
    ("name: d, method: lora, params: {rank: 1e308}", "s:2:49: error[DS203] rank must be an integer or a mapping with budget, not 1e+308", None),
    ("name: d, method: lora, expect: 13", "s:2:42: error[DS203] expect must be a mapping, not 13", "write {sites: 13}"),
    ("name: d, method: lora, dtype: bf16", 's:2:41: error[DS205] dtype knows no value "bf16"', 'did you mean "bfloat16"?'),
    ("name: d, method: l\u043era", 's:2:28: error[DS206] unknown method "l\u043era"', 'did you mean "lora"? yours has U+043E CYRILLIC SMALL LETTER O'),
    ("name: d, method: lora\u202e", 's:2:28: error[DS206] unknown method "lora\\u202e"', 'did you mean "lora"? yours has U+202E RIGHT-TO-LEFT OVERRIDE'),
    # selectors
    ("name: d, method: lora, target: {ref: up}", 's:2:48: error[DS212] no selector is named "up"', "name it under selectors"),
    ('name: d, method: lora, target: {not: "**.q"}', "s:2:42: error[DS214] a selector needs an atom that chooses, not only one that excludes", 'say what to choose from, such as path: "**"'),
    ("name: d, method: lora, target: {layers: {from: 5, to: 2}}", "s:2:58: error[DS215] from 5 is greater than to 2", "swap from and to?"),
    ("name: d, method: lora, expect: {sites: {min: 5, max: 2}}", "s:2:56: error[DS215] min 5 is greater than max 2", "swap min and max?"),
    ('name: d, method: lora, target: "**fc2"', 's:2:42: error[DS216] path "**fc2": ** must be a whole segment, not a part of **fc2', "write *fc2, or **.fc2"),
    ('name: d, method: lora, target: "a..b"', 's:2:42: error[DS216] path "a..b": an empty segment (a dot too many)', "segments are separated by one dot each"),
    ('name: d, method: lora, target: "a.[0-9].b"', 's:2:42: error[DS216] path "a.[0-9].b": [ means nothing in a path', "a path knows only * and **; use regex: for more"),
    ('name: d, method: lora, target: role:attn.q', 's:2:42: error[DS216] path "role:attn.q": it is no name of a module', "a space is missing after the colon: write role: attn.q"),
    ('name: d, method: lora, params: rank:8', 's:2:42: error[DS203] params must be a mapping, not the text "rank:8"', "a space is missing after the colon: write rank: 8"),
    ('name: d, method: lora, target: {regex: "(a"}', 's:2:50: error[DS217] regular expression "(a": missing ) (character 3)', None),
    ('name: d, method: lora, target: {regex: "*.q"}', 's:2:50: error[DS217] regular expression "*.q": nothing to repeat (character 1)', "begin with .* to match any start"),
    ('name: d, method: lora, target: {regex: "(a+)+$"}', 's:2:50: error[DS218] regular expression "(a+)+$": it backtracks without end on some names: a repeat inside a repeat', "let each repeat end in something that the repeat itself cannot match, as in (?:[a-z]+\\.)*"),
    ("name: d, method: lora, overrides: [{match: x, params: {rank: 0}}]", "s:2:72: error[DS204] rank must be at least 1, not 0", None),
    ("name: d, method: lora, overrides: [{match: x, params: {r: 1}}]", 's:2:66: error[DS201] unknown key "r"', 'did you mean "rank"?'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "suggestion"), OF_ONE_DELTA)
def test_messages_about_a_delta(text, message, suggestion):
    assert delta(text) == [message, *([f"  = help: {suggestion}"] if suggestion else [])]


OF_A_SPEC = [
    ("deltas: [{name: d, method: lora}]", ['s:1:1: error[DS202] the spec lacks the key "deltaspec"', "  = help: begin with: deltaspec: 1"]),
    ("deltaspec: 1", ['s:1:1: error[DS202] the spec lacks the key "deltas"', "  = help: list at least one delta: deltas: [{name: …, method: lora}]"]),
    ("deltaspec: 1\ndeltas: []", ["s:2:9: error[DS209] deltas is an empty list", "  = help: list at least one delta: deltas: [{name: …, method: lora}]"]),
    ("deltaspec: 2\nfoo: 1", ["s:1:12: error[DS207] version 2 of the format is not known; this deltaspec reads version 1", "  = help: upgrade deltaspec"]),
    ("deltaspec: 0\nfoo: 1", ["s:1:12: error[DS207] version 0 of the format is not known; this deltaspec reads version 1", "  = help: write deltaspec: 1"]),
    ('deltaspec: "1"\ndeltas: [{name: d, method: lora}]', ['s:1:12: error[DS203] deltaspec must be an integer, not the text "1"', "  = help: write 1, without quotes"]),
    ("deltaspec: 1\nmodel: bert\ndeltas: [{name: d, method: lora}]", ['s:2:8: error[DS203] model must be a mapping, not the text "bert"', "  = help: write {type: bert}, or {architecture: …} for one class"]),
    ("deltaspec: 1\nmodel: {model_type: bert}\ndeltas: [{name: d, method: lora}]", ['s:2:9: error[DS201] unknown key "model_type"', '  = help: did you mean "type"?']),
    ("deltaspec: 1\nname: x\ndeltas: [{name: d, method: lora}]", ['s:2:1: error[DS201] unknown key "name"', "  = help: name belongs to one delta: write it in an entry of deltas"]),
    ("deltaspec: 1\nseed: -1\ndeltas: [{name: d, method: lora}]", ["s:2:7: error[DS204] seed must be at least 0, not -1"]),
    ("deltaspec: 1\ndeltas: {name: d, method: lora}", ["s:2:9: error[DS203] deltas must be a list, not a mapping", "  = help: write a list: begin each item with -"]),
    ("deltaspec: 1\ndeltas:\n- {name: d, method: lora}\n- {name: d, method: full}", ['s:4:10: error[DS211] duplicate delta name "d": the first one stands at line 3, column 10', "  = help: rename one of the two"]),
    ("deltaspec: 1\ndeltas:\n- {name: d, method: lora}\n- {name: D, method: full}", ['s:4:10: error[DS211] the delta names "D" and "d" differ in case only: the first one stands at line 3, column 10', "  = help: rename one of the two"]),
    ("deltaspec: 1\nselectors: {a: {ref: b}, b: {any: [x, {ref: a}]}}\ndeltas: [{name: d, method: lora}]", ["s:2:45: error[DS213] circular reference: a → b → a", "  = help: break the circle"]),
    ("deltaspec: 1\nselectors: {a: {ref: a}}\ndeltas: [{name: d, method: lora}]", ["s:2:22: error[DS213] circular reference: a → a", "  = help: break the circle"]),
    ("deltaspec: 1\nselectors: {upper: x}\ndeltas: [{name: d, method: lora, target: {ref: uper}}]", ['s:3:48: error[DS212] no selector is named "uper"', '  = help: did you mean "upper"?']),
    ('deltaspec: 1\nselectors: {"a b": x}\ndeltas: [{name: d, method: lora}]', ['s:2:13: error[DS208] "a b" is not a name', "  = help: names are letters, digits, - and _, at most 64, and begin with a letter"]),
    ("deltaspec: 1\ndeltas: [{name: d, method: lora}]\nexpect: {trainable: {max_fraction: 2}}", ["s:3:36: error[DS204] max_fraction must be at most 1, not 2"]),
    ("deltaspec: 1\ndeltas: [{name: d, method: lora}]\nexpect: {trainable: {max_fraction: 1%}}", ['s:3:36: error[DS203] max_fraction must be a number, not the text "1%"', "  = help: write 0.01"]),
    ("deltaspec: 1\ndeltas: [{name: d, method: lora}]\nexpect: {untouched: '**.q'}", ['s:3:21: error[DS203] untouched must be a list, not the text "**.q"', '  = help: write a list: ["**.q"]']),
    ("deltaspec: 1\ndeltas: [{name: d, method: lora}]\nexpect: {untouched: [{role: hed}]}", ['s:3:29: error[DS205] role knows no value "hed"', '  = help: did you mean "head"?']),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), OF_A_SPEC)
def test_messages_about_a_spec(text, expected):
    assert messages(text) == expected


def test_all_findings_come_at_once_in_the_order_of_the_document():
    lines = messages(
        """\
        deltaspec: 1
        deltas:
          - {name: a, method: lorra}
          - {name: b, method: lora, params: {rank: 0, r: 1}, target: {ref: nope}}
          - {name: a, method: full, target: "**fc"}
        expct: {}
        """
    )
    found = [line.split(" ")[0:2] for line in lines if not line.startswith(" ")]
    assert [(place, code) for place, code in found] == [
        ("s:3:23:", "error[DS206]"),
        ("s:4:44:", "error[DS204]"),
        ("s:4:47:", "error[DS201]"),
        ("s:4:68:", "error[DS212]"),
        ("s:5:12:", "error[DS211]"),
        ("s:5:37:", "error[DS216]"),
        ("s:6:1:", "error[DS201]"),
    ]


def test_a_dict_is_checked_like_a_file():
    found = validate({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "params": {"rank": "8"}}]})
    assert [str(d) for d in found] == [
        '<spec>:deltas[0].params.rank: error[DS203] rank must be an integer or a mapping with budget, not the text "8"\n  = help: write 8, without quotes'
    ]


def test_validate_gives_findings_and_never_raises(tmp_path):
    assert [d.code for d in validate(tmp_path / "none")] == ["DS101"]
    assert [d.code for d in validate({})] == ["DS202", "DS202"]
    assert validate({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora"}]}) == []


def test_long_lists_of_findings_are_cut():
    text = "deltaspec: 1\ndeltas:\n" + "".join(f"- {{name: d{i}, method: lorra}}\n" for i in range(500))
    with pytest.raises(DeltaSpecError) as caught:
        parse(from_text(text, "s"))
    assert len(caught.value.diagnostics) == 101
    assert caught.value.diagnostics[-1].code == "DS220"


def test_references_that_unfold_without_end_are_refused_at_once():
    chain = "".join(f"  s{i}: [{{ref: s{i - 1}}}, {{ref: s{i - 1}}}]\n" for i in range(1, 60))
    start = time.process_time()
    lines = messages(f"deltaspec: 1\nselectors:\n  s0: x\n{chain}deltas: [{{name: d, method: lora}}]\n")
    assert time.process_time() - start < 2
    assert lines[0].endswith("error[DS213] the selector 's12' refers to too many others in turn")


@pytest.mark.parametrize("pattern", ["(a|aa)+$", r"(\w+\.?)+!", "(x+x+)+y", "([a-z]+)*\\.q", "(?R)", "a{100000000}"])
def test_regular_expressions_that_backtrack_end_in_one_finding(pattern):
    start = time.process_time()
    found = validate({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"regex": pattern}}]})
    assert time.process_time() - start < 2
    assert [d.code for d in found] in (["DS217"], ["DS218"])
