"""FourierFT of PEFT: spectral coefficients at places that follow from a seed."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.single import Single
from deltaspec.formats.peft.sites import differs, found_modules, overrides
from deltaspec.formats.peft.targets import BELOW_ANY, by_pattern_below

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"fourierft"})
"""Methods that are written so."""


def read(adapter: Adapter) -> None:
    """Add the delta of a FourierFT adapter."""
    adapter.ignore("fan_in_fan_out")
    count, seed = (
        adapter.options.whole("n_frequency", 1000, 1),
        adapter.options.whole("random_loc_seed", 777, -(1 << 63)),
    )
    counts = adapter.options.wholes("n_frequency_pattern", BELOW_ANY, 1)
    params: dict[str, Any] = {
        "frequencies": count, "scale": adapter.options.number("scaling", 150.0), "frequency_seed": seed,
        "init": "zeros" if adapter.options.flag("init_weights", False) else "normal",
    }  # fmt: skip

    @cache
    def places(size: int, number: int) -> Tensor:  # sites of one shape share one tensor
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].clone()

    sites = []
    for found in found_modules(adapter, {"fourierft_spectrum": "coefficients"}, {"coefficients": 1}):
        own = {"frequencies": by_pattern_below(found.module, counts, count)}
        held = found.tensors["coefficients"].shape[0]
        if differs(adapter, found, "n_frequency", own["frequencies"], held):
            continue
        assert found.row.in_features is not None and found.row.out_features is not None
        size = found.row.in_features * found.row.out_features
        frequencies = places(size, held)
        sites.append(IncomingSite(found.fqn, {**found.tensors, "frequencies": frequencies}, overrides(params, own)))
    adapter.add("fourierft", params, sites)


def write(out: Outgoing) -> None:
    """Write a FourierFT adapter."""
    single = Single(out, "FOURIERFT", "fourierft", ("Linear", "Conv1D"))
    seed = single.agreed("random_loc_seed", lambda part: part.params.frequency_seed, 777)
    scale = single.agreed("scaling", lambda part: part.params.scale, 150.0)
    single.keep(_elsewhere)
    single.put("fourierft_spectrum", lambda part: part.own.coefficients)
    single.patterned("n_frequency", "n_frequency_pattern", lambda part: part.params.frequencies, 1000, below=True)
    single.finish(random_loc_seed=seed, scaling=scale)


def _elsewhere(part: Part) -> str | None:
    """Return that the frequencies are others than those that PEFT draws from the seed; None where they are these."""
    row, held = part.at.site.row, part.own.frequencies
    assert row.in_features is not None and row.out_features is not None
    generator = torch.Generator().manual_seed(part.params.frequency_seed)
    drawn = torch.randperm(row.in_features * row.out_features, generator=generator)[: held.shape[0]]
    return None if torch.equal(drawn, held) else "its frequencies are not those that PEFT draws from the seed"
