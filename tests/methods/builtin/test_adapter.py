import pytest
import torch
from bottlenecks import follows, keeps_promises
from published import planned
from torch.nn import functional as F
from weight_methods import bert, check_training, compiled, gpt2, llama, net, refusal, run, stir

import deltaspec

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "leaky_relu": F.leaky_relu}


def bottleneck(t, h, act=F.gelu):
    return act(h @ t.down.T + t.down_bias) @ t.up.T + t.up_bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_after_and_before(activation):
    act = ACTIVATIONS[activation]
    params = {"width": 4, "activation": activation, "scale": 0.5}
    follows("adapter", params, lambda t, x, host: host(x) + 0.5 * bottleneck(t, host(x), act))
    follows("adapter", params | {"position": "before"}, lambda t, x, host: host(x + 0.5 * bottleneck(t, x, act)))


def test_norms_inside():
    def formula(t, x, host):
        h = F.layer_norm(host(x), (16,), t.norm_before_weight, t.norm_before_bias)
        return host(x) + F.layer_norm(bottleneck(t, h), (16,), t.norm_after_weight, t.norm_after_bias)

    follows("adapter", {"width": 4, "norm_before": True, "norm_after": True}, formula)


def test_what_norms_add_to_the_variance():
    def formula(t, x, host):
        h = F.layer_norm(host(x), (16,), t.norm_before_weight, t.norm_before_bias, 0.5)
        return host(x) + F.layer_norm(bottleneck(t, h), (16,), t.norm_after_weight, t.norm_after_bias, 0.5)

    follows("adapter", {"width": 4, "norm_before": True, "norm_after": True, "norm_eps": 0.5}, formula)


def test_without_the_residual():
    params = {"width": 4, "residual": False, "scale": 2.0}
    follows("adapter", params, lambda t, x, host: 2 * bottleneck(t, host(x)))
    follows("adapter", params | {"position": "before"}, lambda t, x, host: host(2 * bottleneck(t, x)))


@pytest.mark.parametrize("made", [bert, gpt2, llama])
@pytest.mark.parametrize("params", [{}, {"norm_before": True, "norm_after": True}, {"reduction": 4, "dropout": 0.1}])
def test_it_keeps_its_promises(made, params):
    keeps_promises(made(), "adapter", params, {"role": ["attn.o", "mlp.down"]}, identity=True)
    keeps_promises(made(), "adapter", params, {"role": "block"}, identity=True)


@pytest.mark.parametrize("params", [{}, {"norm_after": True}, {"residual": False}])
def test_it_learns(params):
    check_training("adapter", params | {"width": 8}, {"role": ["attn.o", "mlp.down"]})


def test_dropout_is_on_what_enters_the_bottleneck_in_training_only():
    model, inputs = bert()
    c = compiled(model, inputs, "adapter", {"width": 8, "dropout": 0.5}, {"role": "mlp.down"})
    stir(c)
    assert torch.equal(run(c, inputs), run(c, inputs))
    for name, module in c.backbone.named_modules():
        module.training = name.startswith("deltaspec")
    assert not torch.equal(run(c, inputs), run(c, inputs))


def test_placements():
    model, _ = bert()
    houlsby = planned(model, {"method": "adapter"})
    named = planned(model, {"method": "adapter", "params": {"placement": "houlsby"}})
    pfeiffer = planned(model, {"method": "adapter", "params": {"placement": "pfeiffer"}})
    assert [s.fqn.split("layer.0.")[-1] for s in houlsby.sites[:2]] == ["attention.output.dense", "output.dense"]
    assert [s.fqn for s in named.sites] == [s.fqn for s in houlsby.sites]
    assert [s.fqn for s in pfeiffer.sites] == ["encoder.layer.0", "encoder.layer.1"]


def test_pfeiffers_adapter_comes_after_the_norm_of_the_feed_forward():
    model, inputs = bert()
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "adapter", "params": {"placement": "pfeiffer"}}]}
    c = deltaspec.compile(model, spec)
    stir(c)
    seen = []
    layer = c.backbone.encoder.layer[0]
    handles = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in (layer.output.LayerNorm, layer)]
    run(c, inputs)
    [handle.remove() for handle in handles]
    normed, out = seen
    t = {name: c.deltas["d"].tensor(f"encoder.layer.0.{name}") for name in ("down", "down_bias", "up", "up_bias")}
    expected = normed + F.gelu(normed @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]
    torch.testing.assert_close(out, expected)


def test_a_placement_beside_a_target_is_a_finding():
    text = refusal(*bert(), "adapter", {"placement": "pfeiffer"}, {"role": "mlp.down"})
    assert "names a target of its own" in text


def test_width_and_reduction():
    model, _ = bert()

    def widths(params):
        plan = planned(model, {"method": "adapter", "params": params, "target": {"role": "mlp.down"}})
        return {spec.shape[0] for site in plan.sites for spec in site.tensors if spec.name == "down"}

    assert widths({}) == {24} and widths({"width": 5}) == {5}
    assert widths({"reduction": 8}) == {4} and widths({"reduction": 100}) == {1}
    both = {"deltaspec": 1, "deltas": [{"name": "d", "method": "adapter", "params": {"width": 5, "reduction": 8}}]}
    assert ["not both" in finding.message for finding in deltaspec.validate(both)] == [True]


def test_refusals():
    assert "channels first" in refusal(*net(), "adapter", {}, "conv")
    assert "ids" in refusal(*net(), "adapter", {"position": "before"}, "emb")
