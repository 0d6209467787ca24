"""Adapters that AdapterHub saved come in with the logits that it computed, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from written_elsewhere import FIXTURES, base_of, copied, difference

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

EXACT = (
    "seq_bn_bert", "double_seq_bn_inv_gpt2", "par_bn_mh_t5", "par_bn_bert", "adapter_plus_vit",
    "compacter_bert_sharedW", "lora_gpt2_all", "dora_bert", "dora_t5", "dvora_bert", "ia3_gpt2", "prefix_gpt2",
    "loreft_bert", "legacy100_lora_bert", "lora_gating_bert", "stack_double_gpt2", "stack_bert", "head_static_bert",
    "union_lora_seqbn_gpt2",
)  # fmt: skip
REFUSED = {
    "noreft_gpt2": ("DS539", "subtract_projection"),
    "lossy_compacter_t5": ("DS538", "shared_parameters"),
    "average_block_bert": ("DS549", "Average"),
    "prompt_bert": ("DS549", "prompt tuning"),
    "bn_bert_ln_before": ("DS549", "twice"),
    "prefix_t5": ("DS549", "relative positions"),
}


@pytest.mark.parametrize("case", EXACT)
def test_logits(case: str) -> None:
    assert difference("adapterhub", case) < 5e-5


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    code, said = REFUSED[case]
    with pytest.raises(DeltaSpecError, match=said) as caught:
        deltaspec.restore(base_of("adapterhub", case), FIXTURES / "adapterhub" / case / "adapter")
    assert {finding.code for finding in caught.value.diagnostics} == {code}


def test_a_head_in_a_file_of_its_own_in_a_library(tmp_path: Path) -> None:
    folder = copied("adapterhub", "head_static_bert", tmp_path)
    for pickled, name in (("pytorch_adapter.bin", "adapter"), ("pytorch_model_head.bin", "model_head")):
        save_file({k: v.contiguous() for k, v in torch.load(folder / pickled).items()}, folder / f"{name}.safetensors")
        (folder / pickled).unlink()
    base = base_of("adapterhub", "head_static_bert")
    whole = deltaspec.restore(base, folder)
    compiled = deltaspec.compile(base, {"deltaspec": 1, "deltas": [{"name": "own", "method": "bitfit"}]})
    library = compiled.library(folder)
    compiled.only(*library.names)
    ids = torch.tensor([[5, 9, 11, 30]])
    assert torch.equal(compiled(input_ids=ids).logits, whole(input_ids=ids).logits)
