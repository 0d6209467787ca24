"""Variants of PEFT's LoRA that compute what a plain LoRA computes: their factors, and what only training had.

Read in `tuners/lora/variants.py` of PEFT 0.21.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deltaspec.formats.options import Options
from deltaspec.formats.peft.adapter import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

_TRAINING = {
    "velora_config": ("lora_velora_embed", "VeLoRA compresses what lora_A is given, in PEFT's backward alone"),
    "monteclora_config": ("lora_monteclora_sampler", "MonteCLoRA draws lora_A around its mean while PEFT trains it"),
}
"""Options of variants that train otherwise: what their tensors' names hold, and what PEFT does."""


def trained_otherwise(adapter: Adapter) -> None:
    """Take what variants have for training alone, and say what they do."""
    for option, (part, does) in _TRAINING.items():
        if not adapter.option(option):
            continue
        adapter.remark(f"{does}: outputs are equal, and further training here is that of plain LoRA")
        for key in [key for key in adapter.weights if part in key.split(".")]:
            adapter.take(key, "for training alone: not needed")


class BlockDiagonal:
    """Factors of BD-LoRA: one of the two has blocks on its diagonal, and keeps nothing else."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        given = adapter.options.mapping("use_bdlora") if adapter.option("use_bdlora") else {}
        options = Options(adapter, given, CONFIG)
        self._names = {
            "down": options.listed("target_modules_bd_a"),
            "up": options.listed("target_modules_bd_b"),
        }
        self._blocks = options.whole("nblocks", 1, 1)
        options.ignore("match_strict")
        options.finish("BD-LoRA")

    def whole(self, module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the factors with zeros outside of the blocks."""
        found = dict(tensors)
        for factor, names in self._names.items():
            blocks, value = self._blocks, tensors.get(factor)
            # PEFT looks for these texts anywhere in a module's name.
            if blocks == 1 or value is None or not any(name in module for name in names):
                continue
            if value.dim() != 2 or value.shape[0] % blocks:
                message = f"{module}: its {factor} of {list(value.shape)} has no {blocks} blocks"
                self._adapter.find("DS543", message, "the configuration was changed by hand", self._adapter.file)
                continue
            found[factor] = torch.block_diag(*value.chunk(blocks))  # type: ignore[no-untyped-call]
            self._adapter.remark("BD-LoRA has blocks of a factor alone: here the rest of it is zero, and trained, too")
        return found
