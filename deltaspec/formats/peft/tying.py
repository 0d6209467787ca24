"""What PEFT ties: it goes by the base's configuration, and by parameters that are the same.

Read in `_get_module_names_tied_with_embedding`, `_add_targets_to_tie` and `TrainableTokensModel` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from deltaspec.names.folding import shown

if TYPE_CHECKING:
    from deltaspec.formats.base import Base
    from deltaspec.formats.incoming import IncomingSite
    from deltaspec.formats.peft.adapter import Adapter


def ties_embeddings(base: Base, *, unsaid: bool) -> bool:
    """Return whether PEFT takes the base's embeddings for tied: its configuration says so, or `unsaid`."""
    if isinstance(base.config, dict):
        return bool(base.config.get("tie_word_embeddings", unsaid))
    return bool(getattr(base.config, "tie_word_embeddings", unsaid))


def tied_targets(adapter: Adapter, places: Mapping[str, str]) -> dict[str, str]:
    """Return the places that are LoRA's because they are tied to an embedding that it targets, and that embedding's.

    With `ensure_weight_tying` PEFT takes them out of `target_modules`, and saves the factors of each. That some have
    none is a finding.
    """
    if not adapter.option("ensure_weight_tying") or not ties_embeddings(adapter.base, unsaid=True):
        return {}
    rows, own = adapter.base.rows, set(places.values())
    found: dict[str, str] = {}
    for fqn in dict.fromkeys(places.values()):
        if rows[fqn].kind == "embedding" and rows[fqn].vocabulary:
            twins = [name.rpartition(".")[0] for p in rows[fqn].parameters for name in p.tied]
            found |= dict.fromkeys(twins, fqn)
    if lacking := [twin for twin in found if twin not in own]:
        message = f"has no factors for {shown(lacking)}, which ensure_weight_tying ties to {found[lacking[0]]}"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
    return found


def check_tied(adapter: Adapter, sites: list[IncomingSite], tied: Mapping[str, str]) -> None:
    """Refuse factors of what is tied that are not those of the embedding, turned round: PEFT has them once."""
    by_fqn = {site.fqn: site.tensors for site in sites}
    for twin, fqn in tied.items():
        own, table = by_fqn.get(twin), by_fqn.get(fqn)
        if own is None or table is None:
            continue
        if not (own["down"].equal(table["up"].t()) and own["up"].equal(table["down"].t())):
            message = f"holds factors of {twin}, which is tied to {fqn}, with two values"
            adapter.find("DS539", message, "save it again from the model that it was trained in", adapter.file)
        else:
            adapter.remark(
                f"PEFT has the factors of {twin} and {fqn} once, since these are tied; here each has its own"
            )
