"""Progress is for terminals, and for work of many pieces."""

from __future__ import annotations

import io
import sys

import pytest

from deltaspec.diagnostics.progress import tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, count, shown", [(Terminal, 60, True), (Terminal, 5, False), (io.StringIO, 60, False)])
def test_progress_is_shown_where_someone_watches(monkeypatch, stream, count, shown):
    out = stream()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    assert list(tracked(range(count), "reading deltas", count)) == list(range(count))
    assert ("reading deltas" in out.getvalue()) is shown
