"""Backbones that bitsandbytes packed: exact without deltas, trained with them, the same bytes as the estimate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import deltaspec
from checks.cuda.base import Check, Skipped, ids, llama, require, spec, trained

FORMS = {"4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}


def checks() -> Iterator[Check]:
    """Yield the checks of this group."""
    for form in FORMS:
        yield Check("bitsandbytes", form, partial(_packed, form))


def _packed(form: str, device: torch.device) -> str:
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise Skipped("bitsandbytes and accelerate are not installed")
    with tempfile.TemporaryDirectory() as folder:
        llama(torch.device("cpu"), hidden=128).save_pretrained(folder)
        config = BitsAndBytesConfig(**FORMS[form])
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device})
    model, x = model.eval(), ids(device)
    with torch.no_grad():
        bare = model(input_ids=x).logits
    c = deltaspec.compile(model, spec(rank=8)).train()
    losses = trained(c, x, 10)
    require(losses[-1] < 0.95 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    c.eval().detach()
    with torch.no_grad():
        require(torch.equal(c(input_ids=x).logits, bare), "detached is not the packed original to the bit")
    kept = deltaspec.estimate(model, spec(rank=8), batch=4, length=16)
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}, detached to the bit, {kept.parameters:,} bytes"
