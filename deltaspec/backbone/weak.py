"""Copies of what leads to something weakly: weak references, and the handles that remove hooks."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

from deltaspec.backbone.holding import Reach


class WeakCopies(ABC):
    """The part of a copier that copies those."""

    def __init__(self, reach: Reach, memo: dict[Any, Any]) -> None:
        self._reach, self._memo = reach, memo
        self._later: list[Callable[[], None]] = []
        """What can be done when all is copied: weak references lead to what something else holds."""

    @abstractmethod
    def value(self, value: Any) -> Any:
        """Copy whatever a module, a container or a function holds."""

    def finish(self) -> None:
        """Do what could not be done before everything was copied."""
        for step in self._later:
            step()

    def reference(self, reference: weakref.ref[Any]) -> Any:
        """Copy a weak reference: to the copy of what it leads to, where that is part of the model."""
        target = reference()
        if target is None or id(target) not in self._reach.own:
            return reference
        twin = self._memo[id(reference)] = weakref.ref(self.value(target))
        return twin

    def proxy(self, proxy: Any) -> Any:
        """Copy a weak reference that answers for what it leads to."""
        try:
            target = proxy.__reduce__.__self__
        except ReferenceError:  # it leads nowhere any more
            return proxy
        if id(target) not in self._reach.own:
            return proxy
        twin = self._memo[id(proxy)] = weakref.proxy(self.value(target))
        return twin

    def handle(self, handle: RemovableHandle) -> Any:
        """Copy the handle of a hook: it removes the copied hook of the copied module."""
        twin = self._memo[id(handle)] = type(handle).__new__(type(handle))
        twin.__dict__.update(handle.__dict__)

        def bind() -> None:
            twin.hooks_dict_ref = self._weak(handle.hooks_dict_ref)
            twin.extra_dict_ref = tuple(map(self._weak, handle.extra_dict_ref))

        self._later.append(bind)
        return twin

    def _weak(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        target = reference()
        found = None if target is None else self._memo.get(id(target))
        return reference if found is None else weakref.ref(found)
