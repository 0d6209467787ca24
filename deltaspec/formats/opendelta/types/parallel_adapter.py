"""OpenDelta's parallel adapter: from what enters the first module of a pair to what leaves the second."""

from __future__ import annotations

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import CONFIG, Saved
from deltaspec.formats.opendelta.types.adapter import bottleneck
from deltaspec.formats.options import Options
from deltaspec.names.folding import shown

INFIXES = ("parallel_adapter",)
NEEDS = "its non_linearity"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    width = options.whole("bottleneck_dim", 24, least=1)
    params = {"width": width, "activation": saved.activation(options), "scale": 1.0}
    options.refuse("scaled", "OpenDelta 0.3 reads it nowhere", "save the delta again", unless=(None, 1, 1.0))
    around = _around(saved, options)
    modules = list(saved.modules("parallel_adapter"))
    sites, between = [], []
    for module, fqn in saved.places(modules).items():
        tensors = bottleneck(saved, f"{module}.parallel_adapter.modulelist", fqn, width)
        site = around.pop(fqn, None)
        if site is None:
            between.append(module)
        elif tensors:
            sites.append(IncomingSite(site, tensors))
    if between:
        message = f"its adapters from {shown(between)} end at another module, and no module of the model goes from one "
        hint = "put parallel adapters on whole blocks (modified_modules: two equal names), or use adapter there"
        saved.find("DS549", message + "to the other: a delta has one site here", hint, saved.file)
    if around and sites and not saved.findings:
        message = f"has no tensors for {shown(around)}, which modified_modules means"
        saved.find("DS543", message, "the file was cut, or is for a model with fewer layers", saved.file)
    saved.add("parallel_adapter", params, sites, part)


def _around(saved: Saved, options: Options) -> dict[str, str]:
    """Return the first modules of pairs, and the module that goes from what enters it to what leaves the second.

    OpenDelta walks through the model's modules and pairs each two that follow one another; two equal names make one.
    """
    patterns = options.items("modified_modules", [], str)
    met = saved.meant(options)
    if len(patterns) % 2 or not patterns or met is None:
        saved.find("DS544", f"modified_modules: {patterns!r} are no pairs", "save the delta again", CONFIG)
        return {}
    found: dict[str, str] = {}
    turn, first = 0, ""
    for name in met:
        alone = turn % 2 == 0 and patterns[turn] == patterns[turn + 1]
        if turn % 2 == 0:
            first = name
        if alone:
            found[name] = name
        elif turn % 2 and (block := _block(saved, first, name)) is not None:
            found[first] = block
        turn = ((turn | 1) if alone else turn) + 1
        turn %= len(patterns)
    return found


def _block(saved: Saved, first: str, second: str) -> str | None:
    """Return the feed-forward module that begins with one module and ends with the other."""
    outer = first.rpartition(".")[0]
    if outer != second.rpartition(".")[0]:
        return None
    begins, ends = saved.base.rows[first].roles, saved.base.rows[second].roles
    whole = "mlp" in saved.base.rows[outer].roles and "mlp.down" in ends
    return outer if whole and not {"mlp.up", "mlp.gate", "mlp.gate_up"}.isdisjoint(begins) else None
