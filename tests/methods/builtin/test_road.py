import peft
import pytest
from published import planned
from weight_methods import agree, bert, check, check_bypassed, check_training, gpt2, llama, net, refusal


def tensors(module):
    return {"angle": module.road_theta["default"], "scale": module.road_alpha["default"]}


@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize(("made", "names"), [(bert, ["query", "value"]), (llama, ["q_proj", "v_proj"])])
def test_it_agrees_with_peft(made, names, variant):
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=8, target_modules=names)
    params = {"variant": variant, "group_size": 8}
    agree(made(), "road", params, {"path": [f"**.{name}" for name in names]}, config, tensors)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_it_keeps_its_promises(variant):
    params = {"variant": variant, "group_size": 4}
    check(bert(), "road", params, {"role": ["attn.q", "attn.v"]})
    check(gpt2(), "road", params, {"role": ["attn.qkv", "mlp.down"]})
    check(net(), "road", params, {"path": ["fc", "out"]})
    check_bypassed("road", params)


def test_it_learns():
    check_training("road", {"group_size": 8}, {"role": ["attn.q", "attn.v", "mlp.up"]})


def test_counts_are_the_variants_share_of_the_width():
    target = {"role": ["attn.q", "attn.v"]}
    counts = [
        planned(bert()[0], {"method": "road", "params": {"variant": v, "group_size": 8}, "target": target}).trainable
        for v in (1, 2, 4)
    ]
    assert counts == [4 * 32, 2 * 4 * 32, 4 * 4 * 32]


def test_refusals():
    assert "set group_size: 32" in refusal(*bert(), "road", {}, {"role": "attn.q"})
    assert "Embedding" in refusal(*net(), "road", {"group_size": 2}, "emb")
