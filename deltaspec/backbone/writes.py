"""What forwards write: parameters that are shared with another model, and buffers in ways that torch does not count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from deltaspec.backbone.forwards import foreign_forward
from deltaspec.backbone.holding import codes_in, contents
from deltaspec.backbone.storages import identity

_PUBLISHED = ("torch.", "transformers.", "deltaspec.")
_UNCOUNTED = frozenset("data numpy data_ptr storage untyped_storage batch_norm native_batch_norm __array__".split())
"""Names in the code of what writes to tensors without raising their `_version`."""
_MOST = 500
"""Functions that are looked through for one class; past them a class counts as one that may write."""


def is_published(module: nn.Module) -> bool:
    """Return whether a module is of a class of torch or transformers, and runs the forward that they wrote for it."""
    kind: Any = type(module)
    homes = kind.__module__, str(getattr(kind.forward, "__module__", ""))  # others may put a forward into the class
    return all(home.startswith(_PUBLISHED) for home in homes) and foreign_forward(module) is None


def writes_uncounted(module: nn.Module) -> bool:
    """Return whether a module's forward may write to tensors without raising the count of writes, by its code."""
    if is_published(module):
        return isinstance(module, nn.modules.batchnorm._NormBase) and module.num_batches_tracked is None
    return _names_uncounted(type(module), foreign_forward(module) or type(module).forward)


def _names_uncounted(kind: Any, forward: Any) -> bool:
    """Follow what a forward calls: functions by their names, methods of its class, what stands in closures."""
    waiting, seen = [forward], set[Any]()
    while waiting:
        function = waiting.pop()
        while not isinstance(function, FunctionType):
            function = getattr(function, "__func__", None) or getattr(function, "func", None)
            if function is None:
                break
        if function is None or function in seen or str(function.__module__).startswith(_PUBLISHED):
            continue
        seen.add(function)
        names = _names(function.__code__)
        if not _UNCOUNTED.isdisjoint(names) or len(seen) > _MOST:
            return True
        waiting += [found for name in names if callable(found := function.__globals__.get(name))]
        waiting += [found for name in names if isinstance(found := getattr(kind, name, None), FunctionType)]
        held = (value for cell in function.__closure__ or () for value in contents(cell))
        waiting += [value for value in held if isinstance(value, FunctionType | MethodType)]
    return False


@cache
def _names(code: CodeType) -> frozenset[str]:
    return frozenset(name for inner in codes_in(code) for name in inner.co_names)


class OwnOnWrite(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives parameters that a forward writes to memory of their own, just before the write; what else is shared stays.

    Tensors on the old memory that the forward has already made are moved when they are written to.
    """

    def __init__(self, modules: list[nn.Module], wrote: Callable[[nn.Module, str, Tensor], None] | None = None) -> None:
        """`wrote` is told of each such parameter: the module, the name, and the value before."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._wrote = wrote
        self._shared: dict[int, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        """Parameters by the storage that they are on."""
        self._moved: dict[int, tuple[Any, Any]] = {}
        """Storages that were left: (the old one, the new one)."""
        for module in modules:
            for name, parameter in module._parameters.items():
                if type(parameter) is nn.Parameter and not parameter.is_meta:
                    self._shared.setdefault(_key(parameter), []).append((module, name, parameter))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            self._before_write(tensor)
        return func(*args, **kwargs)

    @torch.no_grad()
    def _before_write(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return
        key = _key(tensor)
        if (homes := self._shared.pop(key, None)) is not None:
            for module, name, parameter in homes:
                if self._wrote is not None:
                    self._wrote(module, name, parameter.detach().clone())
            old: Any = tensor.untyped_storage()
            self._moved[key] = old, old.clone()
            for parameter in {id(parameter): parameter for _, _, parameter in homes}.values():
                parameter.data = _on(self._moved[key][1], parameter)
        if key in self._moved and _key(tensor) == key:
            tensor.set_(*_placed(self._moved[key][1], tensor))


def _key(tensor: Tensor) -> int:
    return identity(tensor.untyped_storage())


def _placed(storage: Any, like: Tensor) -> tuple[Any, int, torch.Size, tuple[int, ...]]:
    return storage, int(like.storage_offset()), like.size(), like.stride()


def _on(storage: Any, like: Tensor) -> Tensor:
    """Return a tensor like another one, on another storage of the same form."""
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(*_placed(storage, like))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    schema = func._schema  # noqa: SLF001 (what torch calls it)
    for index, argument in enumerate(schema.arguments if schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (value for value in tree_iter(given) if isinstance(value, Tensor))
