import pytest
import torch
from torch import nn
from weight_methods import bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal, run, stir

from deltaspec.testing import check_method

ALL = {"role": ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "norm"]}


def test_it_is_the_papers_formula():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval(), torch.randn(2, 3, 6, 6)
    c = compiled(model, x, "ssf", {}, {"path": ["0", "1", "2"]})
    stir(c)
    h = x
    for name, layer in model.named_children():
        scale, shift = (c.deltas["d"].tensor(f"{name}.{tensor}") for tensor in ("scale", "bias"))
        h = scale[:, None, None] * layer(h) + shift[:, None, None]
    torch.testing.assert_close(c(x), h)


def test_it_keeps_its_promises():
    check(bert(), "ssf", {}, ALL)
    check(gpt2(), "ssf", {}, {"role": ["attn.qkv", "mlp.down", "norm"]})
    check(net(), "ssf", {}, {"path": ["fc", "out", "conv", "grouped", "conv1"]})
    check_bypassed("ssf", {})
    check_training("ssf", {}, ALL)


def test_norms_without_a_bias_work_but_do_not_merge():
    model, inputs = llama()
    c = compiled(model, inputs, "ssf", {}, {"role": "norm"})
    assert torch.equal(run(c, inputs), run(model, inputs))
    with pytest.raises(Exception, match="no place for a bias"):
        c.merge("d")


@pytest.mark.parametrize("method", ["ssf", "bitfit"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_over_several_dimensions_shifts_along_the_last(method, bias):
    norm = nn.LayerNorm((5, 7), bias=bias)
    nn.init.normal_(norm.weight)
    check_method(method, nn.Sequential(norm).eval(), torch.randn(3, 5, 7), target="0")


def test_the_authors_start():
    check(bert(), "ssf", {"init": "normal"}, ALL, identity=False)
    c = compiled(*bert(), "ssf", {"init": "normal"}, ALL)
    scales = torch.cat([p for n, p in c.deltas["d"].named_parameters() if n.endswith("scale")])
    shifts = torch.cat([p for n, p in c.deltas["d"].named_parameters() if n.endswith("bias")])
    assert abs(scales.mean() - 1) < 0.004 and abs(scales.std() - 0.02) < 0.004
    assert abs(shifts.mean()) < 0.004 and abs(shifts.std() - 0.02) < 0.004


def test_refusals():
    assert "Embedding" in refusal(*net(), "ssf", {}, "emb")
    assert "BertLayer" in refusal(*bert(), "ssf", {}, {"role": "block"})
