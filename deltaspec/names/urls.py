"""Names of servers."""

from __future__ import annotations


def is_url(name: str) -> bool:
    """Return whether a name is the URL of a server, and so not of a file or of another kind of place."""
    return name.startswith(("http://", "https://"))
