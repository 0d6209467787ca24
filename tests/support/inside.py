"""What no public name tells of a compiled model, looked up in this one place."""

from __future__ import annotations

from typing import Any

from deltaspec.compiler.compiled import CompiledModel


def gate(compiled: CompiledModel) -> Any:
    """Return what lets forwards, switches and rows into a view."""
    return compiled._host.gate


def builder(compiled: CompiledModel) -> Any:
    """Return what builds the programs of a view."""
    return compiled._active.builder


def program(compiled: CompiledModel, *names: str) -> Any:
    """Return the program of an active set."""
    return compiled._active.program(names)


KEPT = "deltaspec.runtime.programs._MOST"
"""Where the number of programs that are kept at least is written."""


def programs_kept(compiled: CompiledModel) -> int:
    """Count the programs that a view keeps, by the way of finding them that has most."""
    return len(compiled._active.programs)


def unproven(compiled: CompiledModel) -> set[str]:
    """Return the deltas whose sites no forward was seen to reach yet."""
    return set(compiled._shared.unproven)


def stacks(compiled: CompiledModel) -> Any:
    """Return the stacks that the deltas of a model, and of its libraries, lie in."""
    return compiled._shared.stacks


def rows_of_memory(compiled: CompiledModel) -> int:
    """Count the rows of all stacks, free ones included."""
    return sum(stack.capacity for alike in stacks(compiled)._stacks.values() for stack in alike)


def left(compiled: CompiledModel) -> int:
    """Count the tensors that are kept only because a kernel may still be reading them."""
    return sum(map(len, stacks(compiled)._left))
