"""Where delta tensors live: one module per delta, under one reserved name on the backbone clone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from deltaspec.backbone.reserved import Reserved
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


class Owner(Protocol):
    """What deltas ask for those that are no modules, and tell of what is done to them."""

    def missing(self, name: str) -> Delta | None:
        """Return a delta that is no module; None where there is none. Raise KeyError for one that is not in memory."""

    def train(self, mode: bool) -> None:
        """Put deltas that are no modules into training mode, or out of it."""

    def before_move(self, fn: Any) -> None:
        """Raise DeltaSpecError where tensors may not be moved or cast now by this function of tensors."""

    def after_move(self, fn: Any) -> None:
        """Follow tensors that were moved or cast."""

    def after_load(self) -> None:
        """Follow tensors that `load_state_dict` filled."""


class Deltas(Reserved):
    """All deltas of one backbone, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.owner: Owner | None = None
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def add(self, delta: Delta) -> None:
        """Register a delta; any name will do, also one that nn.Module has as a method."""
        self._modules[delta.name] = delta

    def get(self, name: str) -> Delta | None:
        """Return a delta that is a module here; None where there is none."""
        found = self._modules.get(name)
        assert found is None or isinstance(found, Delta)
        return found

    def held(self) -> Iterator[Delta]:
        """Yield all deltas that are modules here."""
        for delta in self._modules.values():
            assert isinstance(delta, Delta)
            yield delta

    def __getitem__(self, name: str) -> Delta:
        found = self.get(name)
        if found is None and self.owner is not None:
            found = self.owner.missing(name)
        if found is None:
            raise KeyError(name)
        return found

    def __getattr__(self, name: str) -> Any:
        # A traced graph reads a delta's tensors by path; one of a library is no submodule.
        owner = self.__dict__.get("owner")
        if owner is not None and name not in self._modules and (found := owner.missing(name)) is not None:
            return found
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> Deltas:
        """Put all deltas into training mode, or out of it."""
        super().train(mode)
        if self.owner is not None:
            self.owner.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.owner is not None:
            self.owner.before_move(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.owner is not None:
            self.owner.after_move(fn)
        return self


def beside(delta: Delta, training: bool) -> Delta:
    """Return a delta as a module of another view: the same registries of tensors, and dropout of its own."""
    twin = Delta(delta.name)
    twin.__dict__.update(_parameters=delta._parameters, _buffers=delta._buffers, training=training)
    twin._non_persistent_buffers_set = delta._non_persistent_buffers_set
    return twin


def _after_load(deltas: nn.Module, _: Any) -> None:
    assert isinstance(deltas, Deltas)
    if deltas.owner is not None:
        deltas.owner.after_load()
