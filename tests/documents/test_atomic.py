"""Many files that appear together: one sync for all, the last one after the others."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from deltaspec.documents.atomic import Together


@pytest.mark.parametrize("count", [3, 80])
def test_many_files_are_synced_at_once(tmp_path, monkeypatch, count):
    synced, placed = [], []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real_sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (placed.append(b.name), real_replace(a, b)))
    with Together(tmp_path) as files:
        for number in range(count):
            files.add(f"{number}.txt", str(number).encode())
        assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
        files.appear("last.txt", b"last")
    assert sorted(os.listdir(tmp_path)) == sorted([*(f"{n}.txt" for n in range(count)), "last.txt"])
    assert all((tmp_path / f"{n}.txt").read_text() == str(n) for n in range(count))
    assert placed[-1] == "last.txt"
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "syncfs"):
        assert len(synced) == (2 if count == 80 else count + 3)  # the directory, twice


def test_what_raises_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Together(tmp_path) as files:
        files.add("a.txt", b"a")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
