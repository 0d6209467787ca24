"""The plan written out: as text, to the letter, and as data."""

from __future__ import annotations

from pathlib import Path

import pytest
from nets import INPUT, Net, spec
from torch import nn

from deltaspec.planning.resolve import plan

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

Passes in training: recompute 4 sites, rematerialise up to 4 inputs
Fingerprint: sha256:f406b86681c51920033fae9b06dd645e13224072fd4b1a41797f5f0e5e09f096"""


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
