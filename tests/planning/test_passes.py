"""What the plan says of passes."""

from __future__ import annotations

from models import ARCHITECTURES

import deltaspec
from deltaspec.planning.passes import in_words
from deltaspec.planning.text import markdown


def plan(method: str = "lora", name: str = "llama", **more: object) -> deltaspec.Plan:
    delta = {"name": "a", "method": method, "target": {"type": "Linear", "not": {"role": "head"}}}
    return deltaspec.plan(ARCHITECTURES[name].model(), {"deltaspec": 1, "deltas": [delta], **more})


def test_the_regions_are_named():
    made = plan()
    words = "Passes in training: recompute 14 sites, rematerialise up to 14 inputs, feed_forward 2 activations"
    assert words in str(made).splitlines() and words in markdown(made)
    data = made.to_dict()["passes"]
    assert data["feed_forward"] == {"at": ["model.layers.{0..1}.mlp.act_fn"], "count": 2}
    assert data["recompute"]["count"] == 14 and "dropout" not in data
    assert plan(name="bert").to_dict()["passes"]["dropout"]["count"] == 8


def test_methods_without_products_of_their_own_need_none():
    assert in_words(plan("bitfit")) is None and in_words(plan("ia3")) is None
    assert plan("bitfit").to_dict()["passes"] == {}


def test_what_a_spec_leaves_out_is_not_named_and_changes_no_fingerprint():
    assert in_words(plan(passes=False)) is None
    assert in_words(plan(passes=["rematerialise"])) is None  # works on steps alone
    assert in_words(plan(passes=["recompute"])) == "Passes in training: recompute 14 sites"
    assert plan(passes=False).fingerprint == plan().fingerprint
