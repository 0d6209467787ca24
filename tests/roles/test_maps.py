"""Role maps against models built from their configurations: exactly which module has which role, head by head."""

import json
from importlib.resources import files

import pytest
import torch
import transformers
from role_cases import BERT_SIZES, CASES, GPT2_SIZES, LLAMA_SIZES, VISION_SIZES

from deltaspec.backbone.tabulate import tabulate
from deltaspec.roles.maps import architectures, fused_parts, fused_role, role_map
from deltaspec.roles.vocabulary import ROLES

RUNS = [
    pytest.param(kind, sizes, stacks, outside, name, *where, id=f"{name}-{number}")
    for number, (kind, sizes, stacks, outside, classes) in enumerate(CASES)
    for name, where in classes.items()
]


def build(kind, sizes, name):
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    with torch.device("meta"):
        return getattr(transformers, name)(config)


@pytest.mark.parametrize(("kind", "sizes", "stacks", "outside", "name", "prefix", "heads"), RUNS)
def test_every_module_has_exactly_its_roles(kind, sizes, stacks, outside, name, prefix, heads):
    table = tabulate(build(kind, sizes, name))
    prefix = f"{prefix}." if prefix else ""
    expected = {f"{prefix}{path}": roles for path, roles in outside.items()} | {head: {"head"} for head in heads}
    identities = {row.fqn for row in table.rows if row.type == "Identity"}
    count = 1 if kind == "albert" else 2
    for stack, roles_within in stacks.items():
        for index in range(count):
            at = f"{prefix}{stack}.{index}"
            expected[at] = {"block"}
            expected |= {f"{at}.{path}": r for path, r in roles_within.items() if f"{at}.{path}" not in identities}
    assert {row.fqn: set(row.roles) for row in table.rows if row.roles} == expected
    assert table.role_maps and table.model_type == kind
    # The same data says which stacks there are, and which layer each row lies in.
    assert {row.stack for row in table.rows if row.stack} == {f"{prefix}{stack}" for stack in stacks}
    for row in table.rows:
        if row.stack is not None:
            assert row.fqn.startswith(f"{row.stack}.{row.layer}")


def test_every_architecture_is_tested():
    tested = {role_map(kind).model_type for kind, *_ in CASES} | {"gemma3", "clip", "siglip"}
    assert tested == set(architectures())


PROMISED = (
    "bert roberta distilbert deberta-v2 gpt2 gpt_neox opt llama mistral qwen2 qwen3 gemma3 phi3 t5 bart vit whisper"
)


@pytest.mark.parametrize("kind", PROMISED.split())
def test_promised_architectures_have_a_file(kind):
    assert (files("deltaspec.roles") / f"{kind}.json").is_file()


def test_data_files_hold_what_they_are_named_after():
    for file in files("deltaspec.roles").iterdir():
        if file.name.endswith(".json"):
            data = json.loads(file.read_text())
            assert set(data) <= {"model_type", "aliases", "roles", "parts"}
            assert f"{data['model_type']}.json" == file.name
            assert set(data["roles"]) <= set(ROLES)
            assert all(globs for globs in data["roles"].values())


def test_projections_are_what_they_are_called():
    """Widths tell q, k and v of grouped attention apart, up from down, and a fused projection from a single one."""
    sizes = dict(LLAMA_SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=2)
    rows = {role: row for row in tabulate(build("llama", sizes, "LlamaModel")).rows for role in row.roles}
    shapes = {role: (row.in_features, row.out_features) for role, row in rows.items()}
    assert shapes["attn.q"] == shapes["attn.o"] == (8, 8) and shapes["attn.k"] == shapes["attn.v"] == (8, 2)
    assert shapes["mlp.up"] == shapes["mlp.gate"] == (8, 16) and shapes["mlp.down"] == (16, 8)
    gpt2 = {role: row for row in tabulate(build("gpt2", GPT2_SIZES, "GPT2Model")).rows for role in row.roles}
    assert (gpt2["attn.qkv"].in_features, gpt2["attn.qkv"].out_features, gpt2["attn.qkv"].kind) == (8, 24, "conv1d")


def test_composites_use_the_map_of_each_part():
    text, vision = dict(LLAMA_SIZES), dict(VISION_SIZES)
    table = tabulate(build("gemma3", dict(text_config=text, vision_config=vision), "Gemma3ForConditionalGeneration"))
    assert table.model_type == "gemma3" and table.role_maps == ("gemma3", "siglip")
    rows = {row.fqn: row for row in table.rows}
    assert rows["model.language_model.layers.1.self_attn.q_proj"].roles == ("attn.q",)
    assert rows["model.vision_tower.encoder.layers.1.self_attn.out_proj"].roles == ("attn.o",)
    assert rows["model.multi_modal_projector.mm_soft_emb_norm"].roles == ()
    assert rows["lm_head"].roles == ("head",)
    clip = tabulate(build("clip", dict(text_config=dict(BERT_SIZES), vision_config=vision), "CLIPModel"))
    assert [r.fqn for r in clip.rows if "head" in r.roles] == ["visual_projection", "text_projection"]
    assert sum("attn.q" in r.roles for r in clip.rows) == 4


def test_an_encoder_decoder_of_two_architectures():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**BERT_SIZES), transformers.GPT2Config(**GPT2_SIZES)
    )
    with torch.device("meta"):
        table = tabulate(transformers.EncoderDecoderModel(config))
    roles = {row.fqn: row.roles for row in table.rows}
    assert table.role_maps == ("bert", "gpt2") and table.model_type == "encoder-decoder"
    assert roles["encoder.encoder.layer.0.attention.self.query"] == ("attn.q",)
    assert roles["decoder.transformer.h.1.attn.c_attn"] == ("attn.qkv",)
    assert roles["decoder.transformer.h.1.crossattention.c_attn"] == ("cross_attn.kv",)


def test_norms_that_some_configurations_add():
    deberta = tabulate(
        build("deberta-v2", dict(BERT_SIZES, conv_kernel_size=3, relative_attention=True), "DebertaV2Model")
    )
    assert {row.fqn for row in deberta.rows if row.kind == "norm" and "norm" not in row.roles} == set()


def test_fused_roles():
    assert fused_role("attn.q", {"attn.qkv"}) == "attn.qkv"
    assert fused_role("cross_attn.k", {"cross_attn.q", "cross_attn.kv"}) == "cross_attn.kv"
    assert fused_role("mlp.up", {"mlp.gate_up"}) == "mlp.gate_up"
    assert fused_role("attn.o", {"attn.qkv"}) is None and fused_role("attn.q", {"attn.k"}) is None
    assert fused_parts("attn.qkv") == "q, k and v" and fused_parts("mlp.gate_up") == "gate and up"


def test_roles_come_in_the_order_of_the_vocabulary_and_norm_is_implied():
    bert = role_map("bert")
    assert bert.roles_of("encoder.layer.3.output.dense") == ("mlp", "mlp.down")
    assert bert.roles_of("bert.encoder.layer.3.output.LayerNorm") == ("norm", "norm.mlp")
    assert bert.roles_of("encoder.layer.3.attention.self") == () and role_map("no-such") is None
