"""Parts of fused projections: what a role map says of each output row is what the model's own code makes of it."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch
import transformers
from fused_models import FUSED, made, observed

from deltaspec.backbone.table import Row
from deltaspec.backbone.tabulate import tabulate
from deltaspec.roles.parts import Parts, resolve

MAPS = [
    (data["model_type"], data.get("aliases", []), data["parts"])
    for file in sorted(files("deltaspec.roles").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".json") and "parts" in (data := json.loads(file.read_text(encoding="utf-8")))
]


def claimed(parts: Parts) -> list[str]:
    """Name the part of each output row, as a role map says."""
    return [name for name, width in parts.widths for _ in range(width)] * parts.repeats


def fused_rows(name: str, role: str) -> list[Row]:
    return [row for row in tabulate(made(name)).rows if role in row.roles]


def test_every_layout_of_every_map_has_a_model_here():
    configs = {name: made(name).config for name in FUSED}
    for model_type, aliases, parts in MAPS:
        for known in (model_type, *aliases):
            own = {name: config for name, config in configs.items() if config.model_type == known}
            assert own, f"add a line for {known} to FUSED in tests/support/fused_models.py"
            for role, layouts in parts.items():
                for layout in layouts if isinstance(layouts, list) else [layouts]:
                    wanted = layout.get("when", {}).items()
                    fitting = [name for name, c in own.items() if all(getattr(c, n) == value for n, value in wanted)]
                    assert any(fused_rows(name, role) for name in fitting), (
                        f"{role} of {known}: no model in FUSED has {dict(wanted) or 'it'}"
                    )


@pytest.mark.parametrize("name", FUSED)
def test_the_parts_of_a_map_are_what_the_models_own_code_makes_of_them(name):
    model = made(name)
    known = model.config.model_type
    declared = next((parts for own, aliases, parts in MAPS if known in (own, *aliases)), {})
    roles = [role for role in declared if fused_rows(name, role)]
    assert roles, f"no role map has parts for {known}"
    for role in roles:
        fused = fused_rows(name, role)
        assert all(row.parts is not None for row in fused)
        assert len({row.parts for row in fused}) == 1
        assert claimed(fused[0].parts) == observed(model, role, fused[0].fqn), role


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
