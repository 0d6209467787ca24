import pytest
from bottlenecks import follows, keeps_promises
from torch.nn import functional as F
from weight_methods import bert, check_training, compiled, gpt2, llama, net, refusal


def bottleneck(t, h):
    down, up = t.down_left @ t.down_right, t.up_left @ t.up_right
    return F.gelu(h @ down.T + t.down_bias, approximate="tanh") @ up.T + t.up_bias


@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_an_adapter_whose_projections_are_products(rank):
    params = {"width": 4, "rank": rank, "scale": 0.5}
    follows("low_rank_adapter", params, lambda t, x, host: host(x) + 0.5 * bottleneck(t, host(x)))
    follows("low_rank_adapter", params | {"position": "before"}, lambda t, x, host: host(x + 0.5 * bottleneck(t, x)))


@pytest.mark.parametrize("made", [bert, gpt2, llama])
def test_it_keeps_its_promises(made):
    keeps_promises(made(), "low_rank_adapter", {"reduction": 8}, {"role": ["attn.o", "mlp.down"]}, identity=True)
    keeps_promises(made(), "low_rank_adapter", {"rank": 2, "dropout": 0.1}, {"role": "block"}, identity=True)


def test_it_learns():
    check_training("low_rank_adapter", {"reduction": 4, "rank": 2}, {"role": ["attn.o", "mlp.down"]})


def test_factors_start_as_glorots():
    c = compiled(*bert(), "low_rank_adapter", {"width": 8, "rank": 2}, {"role": "mlp.down"})
    down = c.deltas["d"].tensor("encoder.layer.0.output.dense.down_right")
    bound = (6 / (2 + 32)) ** 0.5
    assert 0.9 * bound < down.abs().max() <= bound


def test_refusals():
    assert "channels first" in refusal(*net(), "low_rank_adapter", {}, "conv")
