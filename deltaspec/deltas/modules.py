"""Where delta tensors live: one module per delta, under one reserved name on the backbone clone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor, nn

from deltaspec.backbone.reserved import Reserved
from deltaspec.methods.declarations import TensorSpec
from deltaspec.names.escaping import dotted, escaped, flat, unescaped


def storage_key(site: str, spec: TensorSpec) -> str:
    """Return the name under which a delta keeps a tensor: `encoder.layer.0.attention.self.query.down`."""
    return spec.key if spec.key is not None else f"{site}.{spec.name}" if site else spec.name


def attribute_name(key: str) -> str:
    """Turn a storage key into a parameter name: torch allows no dots in one, and accelerate names files by it."""
    return flat(key)


class OwnTensors:
    """Which tensors are a delta's own, in all views of it."""

    __slots__ = ("identities", "names", "views")

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        """Names of all that it has; those that are parametrized, pruned or sharded, too."""
        self.identities: set[int] | None = None
        """Identities of what is registered and its own; None where that is not known yet, as in a new copy."""
        self.views: WeakSet[Delta] = WeakSet()
        """The modules of the delta, where there are several."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnTensors, (self.names,)  # the tensors of a copy are others


class Delta(nn.Module):
    """The tensors of one delta, flat: `encoder~layer~0~attention~self~query~down`.

    Flat, because a module per path segment would outweigh the tensors of a small delta; with tildes, because torch
    allows no dots in a parameter's name, and what is offloaded to a disk no slashes.
    """

    own_tensors: OwnTensors

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.__dict__["own_tensors"] = OwnTensors()

    def tensor(self, key: str) -> Tensor:
        """Return a tensor by its storage key, as forwards read it."""
        return self.read(attribute_name(key))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (storage key, tensor) for all tensors, buffers included, as forwards read them."""
        self._know()
        for name in self.own_tensors.names:
            yield dotted(name), self.read(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name here, as forwards read it."""
        found: Tensor | None = self._parameters.get(name)
        if found is None:
            found = self._buffers.get(name)
        if found is None:
            found = getattr(self, name)  # parametrized, pruned or sharded: it is computed, or an attribute
        assert found is not None
        return found

    def own(self) -> None:
        """Take the tensors that are registered now for the delta's own; what stands there for one call is not."""
        own = self.own_tensors
        own.names = own.names or (*self._parameters, *self._buffers)
        # One that is computed is registered nowhere, and so it stays displaced.
        whole = all(name in self._parameters or name in self._buffers for name in own.names)
        own.identities = self._registered() if whole else set()

    def is_displaced(self) -> bool:
        """Return whether other tensors stand in the places of its own: functional_call, FSDP, a parametrization."""
        self._know()
        return self._registered() != self.own_tensors.identities

    def is_view_of(self, other: Delta) -> bool:
        """Return whether this is the same delta in another view."""
        return self.own_tensors is other.own_tensors

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, in all views, as `setattr` does: it is the delta's own from now on."""
        super().register_parameter(name, param)
        if param is not None and name in self.own_tensors.names:
            for view in (self, *self.own_tensors.views):
                view._parameters[name] = param
            self.own()

    def _registered(self) -> set[int]:
        return {*map(id, self._parameters.values()), *map(id, self._buffers.values())}

    def _know(self) -> None:
        if self.own_tensors.identities is None:
            self.own()

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
        self._register_load_state_dict_pre_hook(_with_names_of_today)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def own(self) -> None:
        """Take the tensors that are registered now for the deltas' own."""
        for delta in self.held():
            delta.own()

    def add(self, delta: Delta) -> None:
        """Register a delta; any name will do, also one that nn.Module has as a method."""
        self._modules[escaped(delta.name)] = delta

    def discard(self, name: str) -> None:
        """Take a delta out for good."""
        self._modules.pop(escaped(name), None)

    def get(self, name: str) -> Delta | None:
        """Return a delta that is a module here; None where there is none."""
        found = self._modules.get(escaped(name))
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
        if owner is not None and name not in self._modules and (found := owner.missing(unescaped(name))) is not None:
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
        self.own()
        if self.owner is not None:
            self.owner.after_move(fn)
        return self


def beside(delta: Delta, training: bool) -> Delta:
    """Return a delta as a module of another view: the same tensors, in registries and with dropout of its own.

    What stands in one view's registries for one call only (`functional_call`) is no other view's.
    """
    twin = Delta(delta.name)
    twin.__dict__.update(_parameters={**delta._parameters}, _buffers={**delta._buffers}, training=training)
    twin.__dict__["own_tensors"] = delta.own_tensors
    delta.own_tensors.views.update((delta, twin))
    twin._non_persistent_buffers_set = delta._non_persistent_buffers_set
    return twin


def _with_names_of_today(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what earlier versions called `encoder/layer/0/…`, in a state that is about to be loaded."""
    for key in [key for key in state if key.startswith(prefix) and "/" in key]:
        state[prefix + key[len(prefix) :].replace("/", "~")] = state.pop(key)


def _after_load(deltas: nn.Module, _: Any) -> None:
    assert isinstance(deltas, Deltas)
    deltas.own()
    if deltas.owner is not None:
        deltas.owner.after_load()
