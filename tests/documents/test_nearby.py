"""What lies beside a path that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaspec.documents.nearby import did_you_mean, near_path


def test_the_nearest_name_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "french").mkdir()
    (tmp_path / "german.yaml").write_text("")
    assert near_path(tmp_path / "frnech") == str(tmp_path / "french")
    assert near_path(f"{tmp_path}/frnech/") == str(tmp_path / "french")
    monkeypatch.chdir(tmp_path)
    assert near_path("germn.yaml") == "german.yaml"
    assert did_you_mean("frech", "look again") == "did you mean french? or look again"


@pytest.mark.parametrize("path", ["entirely-else", "no/such/folder/french", "", "a\0b", "french"])
def test_nothing_near(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "french").mkdir()
    assert did_you_mean(path, "look again") == "look again"
