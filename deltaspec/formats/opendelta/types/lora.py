"""OpenDelta's LoRA: y + (lora_alpha / lora_r) · B A x."""

from __future__ import annotations

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import Saved
from deltaspec.formats.options import Options

INFIXES = ("lora",)
NEEDS = "its lora_alpha"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    rank, alpha = options.whole("lora_r", 8, least=1), options.number("lora_alpha", 16.0)
    dropout = options.number("lora_dropout", 0.0)
    options.settle()
    fold = alpha <= 0  # which no spec can say
    sites = []
    for module, fqn in saved.sites("lora", options).items():
        down = saved.need(f"{module}.lora.lora_A", f"down of {fqn}", (rank, None))
        up = saved.need(f"{module}.lora.lora_B", f"up of {fqn}", (None, rank))
        if down is not None and up is not None:
            sites.append(IncomingSite(fqn, {"down": down, "up": up * (alpha / rank) if fold else up}))
    if fold:
        saved.remark(f"its scale {alpha:g} / {rank} is in its factors up: no spec has one that is not positive")
    params = {"rank": rank, "alpha": float(rank) if fold else alpha} | ({"dropout": dropout} if dropout else {})
    saved.add("lora", params, sites, part)
