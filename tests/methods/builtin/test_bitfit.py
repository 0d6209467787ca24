import copy

import pytest
import torch
from published import planned
from torch import nn
from weight_methods import bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal, run, stir

import deltaspec

ALL = {"role": ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "norm"]}


@pytest.mark.parametrize("made", [bert, gpt2])
def test_it_is_training_of_the_biases(made):
    """Outputs and gradients are those of a model whose own biases are moved and trained."""
    model, inputs = made()
    owners = [n.rpartition(".")[0] for n, _ in model.named_parameters() if n.endswith("bias")]
    c = compiled(model, inputs, "bitfit", {"add_missing": False}, {"path": owners})
    stir(c)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for fqn in owners:
            moved.get_submodule(fqn).bias += c.deltas["d"].tensor(f"{fqn}.bias")
    seen, expected = run(c, inputs), run(moved, inputs)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen, run(model, inputs), atol=1e-3)
    seen.square().sum().backward()
    expected.square().sum().backward()
    for fqn in owners:
        reference = moved.get_submodule(fqn).bias.grad
        if reference is None:  # a pooler, whose output is not in the loss
            continue
        scale = max(1, reference.abs().max().item())
        torch.testing.assert_close(c.deltas["d"].tensor(f"{fqn}.bias").grad, reference, atol=2e-5 * scale, rtol=1e-4)


def test_it_keeps_its_promises():
    check(bert(), "bitfit", {}, ALL)
    check(net(), "bitfit", {}, {"path": ["fc", "out", "conv", "grouped", "conv1"]})
    check_bypassed("bitfit", {})
    check_training("bitfit", {}, ALL, rate=0.05)


def test_missing_biases_are_added():
    model, inputs = llama()
    c = compiled(model, inputs, "bitfit", {}, {"role": ["attn.q", "mlp.down", "norm"]})
    assert torch.equal(run(c, inputs), run(model, inputs))
    stir(c)
    assert not torch.allclose(run(c, inputs), run(model, inputs), atol=1e-3)
    assert "has no bias" in refusal(model, inputs, "bitfit", {"add_missing": False}, {"role": "attn.q"})


class Inner(nn.Module):
    """Biases that no output of their own module takes."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rnn = nn.LSTM(16, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(self.attention(x, x, x)[0])[0]


def test_biases_inside_attention_and_recurrent_modules():
    torch.manual_seed(0)
    model, inputs = Inner().eval().requires_grad_(False), (torch.randn(2, 3, 16),)
    c = compiled(model, inputs, "bitfit", {}, {"path": ["attention", "rnn", "attention.out_proj"]})
    # Not to the bit: torch picks kernels of attention and recurrence by what needs gradients.
    torch.testing.assert_close(run(c, inputs), run(model, inputs))
    stir(c)
    moved = c.merge("d")
    changed = {n for n, p in moved.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {
        "attention.in_proj_bias", "attention.out_proj.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0"
    }  # fmt: skip
    torch.testing.assert_close(run(c, inputs), run(moved, inputs))
    assert not torch.allclose(run(c, inputs), run(model, inputs), atol=1e-3)


def test_every_bias_of_a_model_can_be_meant():
    """A selector of all modules that own a bias reaches each of them, whatever their kind."""
    model, inputs = bert()
    owners = sorted(n.rpartition(".")[0] for n, _ in model.named_parameters() if n.endswith("bias"))
    c = compiled(model, inputs, "bitfit", {"add_missing": False}, {"path": owners})
    assert sum(p.numel() for p in c.trainable_parameters()) == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("bias")
    )


def test_refusals():
    assert "BertLayer" in refusal(*bert(), "bitfit", {}, {"role": "block"})
    with pytest.raises(deltaspec.DeltaSpecError, match="Embedding"):
        planned(bert()[0], {"method": "bitfit", "target": {"path": "embeddings.word_embeddings"}})
