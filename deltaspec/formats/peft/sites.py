"""The modules that a PEFT adapter of one type changes, each with its tensors, and what its options say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.table import Row
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
    adapter: Adapter, names: Mapping[str, str], untargeted: Callable[[str], bool] = lambda fqn: False
) -> list[Found]:
    """Take all tensors whose keys end in one of these names, and give them the names of the method here.

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
        found.append(Found(module, fqn, row, tensors))
    return found


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
