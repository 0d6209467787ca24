import pytest
import torch
from bottlenecks import follows, keeps_promises
from torch.nn import functional as F
from weight_methods import bert, check_training, compiled, gpt2, llama, net, refusal

import deltaspec


def matrix(rule, left, right):
    return sum(torch.kron(c, lr) for c, lr in zip(rule, left @ right, strict=True))


def bottleneck(t, h):
    down_rule, up_rule = (t.rule, t.rule) if hasattr(t, "rule") else (t.down_rule, t.up_rule)
    down, up = matrix(down_rule, t.down_left, t.down_right), matrix(up_rule, t.up_left, t.up_right)
    return F.gelu(h @ down.T + t.down_bias, approximate="tanh") @ up.T + t.up_bias


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("divisions", "rank"), [(4, 1), (2, 2)])
def test_it_is_an_adapter_of_kronecker_sums(shared, divisions, rank):
    params = {"width": 8, "divisions": divisions, "rank": rank, "share_rule": shared}
    follows("compacter", params, lambda t, x, host: host(x) + bottleneck(t, host(x)))
    follows("compacter", params | {"position": "before"}, lambda t, x, host: host(x + bottleneck(t, x)))


@pytest.mark.parametrize("made", [bert, gpt2, llama])
@pytest.mark.parametrize("shared", [True, False])
def test_it_keeps_its_promises(made, shared):
    params = {"reduction": 8, "share_rule": shared}
    keeps_promises(made(), "compacter", params, {"role": ["attn.o", "mlp.down"]}, identity=False)


def test_it_learns():
    check_training("compacter", {"reduction": 4}, {"role": ["attn.o", "mlp.down"]}, rate=0.05)


def test_one_rule_serves_all_sites_and_is_counted_once():
    c = compiled(*bert(), "compacter", {"reduction": 8}, {"role": ["attn.o", "mlp.down"]})
    assert [key for key, _ in c.deltas["d"].tensors() if "rule" in key] == ["rule_4"]
    own = compiled(*bert(), "compacter", {"reduction": 8, "share_rule": False}, {"role": ["attn.o", "mlp.down"]})
    assert own.plan.trainable == c.plan.trainable + (2 * 4 - 1) * 64


def test_sites_with_other_divisions_have_a_rule_of_their_own():
    delta = {"name": "d", "method": "compacter", "params": {"reduction": 8}, "target": {"role": "mlp.down"}}
    delta["overrides"] = [{"match": {"layers": {"last": 1}}, "params": {"divisions": 2}}]
    c = deltaspec.compile(bert()[0], {"deltaspec": 1, "deltas": [delta]})
    rules = {key: tuple(t.shape) for key, t in c.deltas["d"].tensors() if "rule" in key}
    assert rules == {"rule_4": (4, 4, 4), "rule_2": (2, 2, 2)}


def test_refusals():
    assert "bottleneck width 2" in refusal(*bert(), "compacter", {}, {"role": "mlp.down"})
    assert "hidden width 32" in refusal(*bert(), "compacter", {"divisions": 3, "width": 3}, {"role": "mlp.down"})
    assert "channels first" in refusal(*net(), "compacter", {}, "conv")
