import pytest
import torch
from bottlenecks import follows, keeps_promises
from published import planned
from torch.nn import functional as F
from weight_methods import bert, check_training, compiled, gpt2, llama, net, refusal, run

import deltaspec


def bottleneck(t, h, act=F.relu):
    return act(h @ t.down.T + t.down_bias) @ t.up.T + t.up_bias


def test_it_is_the_papers_formula_on_a_block_called_by_keyword():
    follows("parallel_adapter", {"width": 4}, lambda t, x, host: host(x) + 4 * bottleneck(t, x))
    params = {"reduction": 4, "scale": 0.5, "activation": "gelu"}
    follows("parallel_adapter", params, lambda t, x, host: host(x) + 0.5 * bottleneck(t, x, F.gelu))


def test_a_learned_scale_starts_as_given():
    params = {"width": 4, "learn_scale": True, "scale": 2.0}
    follows("parallel_adapter", params, lambda t, x, host: host(x) + t.scale * bottleneck(t, x))
    c = compiled(*bert(), "parallel_adapter", params, {"role": "attn"})
    assert c.deltas["d"].tensor("encoder.layer.0.attention.scale").tolist() == [2.0]


@pytest.mark.parametrize("made", [bert, gpt2, llama])
@pytest.mark.parametrize("params", [{}, {"reduction": 4, "dropout": 0.1, "learn_scale": True}])
def test_it_keeps_its_promises(made, params):
    keeps_promises(made(), "parallel_adapter", params, {"role": ["attn", "mlp"]}, identity=True)


def test_it_learns():
    check_training("parallel_adapter", {"width": 8}, {"role": ["attn", "mlp"]})


def test_input_and_output_may_differ_in_width():
    plan = planned(bert()[0], {"method": "parallel_adapter", "target": {"path": "encoder.layer.0.output.dense"}})
    assert [spec.shape for spec in plan.sites[0].tensors] == [(24, 48), (24,), (32, 24), (32,)]


def test_attention_and_feed_forward_by_default():
    c = deltaspec.compile(llama()[0], {"deltaspec": 1, "deltas": [{"name": "d", "method": "parallel_adapter"}]})
    assert {site.fqn.rpartition(".")[2] for site in c.plan.sites} == {"self_attn", "mlp"}
    assert torch.equal(run(c, llama()[1]), run(*llama()))


def test_refusals():
    assert "ids" in refusal(*net(), "parallel_adapter", {}, "emb")
    assert "channels first" in refusal(*net(), "parallel_adapter", {}, "conv")
