"""Methods that change one part of a fused projection alone: the formula on its rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from fused_models import FUSED, IDS, compiled, logits, made, rows_of, spec
from torch import nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.testing import check_method


@pytest.mark.parametrize("name", FUSED)
def test_lora_on_parts_changes_their_rows_of_the_weight_by_the_formula(name):
    model = made(name)
    c = compiled(model, "lora", rank=3, alpha=6.0, parts=["v", "q"])
    reference = made(name)
    for site in c.plan.sites:
        weight = reference.get_submodule(site.fqn).weight
        rows = weight.t() if name.startswith("gpt2") else weight
        for part in "qv":
            down, up = (c.deltas["d"].tensor(f"{site.fqn}.{part}_{n}") for n in ("down", "up"))
            assert down.shape == (3, 32) and up.shape == (len(rows_of(name, part)), 3)
            rows[rows_of(name, part)] += 2.0 * up @ down
    assert not torch.allclose(logits(c), logits(model), atol=1e-3)
    torch.testing.assert_close(logits(c), logits(reference), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(c.merge("d")), logits(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_bitfit_on_parts(name):
    model = made(name)
    c = compiled(model, "bitfit", parts=["v", "k"])
    reference = made(name)
    for site in c.plan.sites:
        module = reference.get_submodule(site.fqn)
        change, start = c.deltas["d"].tensor(f"{site.fqn}.bias"), 0
        if module.bias is None:
            width = module.out_features
            module.bias = nn.Parameter(torch.zeros(width), requires_grad=False)
        for part in "vk":
            rows = rows_of(name, part)
            module.bias[rows] += change[start : start + len(rows)]
            start += len(rows)
        assert start == len(change)
    torch.testing.assert_close(logits(c), logits(reference), atol=1e-5, rtol=1e-5)


def test_usual_roles_are_those_that_hold_the_parts():
    entry = {"name": "d", "method": "bitfit"}
    for parts, role in ((["q"], "self_attn.qkv_proj"), (["up"], "mlp.gate_up_proj")):
        plan = deltaspec.plan(made("phi3"), {"deltaspec": 1, "deltas": [entry | {"params": {"parts": parts}}]})
        assert {site.fqn.split(".", 3)[3] for site in plan.sites} == {role}


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_ia3_on_keys_and_values_as_in_the_paper(name):
    model = made(name)
    c = compiled(model, "ia3", parts=["k", "v"])
    reference = made(name)
    for site in c.plan.sites:
        module = reference.get_submodule(site.fqn)
        scale, start = c.deltas["d"].tensor(f"{site.fqn}.scale_out"), 0
        for part in "kv":
            rows = rows_of(name, part)
            piece = scale[start : start + len(rows)]
            start += len(rows)
            weight = module.weight.t() if name == "gpt2" else module.weight
            weight[rows] *= piece[:, None]
            if module.bias is not None:
                module.bias[rows] *= piece
    assert not torch.allclose(logits(c), logits(model), atol=1e-3)
    torch.testing.assert_close(logits(c), logits(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "bitfit", "ia3"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_parts_keep_the_contract(method, name):
    params = {"parts": ["q", "v"]} | ({"rank": 2, "dropout": 0.1} if method == "lora" else {})
    check_method(method, made(name), {"input_ids": IDS}, target={"role": "attn.qkv"}, params=params)


def test_gate_and_up_of_phi3():
    model = made("phi3")
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": [
        {"name": "d", "method": "lora", "params": {"rank": 2, "parts": ["up"]}, "target": {"role": "mlp.gate_up"}}
    ]})  # fmt: skip
    reference = made("phi3")
    with torch.no_grad():
        for site in c.plan.sites:
            c.deltas["d"].tensor(f"{site.fqn}.up_up").normal_()
            down, up = (c.deltas["d"].tensor(f"{site.fqn}.up_{n}") for n in ("down", "up"))
            reference.get_submodule(site.fqn).weight[48:] += 8.0 * up @ down
    torch.testing.assert_close(logits(c), logits(reference), atol=1e-5, rtol=1e-5)


def test_lora_on_q_and_v_of_gpt3_has_the_published_count():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=12288, n_layer=96, n_head=96))
    entry = {"name": "d", "method": "lora", "params": {"rank": 1, "parts": ["q", "v"]}}
    assert deltaspec.plan(model, {"deltaspec": 1, "deltas": [entry]}).trainable == 4_718_592  # 4.7M: table 4 there


def test_deltas_on_parts_combine_by_their_whole_updates():
    model = made("phi3")
    given = spec("lora", rank=2, parts=["q", "v"])["deltas"][0]
    ends = [{**given, "name": "a"}, {**given, "name": "b", "params": {"rank": 2, "parts": ["k"]}}]

    def blended(combine: str) -> dict[str, Any]:
        return {"deltaspec": 1, "deltas": [*ends, {"name": "c", "from": {"a": 1, "b": 1}, "combine": combine}]}

    with pytest.raises(DeltaSpecError, match="without use_dora, parts and init") as caught:
        deltaspec.plan(model, blended("linear"))
    assert caught.value.diagnostics[0].suggestion == "use combine: svd"
    spec_of_svd = blended("svd")
    spec_of_svd["deltas"][2]["params"] = {"rank": 6}
    c = deltaspec.compile(model, spec_of_svd)
    with torch.no_grad():
        for name in "ab":
            for parameter in c.deltas[name].parameters():
                parameter.normal_(std=0.2)
    c.refresh()
    c.only("c")
    together = logits(c)
    c.only("a", "b")
    torch.testing.assert_close(together, logits(c), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, logits(model), atol=1e-2)


@pytest.mark.parametrize("role", ["attn.q", "attn.v"])
def test_asking_for_a_part_by_role_says_how_to_get_it(role):
    entry = {"name": "d", "method": "lora", "params": {"rank": 2}, "target": {"role": role}}
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.plan(made("gpt2"), {"deltaspec": 1, "deltas": [entry]})
    [finding] = caught.value.diagnostics
    part = role[-1]
    assert finding.suggestion.startswith(f"select attn.qkv, with params: {{parts: [{part}]}} to change {part} alone (")
    assert finding.suggestion.endswith("(bitfit, ia3, lora)")


@pytest.mark.parametrize(
    ("name", "target", "params", "code", "said"),
    [
        ("gpt2", {"role": "attn.o"}, {"parts": ["q"]}, "DS402", "is no fused projection, so it has no parts q"),
        ("gpt2", {"role": "attn.qkv"}, {"parts": ["up"]}, "DS402", "has the parts q, k, v, and not up"),
        ("gpt2", {"role": "attn.qkv"}, {"parts": ["q"], "use_dora": True}, "DS210", "without use_dora and bias"),
        ("gpt2", {"role": "attn.qkv"}, {"parts": ["q", "q"]}, "DS210", "each part once"),
        ("gpt2", {"role": "attn.qkv"}, {"parts": []}, "DS2", "parts"),
        ("gpt2", {"role": "attn.qkv"}, {"parts": ["x"]}, "DS2", "parts"),
    ],
)
def test_refusals(name, target, params, code, said):
    entry = {"name": "d", "method": "lora", "params": params, "target": target}
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.plan(made(name), {"deltaspec": 1, "deltas": [entry]})
    assert code in str(caught.value) and said in str(caught.value)
    assert code == "DS210" or all(finding.suggestion for finding in caught.value.diagnostics)


def test_an_unknown_layout_is_refused():
    model = made("phi3")
    model.config.num_key_value_heads = 3  # does not add up with the weights that are there
    with pytest.raises(DeltaSpecError, match="how attn.qkv of this Linear is laid out is not known"):
        deltaspec.plan(model, spec("lora", parts=["q"]))
