"""The directory on disk: missing, truncated and forged files, and manifests that are none, are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from saved_set import manifest, refused, rewrite


def test_no_directory_and_no_manifest(tmp_path):
    assert refused(tmp_path / "nowhere") == ["DS521"]
    assert refused(tmp_path) == ["DS521"]
    (tmp_path / "manifest.json").mkdir()
    assert refused(tmp_path) == ["DS521"]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file(saved, keep):
    path = saved / manifest(saved)["deltas"][1]["file"]
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(saved) == ["DS522"]


def test_a_truncated_file_whose_digest_was_made_to_fit(saved):
    path = saved / manifest(saved)["deltas"][1]["file"]
    path.write_bytes(path.read_bytes()[:-8])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(saved, lambda data: data["deltas"][1].update(file_sha256=digest))
    assert refused(saved) == ["DS522"]


def test_a_flipped_bit(saved):
    path = saved / manifest(saved)["deltas"][1]["file"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert refused(saved) == ["DS522"]


def test_a_pickle_in_place_of_safetensors(saved):
    path = saved / manifest(saved)["deltas"][1]["file"]
    torch.save({"head.up": torch.zeros(5, 3)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(saved, lambda data: data["deltas"][1].update(file_sha256=digest))
    assert refused(saved) == ["DS522"]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"text"', "{}", '{"deltaspec": 2}', '{"deltaspec": 1}',
        '{"deltaspec": 1, "backbone": {}, "deltas": [], "attached": []}',
        "[" * 100_000, "\0", "\ufeff{}",
    ],
)  # fmt: skip
def test_a_malformed_manifest(saved, text):
    (saved / "manifest.json").write_text(text)
    assert refused(saved) == ["DS522"]


def test_a_manifest_with_a_key_twice(saved):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text.replace('"attached": [', '"attached": [], "attached": [', 1))
    assert refused(saved) == ["DS522"]


def test_a_manifest_that_is_no_text(saved):
    (saved / "manifest.json").write_bytes(b"\xff\xfe\x00{")
    assert refused(saved) == ["DS522"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["deltas"][0].pop("file_sha256"),
        lambda data: data["deltas"][0].update(file=3),
        lambda data: data["deltas"].append("norms"),
        lambda data: data["deltas"].append(dict(data["deltas"][0])),
        lambda data: data.update(attached=["nobody"]),
        lambda data: data.update(attached="low"),
        lambda data: data.update(attached=[["low"]]),
        lambda data: data.update(attached=[1]),
        lambda data: data.update(strengths=["low"]),
        lambda data: data.update(strengths={"low": "much"}),
        lambda data: data.update(strengths={"low": float("nan")}),
        lambda data: data.update(strengths={"low": 10**400}),
        lambda data: data.update(backbone={"class": "x"}),
        lambda data: data.update(backbone=[]),
        lambda data: data.update(deltas={}),
        lambda data: data.update(deltaspec=True),
        lambda data: data["backbone"].update(weights=7),
    ],
)
def test_a_manifest_with_a_part_that_is_wrong(saved, change):
    rewrite(saved, change)
    codes = refused(saved)
    assert codes in (["DS522"], ["DS523"])


@pytest.mark.parametrize("field", ["file", "spec", "lock"])
@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/{}", "..", ".", "", "a\0b", "..\\{}"])
def test_a_manifest_that_points_out_of_its_directory(saved, field, name):
    original = manifest(saved)["deltas"][0][field]
    target = saved / "sub"
    target.mkdir()
    (target / original).write_bytes((saved / original).read_bytes())
    rewrite(saved, lambda data: data["deltas"][0].update({field: name.format(original)}))
    assert refused(saved) in (["DS522"], ["DS521"])


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_lock_that_was_damaged(saved, change):
    change(saved / manifest(saved)["deltas"][1]["lock"])
    assert refused(saved) in (["DS521"], ["DS522"])
