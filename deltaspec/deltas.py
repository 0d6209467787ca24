"""Where delta tensors live: one module per delta, under one reserved name on the backbone clone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.methods._base import TensorSpec
from deltaspec.walk import every

RESERVED = "deltaspec"
"""Name of the submodule of the backbone that holds all deltas."""


def storage_key(site: str, spec: TensorSpec) -> str:
    """Give the name under which a delta keeps a tensor: `encoder.layer.0.attention.self.query.down`."""
    return spec.key if spec.key is not None else f"{site}.{spec.name}" if site else spec.name


def attribute_name(key: str) -> str:
    """Turn a storage key into a parameter name: torch allows no dots in one."""
    return key.replace(".", "/")


class Delta(nn.Module):
    """The tensors of one delta, flat: `encoder/layer/0/attention/self/query/down`.

    Flat, because a module per path segment would outweigh the tensors of a small delta; with slashes, because
    torch allows no dots in a parameter's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def tensor(self, key: str) -> Tensor:
        """Give a tensor by its storage key."""
        name = attribute_name(key)
        found: Tensor | None = self._parameters.get(name)
        if found is None:
            found = self._buffers[name]
        assert found is not None
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (storage key, tensor) for all tensors, buffers included."""
        for name, value in (*self._parameters.items(), *self._buffers.items()):
            if value is not None:
                yield name.replace("/", "."), value

    def dropout(self, probability: float) -> nn.Dropout:
        """Give the delta's dropout of this probability; it follows the model's training mode."""
        name = self.dropout_name(probability)
        module = self._modules.get(name)
        if module is None:
            module = nn.Dropout(probability).train(self.training)
            self._modules[name] = module
        assert isinstance(module, nn.Dropout)
        return module

    @staticmethod
    def dropout_name(probability: float) -> str:
        """Give the name of the submodule that is dropout of this probability."""
        return "dropout_" + repr(probability).replace(".", "_").replace("-", "_")

    def extra_repr(self) -> str:
        """Say what is inside; the tensors' names are in `state_dict`."""
        count = sum(p.numel() for p in self.parameters())
        return f"{self.name}: {len(self._parameters)} tensors, {count:,} parameters"


class Deltas(nn.Module):
    """All deltas of one backbone, by name. After `.to()`, `.half()` or a load they are bound anew."""

    def __init__(self) -> None:
        super().__init__()
        self.attachments: Any = None
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def add(self, delta: Delta) -> None:
        """Register a delta; any name will do, also one that nn.Module has as a method."""
        self._modules[delta.name] = delta

    def __getitem__(self, name: str) -> Delta:
        found = self._modules.get(name)
        if found is None and self.attachments is not None:
            found = self._of_library(name)
        if found is None:
            raise KeyError(name)
        assert isinstance(found, Delta)
        return found

    def _of_library(self, name: str) -> Delta:
        """Give a delta of a library; views that are not the first have modules of their own for them."""
        held: Delta = self.attachments.libraries.delta(name)
        if self is self.attachments.stacks.home:
            return held
        shown: dict[str, Delta] = self.attachments.shown
        if name not in shown or shown[name]._parameters is not held._parameters:
            shown[name] = beside(held, self.training)
        return shown[name]

    def __getattr__(self, name: str) -> Any:
        # A traced graph reads a delta's tensors by path; one of a library is no submodule.
        attachments = self.__dict__.get("attachments")
        if attachments is not None and name not in self._modules and name in attachments.libraries:
            return self[name]
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> Deltas:
        """Put all deltas into training mode, or out of it."""
        super().train(mode)
        if self.attachments is not None:
            if self is self.attachments.stacks.home:
                self.attachments.stacks.train(mode)
            for delta in self.attachments.shown.values():
                delta.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        attachments = self.attachments
        if attachments is not None:
            attachments.family.refuse_moving(attachments, fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if attachments is not None and not attachments.family.others(attachments):
            attachments.libraries.moved()
            attachments.stacks.apply(fn)
        self._changed()
        return self

    def _changed(self) -> None:
        if self.attachments is not None:
            self.attachments.rebind()
            self.attachments.family.bind_others(self.attachments)


def beside(delta: Delta, training: bool) -> Delta:
    """Give a delta as a module of another view: the same registries of tensors, and dropout of its own."""
    twin = Delta(delta.name)
    twin.__dict__.update(_parameters=delta._parameters, _buffers=delta._buffers, training=training)
    twin._non_persistent_buffers_set = delta._non_persistent_buffers_set
    return twin


def place(backbone: nn.Module, deltas: Deltas) -> None:
    """Register the deltas on a backbone: under its root, or, where the root goes through its children, under a leaf.

    An `nn.Sequential` runs its children, has a length and an index; a part of ours among them would show.
    """
    _home(backbone)._modules[RESERVED] = deltas


def refuse_backbone(model: nn.Module) -> None:
    """Raise DeltaSpecError for a model that holds deltas already, or something else under their name."""
    if any(isinstance(module, Deltas) for module in every(model)):
        message = f"{type(model).__name__} is compiled already"
        hint = "take the original model, with all specs at once: compile(model, spec_a, spec_b)"
        raise DeltaSpecError([Diagnostic("DS431", message, "<model>", suggestion=hint)])
    home = _home(model)
    if RESERVED in {*home._modules, *home._parameters, *home._buffers, *home.__dict__} or hasattr(type(home), RESERVED):
        message = f"{type(home).__name__} has an attribute {RESERVED!r} of its own, which is the name of the deltas"
        raise DeltaSpecError([Diagnostic("DS411", message, "<model>", suggestion="rename it in the model")])


def _home(backbone: nn.Module) -> nn.Module:
    if isinstance(backbone, _CONTAINERS) or not _ITERATES.isdisjoint(_names_in_forward(type(backbone))):
        leaves = [m for m in backbone.modules() if not m._modules and not isinstance(m, _CONTAINERS)]
        return leaves[-1] if leaves else backbone
    return backbone


def find(backbone: nn.Module) -> tuple[str, Deltas] | None:
    """Find the deltas of a backbone: (their FQN, themselves); None where there are none."""
    if isinstance(at_root := backbone._modules.get(RESERVED), Deltas):
        return RESERVED, at_root
    return next(((fqn, m) for fqn, m in backbone.named_modules() if isinstance(m, Deltas)), None)


def home(backbone: nn.Module) -> str:
    """Give the FQN under which a compiled backbone holds its deltas."""
    found = find(backbone)
    assert found is not None
    return found[0]


def remove(backbone: nn.Module) -> None:
    """Take the deltas out of a backbone."""
    parent, _, name = home(backbone).rpartition(".")
    del backbone.get_submodule(parent)._modules[name]


def is_inside(fqn: str, deltas: str) -> bool:
    """Tell whether a name of a module or tensor is the deltas' own."""
    return fqn == deltas or fqn.startswith(deltas + ".")


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ITERATES = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})


def _names_in_forward(kind: type[nn.Module]) -> frozenset[str]:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return frozenset(code.co_names if code else ())


def _after_load(deltas: nn.Module, _: Any) -> None:
    assert isinstance(deltas, Deltas)
    if deltas.attachments is not None:
        deltas.attachments.loaded()
    deltas._changed()
