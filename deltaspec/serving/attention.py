"""Attention in a mixed batch: keys and values of each row's own delta, seen by that row alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.backbone.attention import Router, register
from deltaspec.backbone.stand_in import stand_in
from deltaspec.graphs.row_ops import rows_in, toward_rows
from deltaspec.methods.declarations import DeltaTensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaspec.backbone.attention import Attention, Hook
    from deltaspec.methods.base import Method
    from deltaspec.methods.declarations import Form, MethodParams
    from deltaspec.serving.slots import Table


class AttendRows:
    """A hook into an attention function, of the deltas of one slot."""

    def __init__(self, method: Method, params: MethodParams, form: Form, table: Table) -> None:
        self.method, self.params, self.form, self.table = method, params, form, table

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
        """Compute attention, by each row's strength."""
        slot = self.table.slot
        rows_in(slot, query)
        if slot.empty:
            return base(query, key, value)
        size = query.shape[0]
        present = slot.grown("index", size) > 0

        def inside(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return base(q, k, v, present)

        own = DeltaTensors(self.form.tensors, self.table.take(size))
        output, weights = self.method.attend(self.form, self.params, own, query, key, value, inside)
        if not slot.partial:
            return output, weights
        without, seen = base(query, key, value)
        if weights is not None:  # of the model's own positions
            weights = toward_rows(seen, weights[..., -seen.shape[-1] :], slot)
        return toward_rows(without, output, slot), weights


class AttendedRows:
    """An attention module's own forward, with hooks into its attention function."""

    def __init__(self, host: nn.Module, hooks: tuple[Hook, ...]) -> None:
        register()
        self.host, self.hooks = host, hooks
        # Held here, since Dynamo knows no source for what it finds through a stand-in.
        self.code = type(host).forward
        self.router = Router(type(host))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        shadow = stand_in(self.host, {})
        self.router.route(shadow, self.hooks)
        return self.code(shadow, *args, **kwargs)
