"""Who may use one view when: many forwards at once, or one switch, or one forward with rows.

A forward counts itself in and out, by thread, wherever it was called from (`c(...)`, `c.backbone(...)`, a step of
`generate`, DistributedDataParallel). A switch looks at that count, so that it costs next to nothing; and a forward that
starts while another thread switches waits for those microseconds. What torch.compile made is not counted: it reads all
that a switch writes when it starts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from torch import nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.runtime.forks import guard
from deltaspec.runtime.generation import unwatch, watch
from deltaspec.runtime.interrupts import surely
from deltaspec.runtime.pickled_alone import Part

_GATE = "_deltaspec_gate"
_TRACED = "_deltaspec_traced"
_COUNTING = (_GATE, _TRACED, "_call_impl", "_apply")
INSTALLED = (*_COUNTING, "generate")
"""What `install` sets in the `__dict__` of a backbone, and of its parts that generate."""
_compiling = torch.compiler.is_compiling


class ForwardGate(Part):
    """Keeps the threads of one view apart."""

    __slots__ = (
        "after", "before", "closed", "failed", "first", "forked", "lock", "moving", "rows", "running", "traced",
    )  # fmt: skip

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by whoever switches."""
        self.running: dict[int, int] = {}
        """How deep each thread is in forwards of the backbone."""
        self.closed = False
        """Whether a forward that starts must ask first: someone switches, or runs rows."""
        self.forked = False
        """Whether this is a child process whose parent was in the midst of something here when it forked."""
        self.rows: int | None = None
        """The thread that runs rows."""
        self.before: Callable[[], Callable[[], None] | None] | None = None
        """Called before each outermost forward; what it returns is called after that."""
        self.failed: Callable[[Exception], None] | None = None
        """Called with what an outermost forward raised; may raise something clearer in its place."""
        self.traced: Callable[[], None] | None = None
        """Called while torch.compile or torch.export traces a forward; may raise."""
        self.after: Callable[[Any], None] | None = None
        """Called with the output of each outermost forward that autograd records."""
        self.first: Callable[..., Any] | None = None
        """Runs an outermost forward, given what would run it and its module, for as long as it wants to see some."""
        self.moving: Callable[[Any], None] | None = None
        """Called before the backbone is moved or cast, with the function that does it; may raise."""
        guard(self, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardGate:
        made = memo[id(self)] = ForwardGate()  # a copy of a model runs nothing yet
        return made

    def after_fork(self, *, torn: bool) -> None:
        """Forget, in a child process, the threads that are not there any more.

        Where one ran rows, or was `torn` from a lock, nobody knows what this view is like, and it refuses to go on.
        """
        me = get_ident()
        for thread in [thread for thread in self.running if thread != me]:
            del self.running[thread]
        self.forked = self.forked or self.rows not in (None, me) or torn
        if self.forked:
            self.rows, self.closed = _NOBODY, True

    @contextmanager
    def switching(self, *, with_rows: bool = False) -> Iterator[None]:
        """Let no forward run inside. Raises DeltaSpecError (DS456) where one runs already, in whatever thread.

        `with_rows`: what this thread does before and after a forward with rows is none.
        """
        with self.lock:
            closed, self.closed = self.closed, True
            try:
                if self.running or not with_rows or self.rows != get_ident():
                    self.require_none()
                yield
            finally:
                self.closed = closed

    def require_none(self) -> None:
        """Raise DeltaSpecError (DS456) where a forward runs. To be called with the lock held and the view closed."""
        if self.forked:
            raise _torn()
        if self.running or self.rows is not None:
            inside = get_ident() in self.running or self.rows == get_ident()
            where = "inside a forward" if inside else "while another thread runs a forward"
            message = f"the active set cannot change {where} of the same view: the rest of it would run on other deltas"
            raise DeltaSpecError([Diagnostic("DS456", message, file="<model>", suggestion=_WAY_OUT)])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let only this thread run forwards inside: they have rows. Raises DeltaSpecError (DS445) where one runs."""
        me, mine = get_ident(), False
        try:
            with self.lock:
                closed, self.closed = self.closed, True
                if self.running or self.rows is not None:
                    self.closed = closed
                    raise _torn() if self.forked else _rows_elsewhere(me in self.running or self.rows == me)
                mine = True
                self.rows = me
            yield
        finally:
            if mine:
                surely(self._open)

    def _open(self) -> None:
        with self.lock:
            self.rows, self.closed = None, False

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Count what runs inside as one forward of this thread."""
        me = get_ident()
        depth = self.running.get(me, 0)
        try:
            self.running[me] = depth + 1
            if self.closed and not depth:
                self.wait(me)
            yield
        finally:
            self.leave(me, depth)

    def leave(self, me: int, depth: int) -> None:
        """Count a forward of a thread out."""
        if depth:
            self.running[me] = depth
        else:
            self.running.pop(me, None)

    def wait(self, me: int) -> None:
        """Let a forward that has counted itself in wait for a switch. Raises DeltaSpecError (DS445) for rows."""
        if self.rows == me:
            return
        del self.running[me]
        with self.lock:
            self.running[me] = 1
            if self.rows is not None:
                raise _torn() if self.forked else _rows_elsewhere(False, beside_rows=True)


def install(backbone: nn.Module, gate: ForwardGate) -> None:
    """Let the forwards of a backbone count themselves, and moves of it ask first.

    By entries of its own `__dict__` that hooks, signatures and whatever sets `forward` do not see.
    """
    backbone.__dict__[_GATE] = gate

    def traced() -> bool:
        if gate.traced is not None:
            gate.traced()
        return True

    backbone.__dict__[_TRACED] = _for_real(traced)
    backbone.__dict__["_call_impl"] = MethodType(_call_impl, backbone)
    backbone.__dict__["_apply"] = MethodType(_apply, backbone)
    watch(backbone)


def _for_real(function: Callable[[], bool]) -> Any:
    """Let a function run in a trace instead of being traced."""
    return torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]


def remove(backbone: nn.Module) -> None:
    """Undo `install`, on a copy of a backbone."""
    for name in _COUNTING:
        backbone.__dict__.pop(name, None)
    unwatch(backbone)


def _call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the module's hooks and forward, counted."""
    if _compiling():
        self.__dict__[_TRACED]()
        return type(self)._call_impl(self, *args, **kwargs)  # type: ignore[no-untyped-call]
    return through(self.__dict__[_GATE], self, type(self)._call_impl, args, kwargs)


def through(
    gate: ForwardGate, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a forward of a backbone, or of what stands around it, counted."""
    me, running = get_ident(), gate.running
    depth = running.get(me, 0)
    then = None if depth or gate.before is None else gate.before()
    try:
        running[me] = depth + 1
        if gate.closed and not depth:
            gate.wait(me)
        if gate.first is None or depth:
            output = run(module, *args, **kwargs)
        else:
            output = gate.first(run, module, *args, **kwargs)
    except Exception as error:
        if not depth and gate.failed is not None:
            gate.failed(error)
        raise
    finally:
        gate.leave(me, depth)
        if then is not None:
            then()
    if gate.after is not None and not depth and torch.is_grad_enabled():
        gate.after(output)
    return output


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> Any:
    """Move or cast the module, unless it may not be."""
    moving = self.__dict__[_GATE].moving
    if moving is not None:
        moving(fn)
    return type(self)._apply(self, fn, recurse)  # type: ignore[no-untyped-call]


_NOBODY = -1
"""A thread that there is not."""


def _torn() -> DeltaSpecError:
    message = "this process was forked while another thread changed this view, or ran rows in it: here that never ends"
    hint = "fork before such threads start, or start processes by spawn"
    return DeltaSpecError([Diagnostic("DS466", message, file="<model>", suggestion=hint)])


_WAY_OUT = "give each thread a view of its own: view = c.view()"


def _rows_elsewhere(inside: bool, beside_rows: bool = False) -> DeltaSpecError:
    where = "inside another forward of" if inside else "while another forward runs in"
    message = f"a forward with rows cannot run {where} the same view"
    if beside_rows:
        message = "no other forward can run while one with rows runs in the same view"
    return DeltaSpecError([Diagnostic("DS445", message, file="<model>", suggestion=_WAY_OUT)])
