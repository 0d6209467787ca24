"""The files of a foreign directory, before anything is made of them."""

import torch
from safetensors.torch import save_file

from deltaspec.formats.unread import Unread


def test_tensors_come_in_one_order_each_time(tmp_path):
    # safetensors gives another one at each call; what is made of the places must not depend on it.
    tensors = {f"layers.{n}.weight": torch.full((2,), float(n)) for n in range(40)}
    save_file(tensors, tmp_path / "weights.safetensors")
    found = [Unread(tmp_path).tensors("weights.safetensors") for _ in range(3)]
    assert [list(each) for each in found] == [sorted(tensors)] * 3
    assert all(torch.equal(found[0][key], tensors[key]) for key in tensors)
