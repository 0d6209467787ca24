"""The modules that a PEFT adapter of one type changes, each with its tensors, and what its options say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.table import Row
from deltaspec.diagnostics.wording import counted
from deltaspec.formats.peft.targets import check_targets

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Found:
    """One module with tensors of an adapter."""

    module: str
    """Name as PEFT has it, from the model down: what its patterns are matched with."""
    fqn: str
    """FQN in the base model at hand."""
    row: Row
    tensors: Mapping[str, Tensor]
    """By the names that this method has for them."""


def found_modules(
    adapter: Adapter,
    names: Mapping[str, str],
    dims: Mapping[str, int | None] | None = None,
    untargeted: Callable[[str], bool] = lambda fqn: False,
) -> list[Found]:
    """Take all tensors whose keys end in one of these names, and give them the names of the method here.

    `dims` says how many dimensions each must have, by those names: 2 if left out, None for those of the weight.
    What the configuration targets is compared with them, but for `untargeted` ones: `target_modules` and all beside it
    are taken.
    """
    places = adapter.places(adapter.modules(*names))
    check_targets(adapter, {module: fqn for module, fqn in places.items() if not untargeted(fqn)})
    found = []
    for module, fqn in places.items():
        row = adapter.base.rows[fqn]
        tensors = {
            ours: value
            for theirs, ours in names.items()
            if (value := adapter.tensor_of(module, theirs, f"{ours} of {fqn}")) is not None
        }
        whole = len(row.shape_of("weight")) if row.kind == "conv" else 2
        wanted = {name: (dims or {}).get(name, 2) for name in tensors}
        wrong = {name: whole if count is None else count for name, count in wanted.items()}
        wrong = {name: count for name, count in wrong.items() if tensors[name].dim() != count}
        for name, count in wrong.items():
            _misfit(adapter, module, name, list(tensors[name].shape), counted(count, "dimension"))
        if not wrong:
            found.append(Found(module, fqn, row, tensors))
    return found


def misfits(adapter: Adapter, found: Found, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether one of these tensors has another shape than it must have, as a finding."""
    wrong = {name: shape for name, shape in shapes.items() if tuple(found.tensors[name].shape) != shape}
    for name, shape in wrong.items():
        _misfit(adapter, found.module, name, list(found.tensors[name].shape), str(list(shape)))
    return bool(wrong)


def _misfit(adapter: Adapter, module: str, name: str, shape: list[int], wanted: str) -> None:
    message = f"{module}: its {name} is of shape {shape}, and must have {wanted}"
    adapter.find("DS543", message, "the file was changed, or is for another model", adapter.file)


def lacks(adapter: Adapter, found: Found, names: Iterable[str]) -> bool:
    """Return whether a module has not all of these tensors, as a finding."""
    lacking = [name for name in names if name not in found.tensors]
    if lacking:
        message = f"{found.module}: has no {' and no '.join(lacking)}"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
    return bool(lacking)


def differs(adapter: Adapter, found: Found, option: str, said: Any, held: Any) -> bool:
    """Return whether the file has another size than the configuration says, as a finding."""
    if said == held:
        return False
    message = f"{found.module}: {option} is {said}, and the file has tensors of {held}"
    adapter.find("DS543", message, "the configuration and the file are of two adapters", adapter.file)
    return True


def overrides(params: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs at a site from the delta's own parameters."""
    return {name: value for name, value in own.items() if name not in params or params[name] != value}
