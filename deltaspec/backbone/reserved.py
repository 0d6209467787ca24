"""The one reserved name: where a compiled backbone holds its deltas, and how they are found there."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaspec.backbone.forwards import names_in
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


class Reserved(nn.Module):
    """The module under the reserved name: the deltas of a compiled backbone."""


RESERVED = "deltaspec"
"""Name of the submodule of the backbone that holds all deltas."""


def place(backbone: nn.Module, deltas: Reserved) -> None:
    """Register the deltas on a backbone: under its root, or, where the root goes through its children, under a leaf.

    An `nn.Sequential` runs its children, has a length and an index; a part of ours among them would show.
    """
    _home(backbone)._modules[RESERVED] = deltas


def refuse_backbone(model: nn.Module) -> None:
    """Raise DeltaSpecError for a model that holds deltas already, or something else under their name, and for what
    torch.compile made of one.
    """
    if "_orig_mod" in model._modules and type(model).__name__ == "OptimizedModule":
        message = "torch.compile stands around the model, and a copy of that would run the original"
        hint = "give the model itself (model._orig_mod), and torch.compile what deltaspec.compile returns"
        raise DeltaSpecError([Diagnostic("DS415", message, "<model>", suggestion=hint)])
    if any(isinstance(module, Reserved) for module in model.modules()):
        message = f"{type(model).__name__} is compiled already"
        hint = "add deltas to what was compiled: c.add(spec); or compile the original model, with all specs at once"
        raise DeltaSpecError([Diagnostic("DS431", message, "<model>", suggestion=hint)])
    home = _home(model)
    if RESERVED in {*home._modules, *home._parameters, *home._buffers, *home.__dict__} or hasattr(type(home), RESERVED):
        message = f"{type(home).__name__} has an attribute {RESERVED!r} of its own, which is the name of the deltas"
        raise DeltaSpecError([Diagnostic("DS411", message, "<model>", suggestion="rename it in the model")])


def _home(backbone: nn.Module) -> nn.Module:
    # Nothing else tells, before it runs, that a forward walks its children.
    if isinstance(backbone, _CONTAINERS) or not _ITERATES.isdisjoint(names_in(type(backbone).forward)):
        leaves = [m for m in backbone.modules() if not m._modules and not isinstance(m, _CONTAINERS)]
        return leaves[-1] if leaves else backbone
    return backbone


def find(backbone: nn.Module) -> tuple[str, Any] | None:
    """Find the deltas of a backbone: (their FQN, themselves); None where there are none."""
    if isinstance(at_root := backbone._modules.get(RESERVED), Reserved):
        return RESERVED, at_root
    return next(((fqn, m) for fqn, m in backbone.named_modules() if isinstance(m, Reserved)), None)


def home(backbone: nn.Module) -> str:
    """Return the FQN under which a compiled backbone holds its deltas."""
    found = find(backbone)
    assert found is not None
    return found[0]


def remove(backbone: nn.Module) -> None:
    """Remove the deltas from a backbone."""
    parent, _, name = home(backbone).rpartition(".")
    del backbone.get_submodule(parent)._modules[name]


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ITERATES = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
