"""Gradient checkpointing: a backward that runs parts of a forward again, and must find the deltas that it had.

The check is hung onto the outputs' nodes of the autograd graph, and runs when a backward starts there. Where the active
set is what it was, as almost always, that is all. Where it is not, and the forward was checkpointed, the gradient would
be that of another model, in silence; without checkpointing the graph holds all it needs, and nothing is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from types import CodeType
from typing import Any

from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


class Recomputation:
    """Watches the backwards of one view."""

    def __init__(self, modules: Iterable[Any], state: Callable[[], Any]) -> None:
        self._all, self._state = modules, state
        self._modules: list[Any] | None = None
        """Modules with a flag for checkpointing, as transformers' have; None: not looked for yet."""
        self._suspect = False
        """Whether other modules have forwards that could checkpoint."""

    def after(self, output: Any) -> None:
        """Take the output of a forward, if parts of it may run again in its backward."""
        if self._modules is None:
            found = [m for m in self._all if hasattr(m, "gradient_checkpointing")]
            others: set[Any] = {type(m) for m in self._all}
            others -= {type(m) for m in found}
            self._modules, self._suspect = found, any(_mentions_it(kind) for kind in others)
        certain = any(module.gradient_checkpointing and module.training for module in self._modules)
        if not certain and not self._suspect:
            return
        state = self._state()
        nodes = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
        known: list[bool] = [True] if certain else []

        def check(_: Any, root: Any) -> None:
            if self._state() == state:
                return
            known[:] = known or [_recomputes(root)]
            if known[0]:
                raise DeltaSpecError([_other_deltas(state[0], self._state()[0], bool(state[2]))])

        for node in nodes:
            node.register_prehook(partial(check, root=node))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a module gives: in mappings, tuples and lists, of whatever depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value)


@cache
def _mentions_it(kind: Any) -> bool:
    """Return whether the forward of a class may call torch.utils.checkpoint, by the names in its code."""
    return any(_names_it(getattr(inspect.unwrap(f), "__code__", None), f) for f in (kind.forward, kind.__call__))


def _names_it(code: CodeType | None, function: Any) -> bool:
    if code is None:
        return False
    known = getattr(inspect.unwrap(function), "__globals__", {})
    for name in (*code.co_names, *code.co_freevars):
        if "checkpoint" in name or getattr(known.get(name), "__module__", None) == "torch.utils.checkpoint":
            return True
    return any(_names_it(inner, function) for inner in code.co_consts if isinstance(inner, CodeType))


def _recomputes(root: Any) -> bool:
    """Return whether a graph has steps that run a forward again: reentrant ones, or tensors packed by hooks."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward" or any(_is_packed(saved) for saved in _saved(node)):
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return False


def _saved(node: Any) -> Iterator[Any]:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            value = getattr(node, name)
            yield from value if isinstance(value, tuple | list) else (value,)


def _is_packed(saved: Any) -> bool:
    """Return whether a saved tensor has hooks; torch says so only when one sets some."""
    try:
        saved.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError as error:
        return "already been set" in str(error)  # were it said otherwise, test_forward_gate would see no refusal
    return False


def _other_deltas(before: tuple[str, ...], now: tuple[str, ...], rows: bool) -> Diagnostic:
    if rows:
        message = "gradient checkpointing would run the forward again without its rows"
        hint = "turn it off for mixed batches: gradient_checkpointing_disable()"
    else:
        names = [", ".join(map(repr, names)) or "no delta" for names in (before, now)]
        message = f"gradient checkpointing would run the forward, which had {names[0]}, again with {names[1]}"
        hint = "run the backward before the switch, with the same deltas at the same strengths"
    return Diagnostic("DS457", message, file="<model>", suggestion=hint)
