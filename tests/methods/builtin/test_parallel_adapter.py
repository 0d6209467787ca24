import pytest
import torch
from bottlenecks import follows, keeps_promises
from published import planned
from torch import nn
from torch.nn import functional as F
from transformers import SwinConfig, SwinModel
from weight_methods import bert, check_training, compiled, gpt2, llama, net, refusal, run, stir

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


def test_gate():
    def formula(t, x, host):
        return host(x) + 4 * bottleneck(t, x) * torch.sigmoid(x @ t.gate.T + t.gate_bias).mean(-2, keepdim=True)

    follows("parallel_adapter", {"width": 4, "gate": True}, formula)


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


def test_modules_that_change_the_number_of_positions_are_refused_by_the_plan():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    model, inputs = SwinModel(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    text = refusal(model, inputs, "parallel_adapter", {}, {"type": "SwinPatchMerging"})
    assert "SwinPatchMerging gives other positions than it takes" in text
    plan = compiled(model, inputs, "parallel_adapter", {"width": 2}, {"type": "SwinLayer"}).plan
    assert len(plan.sites) == 2


def test_beside_a_recurrence_that_changes_the_width():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model, x = Tagger().eval(), torch.randn(2, 5, 8)
    c = compiled(model, (x,), "parallel_adapter", {"width": 4, "scale": 0.5}, "lstm")
    stir(c)
    t = {n: c.deltas["d"].tensor(f"lstm.{n}") for n in ("down", "down_bias", "up", "up_bias")}
    inner = F.relu(x @ t["down"].T + t["down_bias"])
    expected = model.head(model.lstm(x)[0] + 0.5 * (inner @ t["up"].T + t["up_bias"]))
    torch.testing.assert_close(run(c, (x,)), expected, atol=1e-5, rtol=1e-5)
