"""What a plan says of default targets on models with cross-attention, beside what PEFT means by its own."""

from __future__ import annotations

from typing import Any

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT
from prompt_models import bart, build, gpt2, t5

import deltaspec


def plan(make: Any, **delta: Any) -> Any:
    return deltaspec.plan(build(make), {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", **delta}]})


@pytest.mark.parametrize(("make", "names"), [(t5, PEFT["t5"]), (bart, PEFT["bart"])])
def test_the_plan_says_what_a_default_leaves_out(make: Any, names: list[str]) -> None:
    ours = plan(make)
    theirs = {row.fqn for row in ours.table.rows if row.fqn.rpartition(".")[2] in names}
    assert {site.fqn for site in ours.sites} < theirs
    assert "leaves cross-attention out, which PEFT's takes in" in str(ours)
    (note,) = ours["d"].notes
    roles = note.partition("role: [")[2].rstrip("]}").split(", ")
    assert {site.fqn for site in plan(make, target={"role": roles}).sites} == theirs
    assert not plan(make, target={"role": roles})["d"].notes


def test_nothing_is_said_where_nothing_is_left_out() -> None:
    assert not plan(gpt2)["d"].notes
    assert not plan(t5, method="ia3")["d"].notes
