"""From specs and a model to a plan: published counts, and all findings at once, in the order of the documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import QV, Net, codes, refused, roberta, spec, tiny_bert
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)
from whole import examples

import deltaspec
from deltaspec.deltas.initial import build_delta
from deltaspec.planning.resolve import plan


def test_lora_on_roberta_base_has_the_count_of_the_paper() -> None:
    # arXiv:2106.09685, table 2: 0.3M trainable parameters. 12 layers x 2 matrices x rank 8 x (768 + 768).
    model = roberta()
    planned = plan(model, spec({"target": QV}))
    assert planned.trainable == 12 * 2 * 8 * (768 + 768) == 294_912
    assert len(planned.sites) == 24
    assert planned.base_parameters == sum(p.numel() for p in model.parameters())
    assert planned.fraction == 294_912 / planned.base_parameters
    assert planned.model_class == "RobertaModel" and planned.model_type == "roberta"


def test_counts_equal_what_is_built() -> None:
    model = tiny_bert()
    deltas = [
        {"method": "lora", "params": {"bias": True}, "target": {"type": "Linear", "not": "classifier"}},
        {"method": "adapter", "params": {"width": 5}, "target": "bert.encoder.layer.*"},
        {"method": "bitfit", "target": {"role": ["attn.q", "norm"]}},
    ]
    planned = plan(model, spec({"method": "full", "target": "classifier"}, *deltas))
    for delta in planned.deltas:
        built = build_delta(delta, delta.seed, model)
        assert delta.trainable == sum(p.numel() for p in built.parameters()) > 0
    assert planned.trainable == sum(delta.trainable for delta in planned.deltas)


@examples(30)
@given(st.data())
def test_any_choice_of_linears_has_the_count_of_the_formula(data: st.DataObject) -> None:
    model = Net(width=data.draw(st.sampled_from([4, 6, 8])), layers=data.draw(st.integers(1, 5)))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = data.draw(st.lists(st.sampled_from(sorted(linears)), min_size=1, unique=True))
    rank = data.draw(st.integers(1, 16))
    planned = plan(model, spec({"target": chosen, "params": {"rank": rank}}))
    assert planned.trainable == sum(rank * (linears[n].in_features + linears[n].out_features) for n in chosen)
    assert [s.fqn for s in planned.sites] == [n for n in linears if n in chosen]  # the model's order, not the spec's


def test_planning_changes_nothing() -> None:
    model = tiny_bert().train()
    model.classifier.weight.requires_grad_(False)
    random = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dicts = {name: dict(module.__dict__) for name, module in model.named_modules()}
    plan(model, spec({"target": QV}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert dicts == {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert torch.equal(torch.get_rng_state(), random) and not model.classifier.weight.requires_grad


def test_the_model_contract() -> None:
    model = tiny_bert()
    assert plan(model, spec({}, model={"type": "bert", "architecture": "BertForSequenceClassification"}))
    assert plan(model, spec({}, model={"architecture": "BertPreTrainedModel"}))  # a base class will do
    findings = refused(model, spec({}, model={"type": "bart", "architecture": "BartModel"}))
    assert [f.code for f in findings] == ["DS401", "DS401"]
    assert "'bart'" in findings[0].message and "bert" in findings[0].message
    assert refused(Net(), spec({"target": "head"}, model={"type": "bert"}))[0].code == "DS401"


def test_all_findings_come_at_once_in_document_order(tmp_path: Path) -> None:
    one = tmp_path / "one.deltaspec.yaml"
    one.write_text(
        "deltaspec: 1\n"
        "model: {type: bart}\n"
        "deltas:\n"
        "  - name: a\n"
        "    method: lora\n"
        "    target: bert.encoder.layer.*.attention\n"
        "  - name: b\n"
        "    method: lora\n"
        "    target: '**.querry'\n"
        "  - name: c\n"
        "    method: lora\n"
        "    target: '**.query'\n"
        "    expect: {sites: 4}\n"
        "expect:\n"
        "  untouched: ['**.query']\n"
    )
    two = tmp_path / "two.deltaspec.json"
    two.write_text('{"deltaspec": 1, "deltas": [{"name": "c", "method": "lora", "target": "**.value"}]}')
    findings = refused(tiny_bert(), two, one)
    found = [(Path(f.file).name[:3], f.line, f.code) for f in findings]
    assert [f for f in found if f[2] != "DS302"] == [
        ("one", 2, "DS401"),
        ("one", 6, "DS402"),
        ("one", 10, "DS407"),
        ("one", 13, "DS501"),
        ("one", 15, "DS504"),
    ]
    assert len(found) == 6 and found[2][:2] == ("one", 9)


def test_a_backbone_that_cannot_be_one() -> None:
    document = spec({"target": {"type": "Linear"}})
    taken = Net()
    taken.deltaspec = nn.Linear(8, 8)  # a delta would take its place, unseen
    compiled = deltaspec.compile(Net(), document)
    scripted = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 3))
    for model, code, message in (
        (taken, "DS411", "Net has an attribute 'deltaspec' of its own"),
        (type("Named", (Net,), {"deltaspec": "1.0"})(), "DS411", "Named has an attribute"),
        (compiled, "DS431", "is compiled already"),
        (compiled.backbone, "DS431", "is compiled already"),
        (scripted, "DS311", "0 is a torch.jit.ScriptModule"),
    ):
        (finding,) = refused(model, document)
        assert finding.code == code and message in finding.message


def test_a_named_selector_that_nothing_uses_must_match_too() -> None:
    document = spec({"target": "head"}, selectors={"ups": "**.upp", "more": {"any": ["**.up", {"ref": "ups"}]}})
    (finding,) = refused(Net(), document)
    assert finding.code == "DS302" and finding.where == "selectors.ups.path"
    document["selectors"]["ups"] = {"path": "**.upp", "optional": True}
    assert plan(Net(), document)


def test_no_spec_is_a_usage_error() -> None:
    with pytest.raises(TypeError, match="no spec"):
        plan(Net())
    with pytest.raises(TypeError, match="Module, not str"):
        plan("config.json", spec({}))  # type: ignore[arg-type]


def test_names_of_several_specs_must_differ() -> None:
    one, two = spec({"name": "same", "target": "head"}), spec({"name": "same", "target": "spare"})
    assert codes(Net(), one, two) == ["DS407"]


def test_a_plan_of_a_7b_model_needs_no_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    planned = plan(model, spec({"target": "**.*_proj"}))
    assert str(planned) and planned.fingerprint
    attention, feed_forward = 4 * 8 * (4096 + 4096), 3 * 8 * (4096 + 11008)
    assert planned.trainable == 32 * (attention + feed_forward)
