"""OpenDelta's prefix tuning: keys and values in front, as they are or computed by one small network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import Saved
from deltaspec.formats.options import Options
from deltaspec.names.folding import shown
from deltaspec.names.paths import is_inside

if TYPE_CHECKING:
    from torch import Tensor

INFIXES = ("prefix", "reparams")
NEEDS = "its prefix_token_num"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    tokens = options.whole("prefix_token_num", 6, least=1)
    options.ignore("reparameterize", "embed_dim", "mid_dim")
    if (kind := saved.base.table.model_type) in ("t5", "mt5", "umt5"):
        message = f"prefixes on {kind} take part in its relative positions: block 0 counts them, and the blocks behind "
        message += "it lose their positions"
        saved.find("DS549", message, "use lora or adapters there", saved.file)
        return
    flat = saved.modules("prefix")
    if reparams := saved.modules("reparams"):
        rows = _computed(saved, next(iter(reparams)), tokens, options)
    else:
        rows = {}
        for module in flat:
            taken = [
                saved.need(f"{module}.prefix.past_{n}", f"{n}s in front", (tokens, None)) for n in ("key", "value")
            ]
            if taken[0] is not None and taken[1] is not None:
                rows[module] = (taken[0], taken[1])
        saved.compare(flat, options)
    sites = []
    for module, fqn in saved.places(rows).items():
        inside = [row.fqn for row in saved.base.table.rows if row.attends and is_inside(row.fqn, fqn)]
        if len(inside) != 1:
            saved.find("DS523", f"{module} has {len(inside)} attentions here", "load its base model", saved.file)
            continue
        key, value = rows[module]
        sites.append(IncomingSite(inside[0], {"key": key, "value": value}))
    saved.add("prefix", {"tokens": tokens}, sites, part)


def _computed(saved: Saved, first: str, tokens: int, options: Options) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the keys and values that the network at the first attention computes, for all of them in order."""
    lead = f"{first}.reparams"
    became = "multiplied out: keys and values in front"
    saved.take(f"{lead}.input_tokens", "the numbers of the prefix's rows")
    wte = saved.need(f"{lead}.wte.weight", became, (tokens, None))
    inner = saved.need(f"{lead}.control_trans.0.weight", became, (None, None))
    inner_bias = saved.need(f"{lead}.control_trans.0.bias", became, (None if inner is None else len(inner),))
    outer = saved.need(f"{lead}.control_trans.2.weight", became, (None, None))
    outer_bias = saved.need(f"{lead}.control_trans.2.bias", became, (None if outer is None else len(outer),))
    meant = saved.meant(options) or []
    places = list(saved.places([first]).values())
    if wte is None or inner is None or inner_bias is None or outer is None or outer_bias is None or not places:
        return {}
    if not meant or meant[0] != places[0]:
        message = f"its network is at {first}, and modified_modules means {shown(meant) or 'nothing'} first"
        saved.find("DS543", message, "the file and the configuration are of two deltas", saved.file)
        return {}
    if inner.shape[1] != wte.shape[1] or outer.shape[1] != len(inner):
        saved.find("DS526", f"the layers of {lead} do not fit one another", "save the delta again", saved.file)
        return {}
    if len(outer) % (2 * len(meant)):
        message = f"{lead} gives {len(outer)} numbers a row, which {len(meant)} attentions cannot share"
        saved.find("DS543", message, "it is for a model with another number of layers", saved.file)
        return {}
    rows = F.linear(torch.tanh(F.linear(wte, inner, inner_bias)), outer, outer_bias)
    keys_and_values = rows.reshape(tokens, 2 * len(meant), -1).unbind(1)
    saved.remark("its network is multiplied out: what is trained further are the keys and values themselves")
    return {
        fqn: (keys_and_values[2 * index].contiguous(), keys_and_values[2 * index + 1].contiguous())
        for index, fqn in enumerate(meant)
    }
