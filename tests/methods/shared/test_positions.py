"""Which positions are tokens: masks of every form tell the same ones, or are refused."""

import pytest
import torch

from deltaspec.methods.shared.positions import real_tokens


def test_masks_of_every_form_tell_the_same_tokens():
    h, told = torch.zeros(1, 3, 8), torch.tensor([[False, True, True]])
    seen = torch.ones(3, 3).tril().bool() & told[:, None]
    additive = torch.zeros(1, 1, 3, 3).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    for mask in (told, told.long(), told.float(), seen, seen[:, None], told[:, None, None], additive):
        assert torch.equal(real_tokens(h, True, mask).real, told)
    assert real_tokens(h, True, None).real is None


def test_masks_that_tell_nothing_are_refused_at_run_time():
    h = torch.zeros(2, 3, 8)
    with pytest.raises(TypeError, match="attention mask of type dict"):
        real_tokens(h, True, {})
    with pytest.raises(TypeError, match="2 columns, and the hidden state 3 positions"):
        real_tokens(h, True, torch.ones(2, 2))
    with pytest.raises(TypeError, match="batch, positions, width"):
        real_tokens(h[0], True, None)
