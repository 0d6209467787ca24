"""Sites whose method runs a module on other weights than its own, where the module's forward cannot do that."""

from __future__ import annotations

from deltaspec.backbone.table import ModuleTable
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams, Site
from deltaspec.names.paths import is_inside


def refuse_fixed(method: Method, site: Site, params: MethodParams, table: ModuleTable) -> tuple[str, str, str] | None:
    """Return code, reason and way out where a forward between a site and its host runs on its own weights only."""
    if not method.folds(site, params) and not method.substitutes(site, params):
        return None
    fqn = site.row.fqn
    host = fqn if site.host is None else site.host
    for row in table.rows:
        if row.fixed and is_inside(row.fqn, host) and is_inside(fqn, row.fqn):
            place = f"{row.fqn or 'the model'} ({row.type})"
            reason = f"{method.name} runs {place} on other weights, and the forward that was put onto it cannot do that"
            return "DS412", reason, "use a method around the call, or put the forward into a class of its own"
    return None
