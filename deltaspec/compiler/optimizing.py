"""The deltas of a compiled model for optimizers: groups of parameters by the hints of specs, and what one holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from deltaspec.compiler.handles import DeltasView, known_names, trainable
from deltaspec.deltas.groups import parameter_groups
from deltaspec.deltas.held import OptimizerReport, report
from deltaspec.deltas.modules import Delta
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.library.libraries import Libraries
from deltaspec.names.paths import is_inside
from deltaspec.runtime.active import Active
from deltaspec.runtime.host import Host
from deltaspec.runtime.shared import Shared


class Optimizing(nn.Module):
    """The part of a compiled model that has to do with optimizers."""

    _active: Active
    _shared: Shared
    _host: Host
    _libraries: Libraries

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """All deltas by name, attached or not: the compiled ones, and those of libraries that are in memory."""
        return DeltasView(self._host.deltas, self._libraries)

    def trainable_parameters(self, *names: str) -> Iterator[nn.Parameter]:
        """Return the parameters of these deltas; by default those that training would change now, of what is attached.

        Deltas that train together, a row each (see `rows`), need not be attached: name them. With nothing attached,
        these are the backbone's where it may be trained (`compile(..., train_backbone=True)`); else there are none, and
        that raises DeltaSpecError (DS418).
        """
        chosen = known_names(self._shared, names) if names else self._active.active
        return trainable(self._host, self.deltas, chosen)

    def parameter_groups(self, *names: str) -> list[dict[str, Any]]:
        """Return the groups of an optimizer for these deltas, by default for all: `AdamW(c.parameter_groups())`.

        Each has the name of its `delta`, a `name` of its own, and the hints of the spec (`train:`): `lr`,
        `weight_decay`, and `warmup` and `schedule`, which `deltaspec.training.scheduler` reads. What is not given is
        the optimizer's own. With `lr_ratio` (LoRA+, arXiv:2402.12354) a delta has two groups, of which the second (B,
        and vectors that scale or shift its product) has that multiple of `lr`.

        Raises UnknownDeltaError, DeltaSpecError (DS381) for named deltas without anything to train.
        """
        planned = {delta.name: delta for delta in self._shared.plan.deltas}
        groups, findings = list[dict[str, Any]](), list[Diagnostic]()
        for name in known_names(self._shared, names):
            own = list(parameter_groups(planned[name], self.deltas[name])) if name in planned else []
            groups += own
            if names and not own:
                kind = "is of a library, which no optimizer holds" if name not in planned else "requires no gradients"
                kind = "is derived from others" if name in planned and planned[name].derived is not None else kind
                message, hint = f"there is nothing to train in the delta {name!r}: it {kind}", "leave it out"
                findings.append(Diagnostic("DS381", message, "<model>", suggestion=hint))
        if findings:
            raise DeltaSpecError(findings)
        if not groups:
            message, hint = "there is no delta that could be trained", "compile a spec with one"
            raise DeltaSpecError([Diagnostic("DS381", message, "<model>", suggestion=hint)])
        return groups

    def check_optimizer(self, optimizer: Any, *names: str) -> OptimizerReport:
        """Report which parameters of which delta an optimizer (or several, in a list) holds, misses or holds twice.

        The result is true where it holds what is to be trained: all of these deltas, by default of those that are
        attached or held in part, once each, and nothing else, such as the backbone's frozen parameters, or tensors that
        were the deltas' before these were replaced or sharded. It prints as a table; `.require()` raises
        DeltaSpecError (DS380) with all that is wrong. Anything with `param_groups` will do, wrappers included.
        """
        optimizers: Iterable[Any] = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        wanted = known_names(self._shared, names) if names else self._active.active
        own = {name: delta for name, delta in self.deltas.items() if any(True for _ in delta.parameters())}
        plain = {
            name: parameter
            for name, parameter in self._host.backbone.named_parameters()
            if not is_inside(name, self._host.home)
        }
        return report(optimizers, own, wanted, plain, self._host.trained)
