"""The rules of the engine `peft`, beside PEFT itself: what it refuses, and what of an adapter has no effect there."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_adapters import DAMAGES, KINDS, base, damaged, write
from torch import Tensor

from deltaspec import engines

IDS = torch.tensor([[1, 5, 9, 33, 7]])


def outcomes(folder: Path) -> set[str]:
    return {finding.message.split()[0] for finding in engines.check(folder, base(), "peft")}


def logits(folder: Path) -> Tensor:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        model = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind not in ("rank 600", "alora")), "ia3", "prefix"])
def test_what_peft_wrote_it_reads(kind, tmp_path):
    folder = write(tmp_path / "adapter", kind)
    assert outcomes(folder) == set()
    with torch.no_grad():
        assert not torch.allclose(logits(folder), base()(IDS).logits, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return logits(write(tmp_path_factory.mktemp("trained")))


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_fails_or_is_not_what_was_trained(damage, trained, tmp_path):
    """Findings are due exactly where PEFT refuses the adapter, or computes something else than before the damage."""
    folder = damaged(tmp_path / "damaged", **DAMAGES[damage])
    found = outcomes(folder)
    if "rejected" in found:
        with pytest.raises(Exception):  # noqa: B017  whatever PEFT raises
            logits(folder)
    elif "ignored" in found and damage != "new key":
        assert not torch.allclose(logits(folder), trained, atol=1e-4)
    elif "wrong" not in found:
        torch.testing.assert_close(logits(folder), trained, atol=1e-6, rtol=1e-6)
