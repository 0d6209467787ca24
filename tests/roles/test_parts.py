"""Parts of fused projections: their layout per architecture, and methods that change one part alone."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.tabulate import tabulate
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.roles.parts import Parts, resolve
from deltaspec.testing import check_method

IDS = torch.tensor([[5, 3, 9, 17, 4, 8], [1, 2, 30, 4, 22, 6]])
SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attn_implementation="eager"
)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")
    )


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, intermediate_size=48))


def phi3() -> nn.Module:
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=48, pad_token_id=0)
    return transformers.Phi3ForCausalLM(config)


def bloom() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4, attn_implementation="eager")
    return transformers.BloomForCausalLM(config)


def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(**SIZES, intermediate_size=48, pad_token_id=0)
    return transformers.ModernBertForMaskedLM(config)


def falcon(**layout: Any) -> Any:
    return lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES, **layout))


def gpt2_cross() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config)


FUSED: dict[str, Any] = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "phi3": phi3,
    "bloom": bloom,
    "modernbert": modernbert,
    "falcon": falcon(new_decoder_architecture=False, multi_query=False),
    "falcon multi-query": falcon(new_decoder_architecture=False, multi_query=True),
    "falcon grouped": falcon(new_decoder_architecture=True, num_kv_heads=2),
    "gpt2 cross": gpt2_cross,
}
"""A model for every layout of every role map with `parts`: a new one needs a line here, and nothing else in this file.

What its parts are is then seen in the model's own code (see `observed`)."""
MAPS = [
    (data["model_type"], data.get("aliases", []), data["parts"])
    for file in sorted(files("deltaspec.roles").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".json") and "parts" in (data := json.loads(file.read_text(encoding="utf-8")))
]
ROLES = [
    (name, role)
    for name in FUSED
    for model_type, _, parts in MAPS
    if name.startswith(model_type)
    for role in parts
    if ("cross" in name) == ("cross" in role)
]


def observed(model: nn.Module, role: str, fqn: str) -> list[str]:
    """Name the part that each output row of a fused projection feeds, by what a change of it does in the model.

    One sequence of a batch for each row: there, the row is changed at one position. Of attention, q then moves the
    attention weights of that position alone, k also those of later ones, and v none. Of a gated feed-forward, what
    leaves follows up in proportion, and gate by the activation function.
    """
    module = model.get_submodule(fqn)
    width = next(row.out_features for row in tabulate(model).rows if row.fqn == fqn)
    at, found = 2, {}
    given: dict[str, Any] = {"input_ids": IDS[:1].repeat(width, 1)}
    if role == "cross_attn.kv":
        given["encoder_hidden_states"] = torch.randn(1, 6, 32).repeat(width, 1, 1)
    down = next((row.fqn for row in tabulate(model).rows if "mlp.down" in row.roles), None)

    def run(size: float) -> Tensor:
        def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[:, at] += size * torch.eye(width) + 0.5 * (role == "mlp.gate_up")  # where activations bend
            return changed

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found["inner"] = inputs[0]

        handles = [module.register_forward_hook(change)]
        if role == "mlp.gate_up":
            handles.append(model.get_submodule(down).register_forward_pre_hook(see))
            model(**given)
        else:
            output = model(**given, output_attentions=True)
            found["inner"] = (output.cross_attentions if role == "cross_attn.kv" else output.attentions)[0]
        for handle in handles:
            handle.remove()
        return found["inner"]

    plain, once, twice = run(0.0), run(0.5), run(1.0)
    moved = (once - plain).abs()
    if role == "mlp.gate_up":
        bent = (twice - plain - 2 * (once - plain)).abs().flatten(1).amax(1)
        assert moved.flatten(1).amax(1).min() > 0.05
        return ["gate" if one > 1e-3 else "up" for one in bent.tolist()]
    if role == "cross_attn.kv":
        return ["k" if one > 1e-6 else "v" for one in moved.flatten(1).amax(1).tolist()]
    queries = moved.amax((1, 3))  # [row, position of the query]
    later, here = queries[:, at + 1 :].amax(1).tolist(), queries[:, at].tolist()
    return ["k" if after > 1e-6 else "q" if now > 1e-6 else "v" for after, now in zip(later, here, strict=True)]


def rows_of(name: str, part: str) -> list[int]:
    """Return the output rows of a part of the first fused attention projection, as the model's own code has them."""
    return [row for row, seen in enumerate(attention_rows(name)) if seen == part]


@cache
def attention_rows(name: str) -> list[str]:
    model = made(name)
    fqn = next(row.fqn for row in tabulate(model).rows if "attn.qkv" in row.roles)
    return observed(model, "attn.qkv", fqn)


def claimed(parts: Parts) -> list[str]:
    """Name the part of each output row, as a role map says."""
    return [name for name, width in parts.widths for _ in range(width)] * parts.repeats


def test_every_layout_of_every_map_has_a_model_here():
    configs = [FUSED[name]().config for name in FUSED]
    for model_type, aliases, parts in MAPS:
        for known in (model_type, *aliases):
            own = [config for config in configs if config.model_type == known]
            assert own, f"add a line for {known} to FUSED in {__file__}"
            for role, layouts in parts.items():
                for layout in layouts if isinstance(layouts, list) else [layouts]:
                    wanted = layout.get("when", {}).items()
                    fitting = [config for config in own if all(getattr(config, n) == value for n, value in wanted)]
                    assert fitting, f"{role} of {known}: no model in FUSED has {dict(wanted)}"


@pytest.mark.parametrize(("name", "role"), ROLES)
def test_the_parts_of_a_map_are_what_the_models_own_code_makes_of_them(name, role):
    model = made(name)
    fused = [row for row in tabulate(model).rows if role in row.roles]
    assert fused and all(row.parts is not None for row in fused)
    assert len({row.parts for row in fused}) == 1
    assert claimed(fused[0].parts) == observed(model, role, fused[0].fqn)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FUSED[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.05)
    return model


def spec(method: str, **params: Any) -> dict[str, Any]:
    return {"deltaspec": 1, "deltas": [
        {"name": "d", "method": method, "params": params, "target": {"role": "attn.qkv"}}
    ]}  # fmt: skip


def compiled(model: nn.Module, method: str, **params: Any) -> deltaspec.CompiledModel:
    c = deltaspec.compile(model, spec(method, **params))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in c.deltas["d"].parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return c


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


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


def test_keys_and_values_of_cross_attention():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    with torch.device("meta"):
        model = transformers.GPT2Model(config)
    rows = {row.fqn: row.parts for row in tabulate(model).rows}
    assert rows["h.0.crossattention.c_attn"] == Parts(1, (("k", 32), ("v", 32)))
    assert rows["h.0.attn.c_attn"] == Parts(1, (("q", 32), ("k", 32), ("v", 32)))
    assert rows["h.0.attn.c_proj"] is None


def test_the_part_of_a_composite_has_its_own_config():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(num_hidden_layers=1), transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4)
    )
    with torch.device("meta"):
        rows = {row.fqn: row.parts for row in tabulate(transformers.EncoderDecoderModel(config)).rows}
    assert rows["decoder.transformer.h.0.attn.c_attn"].rows("q") == 32


def test_lora_on_q_and_v_of_gpt3_has_the_published_count():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=12288, n_layer=96, n_head=96))
    entry = {"name": "d", "method": "lora", "params": {"rank": 1, "parts": ["q", "v"]}}
    assert deltaspec.plan(model, {"deltaspec": 1, "deltas": [entry]}).trainable == 4_718_592  # 4.7M: table 4 there


def test_layouts():
    class Config:
        heads, keys, odd = 4, 2, "?"

    layout = {"widths": {"q": "heads", "k": "keys", "v": "keys"}}
    assert resolve((layout,), Config(), 64) == Parts(1, (("q", 32), ("k", 16), ("v", 16)))
    assert resolve((layout,), {"heads": 2, "keys": 1}, 64).names == ("q", "k", "v")
    assert resolve((layout,), Config(), 65) is None and resolve((layout,), None, 64) is None
    assert resolve(({"widths": {"q": "odd", "k": 1}},), Config(), 64) is None
    assert resolve(({"repeat": 3, "widths": {"k": 1, "v": 1}},), Config(), 64) is None
    chosen = ({"when": {"keys": 1}, "widths": {"k": 1}}, {"when": {"keys": 2}, "repeat": "keys", "widths": {"v": 1}})
    assert resolve(chosen, Config(), 64) == Parts(2, (("v", 32),)) and resolve(chosen[:1], Config(), 64) is None


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
