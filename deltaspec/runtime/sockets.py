"""Sockets: what stands in the `forward` of a host, one object for as long as the model lives.

A socket is a `functools.partial` of which a switch replaces the content. So a wrapper that another library puts around
it stays around whatever acts next, a call costs no frame, and torch.compile guards on the content, as on that of any
partial: deltas of one kind share one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from deltaspec.backbone.copying import copy_held
from deltaspec.backbone.forwards import own_forward
from deltaspec.backbone.wrappers import reaches

Forward = Callable[..., Any]
State = tuple[Any, tuple[Any, ...], dict[str, Any], None]
"""What `functools.partial.__setstate__` takes."""


def state_of(forward: Forward) -> State:
    """Return what makes a partial call this."""
    if type(forward) is functools.partial:
        return forward.func, forward.args, forward.keywords, None
    if type(forward) is MethodType:
        return forward.__func__, (forward.__self__,), {}, None
    return forward, (), {}, None


class Socket:
    """The place of one host's forward."""

    __slots__ = ("call", "idle", "module", "original")

    def __init__(self, module: nn.Module, call: functools.partial[Any] | None = None) -> None:
        """`call` is what a wrapper of another library leads to already, if one does."""
        self.module = module
        self.original: Forward | None = None
        """Instance-level forward of another library that the module has without any delta, if it has one."""
        self.idle: Forward = own_forward(module)
        """What the module runs without any delta."""
        self.call: functools.partial[Any] = functools.partial(self.idle) if call is None else call
        """What stands in the module's `__dict__` while deltas need it, or beneath a wrapper that was put around it."""
        top = module.__dict__.get("forward")
        self.rebase(None if call is not None and reaches(top, call, module) else top)

    def __deepcopy__(self, memo: dict[int, Any]) -> Socket:
        """Copy together with the model."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name in self.__slots__:
            setattr(twin, name, copy_held(getattr(self, name), self.module, memo))
        return twin

    def rebase(self, original: Forward | None, run: Forward | None = None) -> None:
        """Take a forward of another library, or None, for the one that the module has without any delta.

        `run` is what runs it, if not that itself.
        """
        self.original, self.idle = original, run or original or own_forward(self.module)
        self.write(self.idle)

    @property
    def fill(self) -> Callable[[State], None]:
        """What a switch calls, with a state: it replaces the content in one step."""
        setter: Callable[[State], None] = self.call.__setstate__  # type: ignore[attr-defined]  # typeshed leaves it out
        return setter

    @property
    def content(self) -> Forward:
        """What runs now."""
        return functools.partial(self.call.func, *self.call.args, **self.call.keywords)

    def write(self, forward: Forward) -> None:
        """Let this run."""
        self.fill(state_of(forward))

    def enter(self) -> None:
        """Put it where the module's forward is looked for, unless another library's wrapper around it is there."""
        attributes = self.module.__dict__
        if attributes.get("forward") is self.original:
            attributes["forward"] = self.call

    def leave(self) -> None:
        """Let the module's own forward run; take the socket out, unless another library's wrapper is around it."""
        self.write(self.idle)
        attributes = self.module.__dict__
        if attributes.get("forward") is self.call:
            if self.original is None:
                del attributes["forward"]
            else:
                attributes["forward"] = self.original

    def is_hidden(self, *, acting: bool) -> bool:
        """Return whether the module has a forward that neither is the expected one nor leads to it."""
        top = self.module.__dict__.get("forward")
        if top is self.call or (top is self.original and not acting):
            return False
        return not reaches(top, self.call, self.module)
