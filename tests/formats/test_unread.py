"""The files of a foreign directory, before anything is made of them."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.formats.unread import Unread


def test_tensors_come_in_one_order_each_time(tmp_path):
    # safetensors gives another one at each call; what is made of the places must not depend on it.
    tensors = {f"layers.{n}.weight": torch.full((2,), float(n)) for n in range(40)}
    save_file(tensors, tmp_path / "weights.safetensors")
    found = [Unread(tmp_path).tensors("weights.safetensors") for _ in range(3)]
    assert [list(each) for each in found] == [sorted(tensors)] * 3
    assert all(torch.equal(found[0][key], tensors[key]) for key in tensors)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def said(folder, file):
    with pytest.raises(DeltaSpecError) as error:
        Unread(folder).tensors(file)
    (finding,) = error.value.diagnostics
    return f"{finding.code} {finding.message}; {finding.suggestion}"


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"a": torch.ones(2), "b": Code()}, f"it holds code, {os.name}.mkdir, of which nothing was run"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is sparse, quantised or without values"),
        ({"a": torch.ones(2, device="meta")}, "'a' is sparse, quantised or without values"),
    ],
    ids=["code", "sparse", "meta"],
)
def test_pickles_of_more_than_plain_tensors(tmp_path, monkeypatch, held, words):
    monkeypatch.chdir(tmp_path)
    torch.save(held, tmp_path / "weights.bin")
    found = said(tmp_path, "weights.bin")
    assert f"DS522 is no file of tensors: {words}" in found
    assert "weights_only" not in found  # torch's own text says how to run it
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_that_are_no_pickles_of_torch(tmp_path):
    (tmp_path / "weights.bin").write_bytes(pickle.dumps({"a": 1}))
    assert "it is no pickle of tensors alone" in said(tmp_path, "weights.bin")
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "it ends too early" in said(tmp_path, "weights.bin")


@pytest.mark.parametrize("file", ["weights.bin", "weights.safetensors"])
def test_a_pointer_of_git_lfs_says_how_to_fetch_it(tmp_path, file):
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    assert said(tmp_path, file) == "DS522 is a pointer of Git LFS, not the file itself; fetch it: git lfs pull"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "weights.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert "DS521 cannot be read: it is a pipe or a device" in said(tmp_path, "weights.safetensors")
    with pytest.raises(DeltaSpecError, match="DS521. cannot be read: it is a pipe or a device"):
        Unread(tmp_path).json("config.json")
