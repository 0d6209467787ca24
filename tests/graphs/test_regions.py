"""Regions of graphs: each reads as the formula it was made of, and belongs to a form of site."""

from __future__ import annotations

from four_deltas import build
from models import ARCHITECTURES

import deltaspec


def test_the_region_of_a_lora_reads_as_its_formula():
    chosen = ARCHITECTURES["bert"]
    delta = {"name": "low", "method": "lora", "params": {"rank": 4, "alpha": 8}, "target": "**.query"}
    compiled = deltaspec.compile(chosen.model(), {"deltaspec": 1, "deltas": [delta]}, passes=False)
    assert list(compiled.regions) == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    region = compiled.regions["bert.encoder.layer.0.attention.self.query"]
    assert region is compiled.regions["bert.encoder.layer.1.attention.self.query"]  # graphs belong to shapes
    region.graph.lint()
    body = [line.split(";")[0].strip() for line in region.code.splitlines() if " = " in line or "return" in line]
    assert body == [
        "_own = _held._parameters",  # looked up when it runs, since others may replace what stands there
        "down = getattr(_held, down_key)",
        "input_1 = input",
        "base_1 = base(input_1)",
        "add_low_rank_ = deltaspec_graphs_passes_fuse_addition_add_low_rank_(base_1, input_1, down, up, 2.0)",
        "return add_low_rank_",
    ], region.code
    compiled.detach()
    assert dict(compiled.regions) == {}


def test_the_region_of_a_site_that_trains_in_one_step_is_given_its_host():
    delta = {"name": "low", "method": "lora", "params": {"dropout": 0.5}, "target": "**.query"}
    compiled = deltaspec.compile(ARCHITECTURES["bert"].model(), {"deltaspec": 1, "deltas": [delta]})
    code = compiled.regions["bert.encoder.layer.0.attention.self.query"].code
    assert "low_rank_site(base, host, input_1, down, up, 2.0, dropout, " in code


def test_the_symbolic_region_is_the_whole_model():
    compiled = build("traceable-symbolic")
    compiled.only("low", "wide")
    [(place, region)] = compiled.regions.items()
    assert place == ""
    region.graph.lint()
    calls = [str(node.target) for node in region.graph.nodes if node.op == "call_module"]
    assert [name for name in calls if "dropout" not in name] == ["conv", "bn", "up", "norm", "head"]
    assert "gelu" in region.code
