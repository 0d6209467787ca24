"""What one forward of a model shows: which modules it calls, how wide their hidden states are, whose weights it reads
without calling them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from deltaspec.backbone.attention import AttentionShape
from deltaspec.backbone.flow import METADATA, Fate
from deltaspec.names.paths import is_inside


class Passage(NamedTuple):
    """One call of a module. Moments count what was entered and left in the forward."""

    entered: int
    left: int
    entering: tuple[int, ...] | None
    """Positions of the hidden state that entered (all dimensions but the last); None where none did."""
    leaving: tuple[int, ...] | None
    """Positions of the hidden state that left."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The findings of one forward about one module."""

    called: bool
    in_width: int | None = None
    """Last dimension of the hidden state that entered."""
    width: int | None = None
    """Last dimension of the hidden state that left."""
    host: str | None = None
    """FQN of the module whose forward read this one's parameters, instead of calling it or besides."""
    reads: tuple[str, ...] | None = None
    """Own names of the parameters that the host reads; None: all."""
    attention: AttentionShape | None = None
    """Shape of what its attention function was given."""
    dims: int | None = None
    """Number of dimensions of the hidden state that left."""
    moves: bool = False
    """Whether what left has other positions (all dimensions but the last) than what entered."""
    bypass: str | None = None
    """FQN of the module that reads this one's parameters without calling it, in one of the ways to call the model."""
    fate: Fate = "used"
    """Fate of what left it, or its host."""
    calls: tuple[Passage, ...] = ()
    """Its calls, in order."""

    def useless(self, kind: str, weight: bool) -> tuple[str, str] | None:
        """Return why a delta at a module of this kind, in its `weight` or around it, does nothing, and the way out."""
        if self.fate == "idle":
            reason = f"nothing that the model gives is computed from what leaves this {kind}"
            return f"{reason}, so a delta there would do nothing", "leave it out, or pass other example_inputs"
        if self.fate == "still" and weight:
            reason = f"this {kind} runs without gradients, so a delta of its weights could not be trained"
            return reason, "leave it out, or use a method around the call (adapter)"
        return None


class _Reads(TorchFunctionMode):
    """Notes which parameters functions take, and in whose forward."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _looks_only(func):
            for value in tree_iter((args, kwargs or {})):
                if isinstance(value, nn.Parameter):
                    self.recorder.read(value)
        return func(*args, **(kwargs or {}))


class Recorder:
    """Records one forward of a model: a context manager around the call. It leaves no hook behind."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._thread = get_ident()
        self._stack: list[str] = []
        self._entered: list[tuple[int, tuple[int, ...] | None]] = []
        """When each module on the stack was entered, and positions of what did."""
        self._moment = 0
        self._calls: dict[str, list[Passage]] = {}
        self._seen: dict[str, Observation] = {}
        self._readers: dict[str, set[str]] = {}
        self._reads: dict[str, set[str]] = {}
        self._names = {id(m): fqn for fqn, m in reversed(list(model.named_modules(remove_duplicate=False)))}
        self._owners: dict[int, dict[str, str]] = {}
        for fqn, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), {})[fqn] = name

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside this context, in this thread."""
        self._thread = get_ident()
        handles = []
        try:
            for module in self._model.modules():
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            # A model whose methods carry `torch.compile` is run as it is written.
            with torch.compiler.set_stance("force_eager"), _Reads(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, parameter: nn.Parameter) -> None:
        """Note that the module whose forward runs now reads a parameter."""
        reader = self._stack[-1] if self._stack else ""
        owners = self._owners.get(id(parameter), {})
        for owner, name in owners.items() if reader not in owners else ():
            self._readers.setdefault(owner, set()).add(reader)
            self._reads.setdefault(owner, set()).add(name)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != self._thread:
            return
        fqn = self._names.get(id(module))
        if fqn is None:  # a stand-in for a module: what it reads, it reads for whoever runs it
            self._stack.append(self._stack[-1] if self._stack else "")
            return
        self._stack.append(fqn)
        entering = args[0] if args else _first(type(module).forward, kwargs)
        self._entered.append((self._next(), _positions(entering)))
        width = _width(entering)
        before = self._seen.get(fqn)
        self._seen[fqn] = Observation(True, before.in_width if before else width, before.width if before else None)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if get_ident() != self._thread:
            return
        fqn = self._stack.pop()
        if id(module) not in self._names:
            return
        hidden, (moment, entered) = _hidden(output), self._entered.pop()
        dims, left = None if hidden is None else hidden.dim(), _positions(output)
        moves = entered is not None and left is not None and entered != left
        self._calls.setdefault(fqn, []).append(Passage(moment, self._next(), entered, left))
        self._seen[fqn] = Observation(True, self._seen[fqn].in_width, _width(output), dims=dims, moves=moves)

    def _next(self) -> int:
        self._moment += 1
        return self._moment

    def result(self) -> dict[str, Observation]:
        """Return what was seen of every module, by each of its names."""
        result: dict[str, Observation] = {}
        for fqn, module in self._model.named_modules(remove_duplicate=False):
            name = self._names[id(module)]
            found = replace(self._seen.get(name, Observation(False)), calls=tuple(self._calls.get(name, ())))
            # A parametrisation, for one, hands its own parameters to its children.
            if readers := {r for r in self._readers.get(name, ()) if not is_inside(r, name)}:
                # Whoever stands above both the module and all its readers can run with another weight in its place.
                host = common([fqn.rpartition(".")[0], *readers])
                reads = None if found.called else tuple(sorted(self._reads[name]))
                found = replace(found, host=host, reads=reads)
            result[fqn] = found
        return result


def _looks_only(func: Any) -> bool:
    """Return whether a function looks at a tensor's form alone. A getter of a property may give its values."""
    name = getattr(func, "__name__", "")
    return name in METADATA and not (name == "__get__" and getattr(func.__self__, "__name__", "") in _TRANSPOSED)


_TRANSPOSED = frozenset({"T", "mT", "H", "mH"})


def common(names: list[str]) -> str:
    """Return the innermost module that holds all of these."""
    split = zip(*(name.split(".") if name else [] for name in names), strict=False)
    return ".".join(segments[0] for segments in takewhile(lambda segments: len(set(segments)) == 1, split))


def _first(forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument that a forward takes first, whatever the order of the keywords in a call."""
    names = list(inspect.signature(forward).parameters)[1:2]
    return kwargs[names[0]] if names and names[0] in kwargs else next(iter(kwargs.values()), None)


def _width(value: Any) -> int | None:
    hidden = _hidden(value)
    return None if hidden is None else hidden.shape[-1]


def _positions(value: Any) -> tuple[int, ...] | None:
    hidden = _hidden(value)
    return None if hidden is None else tuple(hidden.shape[:-1])


def _hidden(value: Any) -> Tensor | None:
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    elif isinstance(value, tuple | list):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point() else None
