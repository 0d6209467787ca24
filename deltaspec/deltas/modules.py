"""Where delta tensors live: one module per delta, under one reserved name on the backbone clone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from deltaspec.backbone.reserved import Reserved

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.methods.declarations import TensorSpec


def storage_key(site: str, spec: TensorSpec) -> str:
    """Return the name under which a delta keeps a tensor: `encoder.layer.0.attention.self.query.down`."""
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
        """Return a tensor by its storage key."""
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
        """Return the delta's dropout of this probability; it follows the model's training mode."""
        name = self.dropout_name(probability)
        module = self._modules.get(name)
        if module is None:
            module = nn.Dropout(probability).train(self.training)
            self._modules[name] = module
        assert isinstance(module, nn.Dropout)
        return module

    @staticmethod
    def dropout_name(probability: float) -> str:
        """Return the name of the submodule that is dropout of this probability."""
        return "dropout_" + repr(probability).replace(".", "_").replace("-", "_")

    def extra_repr(self) -> str:
        """Return what is inside; the tensors' names are in `state_dict`."""
        count = sum(p.numel() for p in self.parameters())
        return f"{self.name}: {len(self._parameters)} tensors, {count:,} parameters"


class Deltas(Reserved):
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
        """Return a delta of a library; views that are not the first have modules of their own for them."""
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
    """Return a delta as a module of another view: the same registries of tensors, and dropout of its own."""
    twin = Delta(delta.name)
    twin.__dict__.update(_parameters=delta._parameters, _buffers=delta._buffers, training=training)
    twin._non_persistent_buffers_set = delta._non_persistent_buffers_set
    return twin


def _after_load(deltas: nn.Module, _: Any) -> None:
    assert isinstance(deltas, Deltas)
    if deltas.attachments is not None:
        deltas.attachments.loaded()
    deltas._changed()
