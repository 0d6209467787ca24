"""The parts of a graph that passes may touch, and the tensors that they may overwrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx

from deltaspec.names.paths import is_inside

_F = TypeVar("_F", bound=Callable[..., Any])
_NEW: set[Any] = set()


def result_is_new(function: _F) -> _F:
    """Mark a function whose result is new, or what it was allowed to overwrite."""
    _NEW.add(function)
    return function


@dataclass(frozen=True, slots=True)
class Scope:
    """One region's graph."""

    graph: fx.Graph
    owned: bool
    """Whether `base` gives a new tensor that nothing else holds."""
    home: str | None
    """FQN under which a whole model's graph finds its deltas; None where their tensors are the graph's inputs."""

    def is_delta_tensor(self, node: Any) -> bool:
        """Return whether a node is a tensor of a delta."""
        if not isinstance(node, fx.Node):
            return False
        if self.home is None:
            return node.op == "placeholder"
        return node.op == "get_attr" and is_inside(str(node.target), self.home)

    def may_overwrite(self, node: fx.Node, *users: fx.Node) -> bool:
        """Return whether these users may write into what a node gives: it is new, and nothing else reads it.

        The host's forward hooks do not see what `base` gives, but what leaves the region.
        """
        return set(node.users) == set(users) and self._is_new(node)

    def _is_new(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self.owned and node.target == "base"
        if node.op == "call_function":
            return node.target in _NEW
        if node.op == "call_method" and node.target == "to":  # may give its own argument
            source = node.args[0]
            assert isinstance(source, fx.Node)
            readers = {user for user in source.users if not (user.target is getattr and user.args[1:] == ("dtype",))}
            return readers == {node} and self._is_new(source)
        return False
