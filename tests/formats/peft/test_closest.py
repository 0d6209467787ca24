"""Changes of weights without an exact form, approximated by a low-rank update with its error stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from as_peft import same_in_peft, stirred
from beside_peft import reloaded
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import deltaspec

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=30)).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


SSF = {"name": "a", "method": "ssf", "target": {"role": ["attn.q", "mlp.up"]}}


@torch.no_grad()
def test_errors_are_those_of_the_best_update(bert: Any, tmp_path: Path) -> None:
    compiled = stirred(bert, SSF)
    errors = compiled.save_as("peft", tmp_path, approximate=3)
    places = [site.fqn for site in compiled.plan.sites]
    assert list(errors) == places
    merged, card = compiled.merge(), (tmp_path / "README.md").read_text()
    theirs = reloaded(bert, tmp_path)
    for fqn, error in errors.items():
        change = merged.get_submodule(fqn).weight - bert.get_submodule(fqn).weight
        sizes = torch.linalg.svdvals(change.double())
        assert error == pytest.approx(float(sizes[3:].norm() / sizes.norm()), rel=1e-3)
        found = theirs.base_model.model.get_submodule(fqn).get_delta_weight("default")
        assert float((found - change).norm() / change.norm()) == pytest.approx(error, rel=1e-3)
        assert f"`{fqn}`: {error:.2e}" in card
    shifted = merged.get_submodule(places[0]).bias
    assert torch.allclose(theirs.base_model.model.get_submodule(places[0]).base_layer.bias, shifted)


@pytest.mark.parametrize("method", ["ssf", "oft", "lokr"])
def test_a_full_rank_is_exact(bert: Any, method: str, tmp_path: Path) -> None:
    params = {"oft": {"block_size": 4}}.get(method, {})
    delta = {**SSF, "method": method, "params": params}
    low = {"name": "b", "method": "lora", "params": {"rank": 2}, "target": {"role": ["attn.q", "attn.v"]}}
    head = {"name": "h", "method": "full", "target": {"path": "classifier"}}
    compiled = stirred(bert, delta, low, head)
    compiled.only({"a": 0.5, "b": 2.0, "h": 1.0})
    same_in_peft(compiled, bert, tmp_path, logits, approximate=24)


def test_only_what_has_no_exact_form_is_approximated(bert: Any, tmp_path: Path) -> None:
    low = {"name": "b", "method": "lora", "params": {"rank": 2}, "target": {"role": ["attn.v"]}}
    compiled = stirred(bert, SSF, low)
    assert set(compiled.save_as("peft", tmp_path, approximate=2)) == {site.fqn for site in compiled.plan["a"].sites}
    assert compiled.save_as("peft", tmp_path, "b", approximate=2) == {}


def test_what_is_no_change_of_weights_stays_refused(bert: Any, tmp_path: Path) -> None:
    compiled = stirred(bert, {"name": "a", "method": "adapter", "target": {"role": "mlp"}})
    with pytest.raises(deltaspec.DeltaSpecError, match="DS560.*adapter has no form in PEFT"):
        compiled.save_as("peft", tmp_path / "out", approximate=4)
    assert not (tmp_path / "out").exists()
