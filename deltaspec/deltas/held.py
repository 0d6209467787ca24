"""Which parameters of which delta an optimizer holds, misses, or holds twice; and what it holds besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltaspec.deltas.groups import own_parameters
from deltaspec.deltas.modules import Delta
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.names.folding import shown

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Held:
    """What an optimizer holds of one delta: names of its parameters."""

    delta: str
    wanted: bool
    """Whether it should be held: it was asked for, is attached, or is held in part."""
    held: tuple[str, ...]
    missing: tuple[str, ...]
    """Those that require gradients and are not held."""
    twice: tuple[str, ...]
    """Those that are held more than once."""
    frozen: tuple[str, ...]
    """Those that are held and require no gradients: no step changes them."""


@dataclass(frozen=True, slots=True)
class OptimizerReport:
    """What an optimizer holds of a compiled model; true where that is what is to be trained. Printed, it is a table."""

    deltas: tuple[Held, ...]
    backbone: tuple[str, ...]
    """Parameters of the backbone that are held."""
    trained: bool
    """Whether the backbone may be trained (`compile(..., train_backbone=True)`)."""
    strangers: Mapping[str, int]
    """What is held and is no parameter of the model, or not any more: how many tensors, by what they are."""

    def __bool__(self) -> bool:
        return not self.findings

    def __getitem__(self, delta: str) -> Held:
        """Return what is held of a delta. Raises KeyError."""
        return {held.delta: held for held in self.deltas}[delta]

    @property
    def findings(self) -> list[Diagnostic]:
        """What is wrong, a finding (DS380) each; empty where nothing is."""
        hint = "make the optimizer anew, of c.parameter_groups(), after the model was moved, sharded or wrapped"
        found: list[tuple[str, str]] = []
        if not self.trained and not any(held.held for held in self.deltas):
            found.append(("the optimizer holds no parameter of any delta", hint))
        for held in self.deltas:
            if held.wanted and held.missing:
                what = f"it misses {_listed(held.missing)} of the delta {held.delta!r}"
                found.append((what, hint if held.held else f"add c.parameter_groups({held.delta!r})"))
            if held.twice:
                what = f"it holds {_listed(held.twice)} of the delta {held.delta!r} twice"
                found.append((what, "each step would change them twice: leave out one group or one optimizer"))
            if held.frozen:
                what = f"it holds {_listed(held.frozen)} of the delta {held.delta!r}, which require no gradients"
                found.append((what, "leave them out, or set requires_grad"))
        if self.backbone and not self.trained:
            what = f"it holds {_listed(self.backbone)} of the backbone, which is frozen"
            found.append((what, "give it c.parameter_groups(), not the parameters of the model"))
        found += ((f"it holds {counted(count, 'tensor')}: {what}", hint) for what, count in self.strangers.items())
        return [Diagnostic("DS380", message, "<optimizer>", suggestion=way) for message, way in found]

    def require(self) -> None:
        """Raise DeltaSpecError (DS380) with all that is wrong."""
        if findings := self.findings:
            raise DeltaSpecError(findings)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table("delta")
        for title in ("held", "missing", "twice", "frozen"):
            table.add_column(title, justify="right")
        for held in self.deltas:
            counts = (held.held, held.missing, held.twice, held.frozen)
            table.add_row(Text(held.delta), *(str(len(names) or "–") for names in counts))
        if self.backbone:
            table.add_row(Text("(the backbone)"), str(len(self.backbone)), "", "", "")
        if self.strangers:
            table.add_row(Text("(not of this model)"), str(sum(self.strangers.values())), "", "", "")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=_WIDTH, color_system=None).print(self.__rich__())
        said = (f"{finding.message}\n  = help: {finding.suggestion}" for finding in self.findings)
        return "\n".join([text.getvalue().rstrip(), *said])


def report(
    optimizers: Iterable[Any],
    deltas: Mapping[str, Delta],
    wanted: Collection[str],
    backbone: Mapping[str, nn.Parameter],
    trained: bool,
) -> OptimizerReport:
    """Compare what optimizers hold with deltas, of which these are `wanted`, and with the backbone's parameters.

    Raises TypeError for what has no `param_groups`.
    """
    groups = [group for optimizer in optimizers for group in _groups(optimizer)]
    held = [(group, tensor) for group in groups for tensor in group["params"]]
    times = Counter(id(tensor) for _, tensor in held)
    own = {name: own_parameters(delta) for name, delta in deltas.items()}
    known = {id(p) for parameters in own.values() for p in parameters.values()} | {*map(id, backbone.values())}
    strangers = {id(tensor): (group, tensor) for group, tensor in held if id(tensor) not in known}
    return OptimizerReport(
        tuple(_held(name, parameters, times, name in wanted) for name, parameters in own.items()),
        tuple(name for name, parameter in backbone.items() if times[id(parameter)]),
        trained,
        _told([*strangers.values()], own, backbone),
    )


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(f"an optimizer has param_groups, and {type(optimizer).__name__} has none")
    return groups


def _held(name: str, parameters: Mapping[str, nn.Parameter], times: Mapping[int, int], wanted: bool) -> Held:
    held = tuple(key for key, p in parameters.items() if times[id(p)])
    return Held(
        name,
        wanted or bool(held),
        held,
        tuple(key for key, p in parameters.items() if p.requires_grad and not times[id(p)]),
        tuple(key for key, p in parameters.items() if times[id(p)] > 1),
        tuple(key for key, p in parameters.items() if times[id(p)] and not p.requires_grad),
    )


def _told(
    strangers: list[tuple[dict[str, Any], Tensor]],
    own: Mapping[str, Mapping[str, nn.Parameter]],
    backbone: Mapping[str, nn.Parameter],
) -> dict[str, int]:
    """Say what tensors are that are no parameters of the model: alike ones together."""
    memory = {_memory(p): "the backbone's weights" for p in backbone.values()}
    memory |= {_memory(p): f"the delta {name!r}" for name, parameters in own.items() for p in parameters.values()}
    memory.pop(None, None)
    said: Counter[str] = Counter()
    for group, tensor in strangers:
        name = group.get("delta")
        if (place := _memory(tensor)) in memory:
            said[f"other parameters over the memory of {memory[place]}, which get no gradients here"] += 1
        elif name in own:
            said[f"parameters that are no more those of the delta {name!r}"] += 1
        else:
            said["parameters that are not of this model, or not any more"] += 1
    return dict(said)


def _memory(tensor: Tensor) -> tuple[str, int] | None:
    """Return where a plain tensor lies; None for shards, and what has no memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return None
    return str(tensor.device), tensor.data_ptr()


def _listed(names: Collection[str]) -> str:
    return f"{counted(len(names), 'parameter')} ({shown(names)})"
