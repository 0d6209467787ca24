"""OpenDelta's parallel adapter: from what enters the first module of a pair to what leaves the second."""

from __future__ import annotations

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import CONFIG, Saved
from deltaspec.formats.opendelta.types.adapter import bottleneck
from deltaspec.formats.options import Options
from deltaspec.names.folding import shown
from deltaspec.planning.streams import path_to

INFIXES = ("parallel_adapter",)
NEEDS = "its non_linearity"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    width = options.whole("bottleneck_dim", 24, least=1)
    params = {"width": width, "activation": saved.activation(options), "scale": 1.0}
    options.refuse("scaled", "OpenDelta 0.3 reads it nowhere", "save the delta again", unless=(None, 1, 1.0))
    options.settle()
    around = _around(saved, options)
    modules = list(saved.modules("parallel_adapter"))
    sites, alone = [], []
    for module, fqn in saved.places(modules).items():
        tensors = bottleneck(saved, f"{module}.parallel_adapter.modulelist", fqn, width)
        ends = around.pop(fqn, None)
        if ends is None:
            alone.append(module)
        elif tensors:
            site, reads = ends
            sites.append(IncomingSite(site, tensors, {} if reads is None else {"input_of": reads}))
    if alone and not saved.findings:
        message = f"has tensors for {shown(alone)}, which begin no pair of modified_modules"
        saved.find("DS543", message, "the file and the configuration are of two deltas", saved.file)
    if around and sites and not saved.findings:
        message = f"has no tensors for {shown(around)}, which modified_modules means"
        saved.find("DS543", message, "the file was cut, or is for a model with fewer layers", saved.file)
    if sites and all(site.params == sites[0].params for site in sites):
        params |= sites[0].params
        sites = [IncomingSite(site.fqn, site.tensors) for site in sites]
    saved.add("parallel_adapter", params, sites, part)


def _around(saved: Saved, options: Options) -> dict[str, tuple[str, str | None]]:
    """Return, by the first modules of pairs, the module whose output changes and the path of the one whose input is
    read, if that is another.

    OpenDelta walks through the model's modules and pairs each two that follow one another; two equal names make one.
    """
    patterns = options.items("modified_modules", [], str)
    met = saved.meant(options)
    if len(patterns) % 2 or not patterns or met is None:
        saved.find("DS544", f"modified_modules: {patterns!r} are no pairs", "save the delta again", CONFIG)
        return {}
    found: dict[str, tuple[str, str | None]] = {}
    turn, first = 0, ""
    for name in met:
        alone = turn % 2 == 0 and patterns[turn] == patterns[turn + 1]
        if turn % 2 == 0:
            first = name
        if alone:
            found[name] = (name, None)
        elif turn % 2:
            block = _block(saved, first, name)
            found[first] = (name, path_to(first, name, saved.base.rows)) if block is None else (block, None)
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
