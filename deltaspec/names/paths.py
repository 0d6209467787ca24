"""Names of modules and what is below them."""

from __future__ import annotations


def below(fqn: str, name: str) -> str:
    """Return the name of what a module holds under a name of its own; the root has none to put before it."""
    return f"{fqn}.{name}" if fqn else name


def is_inside(fqn: str, container: str) -> bool:
    """Return whether a name is a module's own or lies below it; everything lies in the root."""
    return not container or fqn == container or fqn.startswith(container + ".")
