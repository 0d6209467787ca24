"""Collecting the deltas of a compiled model that are to be written in another library's form."""

from __future__ import annotations

from collections.abc import Collection

from deltaspec.backbone.sharded import is_sharded
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.formats.base import Base
from deltaspec.formats.outgoing import Outgoing, Wishes, outgoing
from deltaspec.runtime.active import Active
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.host import Host
from deltaspec.runtime.misfits import refuse_misfits
from deltaspec.runtime.shared import Shared


def leaving(active: Active, shared: Shared, host: Host, names: Collection[str], wishes: Wishes) -> Outgoing:
    """Return these deltas at their strengths, up to date, with the model as it is without them.

    Raises DeltaSpecError where there are none (DS417), where two exclude each other (DS436), or where the backbone was
    trained besides (DS560).
    """
    if not names:
        message, hint = "nothing is attached, so nothing would be written", "attach deltas first, or name them"
        raise DeltaSpecError([Diagnostic("DS417", message, file="<model>", suggestion=hint)])
    if host.trained:
        message = "the backbone itself may have been trained (train_backbone=True), and an adapter holds deltas alone"
        hint = "c.merge() gives a plain model with all of it"
        raise DeltaSpecError([Diagnostic("DS560", message, file="<model>", suggestion=hint)])
    if any(map(is_sharded, host.backbone.parameters())):
        message = "the model is sharded over processes, and an adapter is written from a whole one"
        hint = "c.save(DIR) in all processes, then `deltaspec export DIR --to peft -o OUT` in one"
        raise DeltaSpecError([Diagnostic("DS575", message, file="<model>", suggestion=hint)])
    chosen = tuple(sorted(set(names), key=shared.order.__getitem__))
    active.require(chosen)
    active.follow_others()
    refuse_misfits(host, (shared.planned[name] for name in chosen), merged=True)
    shared.rivals.refuse(chosen)
    strengths = active.strengths.as_dict(chosen)
    active.derived.refresh(name for name in chosen if name not in active.active)
    base = Base(without_deltas(host))
    planned = [shared.planned[name] for name in chosen]
    return outgoing(
        base, shared.plan_with(chosen), planned, lambda name, key: host.deltas[name].tensor(key), strengths, wishes
    )
