"""OpenDelta's BitFit: biases as they were when trained, and biases that the base does not have."""

from __future__ import annotations

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import Saved
from deltaspec.formats.options import Options

INFIXES = ("bitfit",)
NEEDS = "nothing"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the deltas: trained biases in place of the base's, and those that are new."""
    saved.meant(options)
    saved.in_full(part, saved.owned(key for key in saved.weights if key.endswith("bias")))
    added = {key: key.rpartition(".")[0] for key in saved.weights if key.rpartition(".")[2] == "bias"}
    owners = {key: module.removesuffix(".bitfit") for key, module in added.items()}
    places = saved.places(dict.fromkeys(owners.values()))
    sites = []
    for key, module in owners.items():
        if module in places and module in added.values() and saved.base.rows[places[module]].has_parameter("bias"):
            message = f"has a bias for {module}, which is another model's"
            saved.find("DS543", message, "load the model that it was trained on", saved.file)
        elif module in places and (bias := saved.take(key, f"a bias for {places[module]}", (None,))) is not None:
            sites.append(IncomingSite(places[module], {"bias": bias}))
    saved.add("bitfit", {}, sites, f"{part}-new".lstrip("-") if saved.incoming.deltas else part)
