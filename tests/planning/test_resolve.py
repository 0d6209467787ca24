from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import deltaspec
from deltaspec.deltas.initial import build_delta
from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan

QV = ["**.query", "**.value"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks, a head that is used and one that is not."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head, self.spare = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


STRUCTURE = "sha256:3fefde8dfdc34e6f95021301046235ce8e97031571190d3d49ca1a73bbdd01cc"
FINGERPRINT = "sha256:11cf1f88f37bc581c1f4bab3a286272e09884bec048fc1c0ccb7c281ed529702"
GOLDEN = """\
Plan for Net (1,190 parameters)

ups: lora rank=4 alpha=16 dropout=0.1 scaling=rslora
  4 sites, 560 trainable parameters, 47.06 % of the base  (net.deltaspec.yaml:3)
    blocks.{0..1}.up
      2 × down [4, 8], up [32, 4] = 320
    blocks.0.down
      1 × down [4, 32], up [8, 4] = 160
    blocks.1.down
      1 × down [2, 32], up [8, 2] = 80; override: rank=2
  ✓ 4 sites, expected 4

head: full  (starts detached)
  1 site, 27 trainable parameters, 2.27 % of the base  (net.deltaspec.yaml:9)
    head
      1 × weight [3, 8], bias [3] = 27

Total: 2 deltas, 5 sites, 587 trainable parameters, 49.33 % of the base
  ✓ 587 trainable parameters are 49.33 % of the base's 1,190, expected at most 60 % (714)
  ✓ untouched: blocks.{0..1}.norm

Fingerprint: sha256:9856d4b70367e58475258eadc3c8989030a7ab1a24754b0054182258f28d53ba"""

INPUT = torch.zeros(2, 5, 8)


def spec(*deltas: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"deltaspec": 1, "deltas": [{"name": f"d{i}", "method": "lora"} | d for i, d in enumerate(deltas)], **rest}


def refused(model: nn.Module, *specs: Any, example_inputs: Any = None) -> list[Diagnostic]:
    with pytest.raises(DeltaSpecError) as caught:
        plan(model, *specs, example_inputs=example_inputs)
    findings = list(caught.value.diagnostics)
    assert all(finding.code in CODES or finding.code[:3] == "DS3" for finding in findings)
    return findings


def codes(model: nn.Module, *specs: Any, example_inputs: Any = None) -> list[str]:
    return [finding.code for finding in refused(model, *specs, example_inputs=example_inputs)]


def roberta(**sizes: Any) -> RobertaModel:
    base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    with torch.device("meta"):
        return RobertaModel(RobertaConfig(**(base | sizes)))


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=4
    )
    return BertForSequenceClassification(config)


# Counts


def test_lora_on_roberta_base_has_the_count_of_the_paper() -> None:
    # arXiv:2106.09685, table 2: 0.3M trainable parameters. 12 layers x 2 matrices x rank 8 x (768 + 768).
    model = roberta()
    planned = plan(model, spec({"target": QV}))
    assert planned.trainable == 12 * 2 * 8 * (768 + 768) == 294_912
    assert len(planned.sites) == 24
    assert planned.base_parameters == sum(p.numel() for p in model.parameters())
    assert planned.fraction == 294_912 / planned.base_parameters
    assert planned.model_class == "RobertaModel" and planned.model_type == "roberta"


def test_default_roles_stand_in_for_a_target() -> None:
    named = plan(roberta(), spec({"target": QV}))
    default = plan(roberta(), spec({}))
    assert [s.fqn for s in default.sites] == [s.fqn for s in named.sites]
    assert default == named


def test_default_roles_of_a_fused_projection() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    planned = plan(model, spec({}))
    assert [s.fqn for s in planned.sites] == [f"transformer.h.{i}.attn.c_attn" for i in range(12)]
    assert planned.trainable == 12 * 8 * (768 + 3 * 768)


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


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_choice_of_linears_has_the_count_of_the_formula(data: st.DataObject) -> None:
    model = Net(width=data.draw(st.sampled_from([4, 6, 8])), layers=data.draw(st.integers(1, 5)))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = data.draw(st.lists(st.sampled_from(sorted(linears)), min_size=1, unique=True))
    rank = data.draw(st.integers(1, 16))
    planned = plan(model, spec({"target": chosen, "params": {"rank": rank}}))
    assert planned.trainable == sum(rank * (linears[n].in_features + linears[n].out_features) for n in chosen)
    assert [s.fqn for s in planned.sites] == [n for n in linears if n in chosen]  # the model's order, not the spec's


def test_meta_and_real_weights_of_any_dtype_give_the_same_plan() -> None:
    document = spec({"target": QV}, {"method": "adapter", "target": "bert.encoder.layer.*"})
    model = tiny_bert()
    real = plan(model, document)
    assert plan(copy.deepcopy(model).to("meta"), document).fingerprint == real.fingerprint
    assert plan(model.half(), document).fingerprint == real.fingerprint


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


# Which sites


def test_a_module_under_two_names_is_one_site() -> None:
    model = Net()
    model.same = model.head
    assert [s.fqn for s in plan(model, spec({"target": ["head", "same"]})).sites] == ["head"]
    assert [s.fqn for s in plan(model, spec({"target": "same"})).sites] == ["head"]


def test_a_site_selected_twice_is_one_site() -> None:
    planned = plan(Net(), spec({"target": {"any": ["head", {"type": "Linear"}]}}))
    assert len(planned.sites) == len({s.fqn for s in planned.sites}) == 6


def test_full_on_a_container_takes_every_module_with_parameters_below() -> None:
    planned = plan(Net(), spec({"method": "full", "target": "blocks.1"}))
    assert [s.fqn for s in planned.sites] == ["blocks.1.up", "blocks.1.down", "blocks.1.norm"]
    assert planned.trainable == sum(p.numel() for p in Net().blocks[1].parameters())


def test_full_on_a_module_and_on_its_own_parameter_takes_it_once() -> None:
    target = {"any": ["head", {"path": "head", "parameter": "bias"}, {"path": "spare", "parameter": "bias"}]}
    planned = plan(Net(), spec({"method": "full", "target": target}))
    assert [s.fqn for s in planned.sites] == ["head", "spare.bias"]
    assert planned.trainable == 8 * 3 + 3 + 3


def test_a_module_that_no_forward_reaches_is_an_error() -> None:
    document = spec({"target": ["head", "spare"]})
    (finding,) = refused(Net(), document, example_inputs=INPUT)
    assert finding.code == "DS403" and "1 site: spare" in finding.message
    planned = plan(Net(), document)
    assert "not proven" in planned.notes[0] and "example_inputs" in str(planned)


def test_a_bypassed_module_takes_what_works_on_the_weight_only() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.attention(x, x, x)[0]

    planned = plan(Attention(), spec({"target": "**.out_proj"}), example_inputs=INPUT)
    assert planned.sites[0].site.host == "attention"
    assert "through the weight" in str(planned)
    document = spec({"method": "adapter", "target": "**.out_proj"})
    (finding,) = refused(Attention(), document, example_inputs=INPUT)
    assert finding.code == "DS404" and "attention reads" in finding.message and "lora" in str(finding.suggestion)


def test_widths_of_blocks_come_from_the_forward() -> None:
    document = spec({"method": "adapter", "params": {"width": 4}, "target": "blocks.*"})
    planned = plan(Net(), document, example_inputs=INPUT)
    assert planned.trainable == 2 * (4 * 8 + 4 + 8 * 4 + 8)
    (finding,) = refused(Net(), document)
    assert finding.code == "DS402" and "example_inputs" in str(finding.suggestion)


# Tied parameters


def tied_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def test_an_additive_delta_on_a_tied_module_says_what_it_leaves() -> None:
    planned = plan(tied_gpt2(), spec({"target": "lm_head"}))
    assert planned["d0"].notes == ("lm_head.weight is tied to transformer.wte.weight; the delta changes lm_head only",)


def test_full_on_a_tied_parameter_must_say_what_is_meant() -> None:
    assert codes(tied_gpt2(), spec({"method": "full", "target": "lm_head"})) == ["DS402"]


def test_full_together_trains_one_tensor_at_all_places() -> None:
    document = spec({"method": "full", "params": {"tied": "together"}, "target": "lm_head"})
    planned = plan(tied_gpt2(), document)
    assert {s.fqn for s in planned.sites} == {"lm_head", "transformer.wte.weight"}
    assert planned.trainable == 20 * 8
    assert "one tensor, trained for all of them" in planned["d0"].notes[0]
    document["deltas"][0]["params"] = {"tied": "alone"}
    assert {s.fqn for s in plan(tied_gpt2(), document).sites} == {"lm_head"}


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def test_an_embedding_that_is_only_a_holder_points_to_the_one_that_runs() -> None:
    # T5's forward calls encoder.embed_tokens; `shared` holds the same weight and is never called.
    (finding,) = refused(tiny_t5(), spec({"target": "shared"}))
    assert finding.code == "DS403" and "select that one" in str(finding.suggestion)
    assert plan(tiny_t5(), spec({"target": "encoder.embed_tokens"})).trainable == 8 * (20 + 8)


def test_full_together_takes_holders_that_no_forward_calls() -> None:
    for target in ("shared", "encoder.embed_tokens"):
        planned = plan(tiny_t5(), spec({"method": "full", "params": {"tied": "together"}, "target": target}))
        assert {s.site.row.fqn for s in planned.sites} >= {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}
        assert planned.trainable == 20 * 8


# Overrides


def test_the_first_override_that_matches_wins() -> None:
    overrides = [
        {"match": "blocks.1.up", "params": {"rank": 2}},
        {"match": "**.up", "params": {"rank": 4, "alpha": 32.0}},
    ]
    target = {"path": "blocks.**", "type": "Linear"}
    planned = plan(Net(), spec({"target": target, "params": {"rank": 1}, "overrides": overrides}))
    assert {s.fqn: (s.params.rank, s.params.alpha, s.override) for s in planned.sites} == {
        "blocks.0.up": (4, 32.0, 1),
        "blocks.0.down": (1, 16.0, None),
        "blocks.1.up": (2, 16.0, 0),
        "blocks.1.down": (1, 16.0, None),
    }
    assert planned.trainable == (4 + 1 + 2 + 1) * (8 + 32)
    assert "override: rank=4 alpha=32" in str(planned)


def test_an_override_that_matches_no_site_is_an_error() -> None:
    document = spec({"target": "**.up", "overrides": [{"match": "head", "params": {"rank": 2}}]})
    (finding,) = refused(Net(), document)
    assert finding.code == "DS405" and "which has 2 sites" in finding.message
    document["deltas"][0]["overrides"][0]["match"] = {"path": "head", "optional": True}
    assert plan(Net(), document)


def test_an_override_in_the_shadow_of_another_is_an_error() -> None:
    overrides = [{"match": "**.up", "params": {"rank": 2}}, {"match": "blocks.1.up", "params": {"rank": 4}}]
    (finding,) = refused(Net(), spec({"target": "**.up", "overrides": overrides}))
    assert finding.code == "DS405" and "override 2" in finding.message and "earlier" in str(finding.suggestion)


# Refusals and findings


def test_a_refusal_is_one_finding_and_not_one_a_layer() -> None:
    (finding,) = refused(roberta(), spec({"target": "encoder.layer.*.attention"}))
    assert finding.code == "DS402"
    assert "12 sites: encoder.layer.{0..11}.attention" in finding.message and "adapter" in str(finding.suggestion)


def test_no_default_role_is_an_error() -> None:
    (finding,) = refused(Net(), spec({}))
    assert finding.code == "DS350" and finding.suggestion is not None


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


def test_a_width_that_no_forward_could_tell_says_why() -> None:
    document = spec({"method": "reft", "target": "blocks.0"})
    (finding,) = refused(Net(), document, example_inputs=torch.zeros(2, 3))
    assert finding.code == "DS402" and "no forward could be run here: RuntimeError" in str(finding.suggestion)
    (finding,) = refused(Net(), document)
    assert str(finding.suggestion).endswith("no forward could be run here: no example inputs")


def test_no_spec_is_a_usage_error() -> None:
    with pytest.raises(TypeError, match="no spec"):
        plan(Net())
    with pytest.raises(TypeError, match="Module, not str"):
        plan("config.json", spec({}))  # type: ignore[arg-type]


# Deltas that meet


def test_a_trained_copy_comes_first_on_its_site() -> None:
    lora, full = {"target": "head"}, {"method": "full", "target": "head"}
    assert len(plan(Net(), spec(full, lora)).sites) == 2
    (finding,) = refused(Net(), spec(lora, full))
    assert finding.code == "DS406" and "before 'd0'" in str(finding.suggestion)


def test_two_trained_copies_of_one_part_can_only_take_turns() -> None:
    full = {"method": "full", "target": "head"}
    assert codes(Net(), spec(full, full)) == ["DS406"]
    assert len(plan(Net(), spec(full, full | {"attached": False})).sites) == 2
    halves = [full | {"target": {"path": "head", "parameter": p}} for p in ("weight", "bias")]
    assert plan(Net(), spec(*halves)).trainable == 8 * 3 + 3


def test_names_of_several_specs_must_differ() -> None:
    one, two = spec({"name": "same", "target": "head"}), spec({"name": "same", "target": "spare"})
    assert codes(Net(), one, two) == ["DS407"]


def test_a_part_is_the_plan_of_its_spec_alone() -> None:
    one, two = (
        spec({"target": "head"}, seed=1),
        spec({"name": "b", "target": "spare"}, {"name": "c", "target": "**.up"}),
    )
    both = plan(Net(), one, two)
    assert [d.name for d in both.deltas] == ["d0", "b", "c"] and both["d0"].seed == 1 and both["c"].seed == 0
    assert both.parts() == (plan(Net(), one), plan(Net(), two))
    assert both.trainable == sum(part.trainable for part in both.parts())


# Expectations


@pytest.mark.parametrize(
    ("expect", "code"),
    [
        ({"sites": 2}, None),
        ({"sites": 3}, "DS501"),
        ({"sites": {"min": 3}}, "DS501"),
        ({"sites": {"max": 1}}, "DS501"),
        ({"sites": {"min": 1, "max": 2}, "trainable": 640}, None),
        ({"trainable": {"max": 639}}, "DS502"),
        ({"trainable": {"min": 641}}, "DS502"),
    ],
)
def test_expectations_of_a_delta(expect: dict[str, Any], code: str | None) -> None:
    document = spec({"target": "**.up", "expect": expect})  # 2 sites, each 8 * (8 + 32)
    if code is None:
        assert len(plan(Net(), document)["d0"].checks) == len(expect)
    else:
        (finding,) = refused(Net(), document)
        assert finding.code == code
        assert ("2 sites" if code == "DS501" else "640") in finding.message and finding.suggestion


def test_expectations_of_a_spec() -> None:
    model = Net()
    share = 640 / sum(p.numel() for p in model.parameters())
    up = {"target": "**.up"}
    assert plan(model, spec(up, expect={"trainable": {"max_fraction": share}})).checks
    assert codes(model, spec(up, expect={"trainable": {"max_fraction": share * 0.999}})) == ["DS503"]
    assert codes(model, spec(up, expect={"trainable": 641})) == ["DS503"]
    assert plan(model, spec(up, expect={"trainable": {"min": 640, "max": 640}})).checks
    assert plan(model, spec(up, expect={"untouched": ["head", "blocks.*.norm"]})).checks
    for untouched in ("blocks.1", "blocks", {"path": "blocks.0.up", "parameter": "weight"}):
        assert codes(model, spec(up, expect={"untouched": [untouched]})) == ["DS504"]


def test_untouched_parameters_of_a_module_that_is_touched_elsewhere() -> None:
    weight = {"method": "full", "target": {"path": "head", "parameter": "weight"}}
    for parameter, ok in (("bias", True), ("weight", False)):
        document = spec(weight, expect={"untouched": [{"path": "head", "parameter": parameter}]})
        assert bool(plan(Net(), document)) if ok else codes(Net(), document) == ["DS504"]


# Identity and print


def test_a_fingerprint_holds_what_decides_and_nothing_else() -> None:
    def print_of(*deltas: dict[str, Any], width: int = 8, **rest: Any) -> str:
        return plan(Net(width), spec(*deltas, **rest)).fingerprint

    up, head = {"target": "**.up"}, {"name": "h", "target": "head"}
    usual = print_of(up, head)
    assert usual == print_of(up | {"expect": {"sites": 2}}, head, expect={"untouched": ["spare"]})
    assert usual == print_of(up | {"target": {"regex": r"blocks\.\d\.up"}, "params": {"rank": 8}}, head)
    others = [
        print_of(head, up | {"name": "d0"}),
        print_of(up | {"attached": False}, head),
        print_of(up | {"params": {"dropout": 0.1}}, head),
        print_of(up | {"params": {"init": "normal"}}, head),
        print_of(up | {"name": "other"}, head),
        print_of(up, head, seed=1),
        print_of(up, head, width=16),
        print_of(up),
    ]
    assert len({usual, *others}) == 1 + len(others)


def test_a_fingerprint_is_the_same_everywhere() -> None:
    planned = plan(Net(), spec({"target": "**.up"}))
    assert planned.structure == STRUCTURE
    assert planned.fingerprint == FINGERPRINT


def test_plans_are_values() -> None:
    one, same, other = (plan(Net(), spec({"target": t})) for t in ("head", "head", "spare"))
    assert one == same and hash(one) == hash(same) and one != other and len({one, same, other}) == 2
    with pytest.raises(AttributeError):
        one.deltas = ()  # type: ignore[misc]
    with pytest.raises(KeyError, match="d0"):
        one["nothing"]
    assert isinstance(copy.deepcopy(one), Plan) and copy.deepcopy(one) == one


def test_it_prints_like_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.deltaspec.yaml").write_text(
        "deltaspec: 1\n"
        "deltas:\n"
        "  - name: ups\n"
        "    method: lora\n"
        "    params: {rank: 4, dropout: 0.1, scaling: rslora}\n"
        "    target: ['**.up', '**.down']\n"
        "    overrides: [{match: '**.1.down', params: {rank: 2}}]\n"
        "    expect: {sites: 4}\n"
        "  - {name: head, method: full, target: head, attached: false}\n"
        "expect:\n"
        "  trainable: {max_fraction: 0.6}\n"
        "  untouched: ['**.norm']\n"
    )
    planned = plan(Net(), "net.deltaspec.yaml", example_inputs=INPUT)
    assert str(planned) == GOLDEN
    assert planned.__rich__().plain == GOLDEN
    assert max(len(line) for line in str(planned).splitlines()) <= 100


def test_an_optional_target_that_matches_nothing_is_an_empty_delta() -> None:
    planned = plan(Net(), spec({"target": {"path": "**.fc9", "optional": True}}))
    assert planned.sites == () and planned.trainable == 0 and planned.fraction == 0
    assert "this delta is empty" in str(planned)


def test_lines_are_never_wider_than_100_columns_however_long_the_names() -> None:
    model = nn.Module()
    inner = model
    for number in range(12):
        inner.add_module(f"a_rather_long_name_of_a_module_{number}", nn.Module() if number < 11 else nn.Linear(2, 2))
        inner = inner.get_submodule(f"a_rather_long_name_of_a_module_{number}")
    text = str(plan(model, spec({"target": {"type": "Linear"}})))
    assert max(len(line) for line in text.splitlines()) <= 100


def test_data_is_json_and_says_the_same() -> None:
    import json

    planned = plan(Net(), spec({"target": "**.up"}, {"method": "full", "target": "head"}))
    data = json.loads(json.dumps(planned.to_dict()))
    assert data["trainable"] == planned.trainable and data["sites"] == 3
    assert data["deltas"][0]["groups"][0]["at"] == ["blocks.{0..1}.up"]
    assert data["deltas"][0]["groups"][0]["tensors"] == {"down": [8, 8], "up": [32, 8]}


def test_a_plan_of_a_7b_model_takes_less_than_two_seconds() -> None:
    start = time.process_time()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    planned = plan(model, spec({"target": "**.*_proj"}))
    assert str(planned) and planned.fingerprint
    assert time.process_time() - start < 2
    attention, feed_forward = 4 * 8 * (4096 + 4096), 3 * 8 * (4096 + 11008)
    assert planned.trainable == 32 * (attention + feed_forward)
