"""Subclasses of torch's layers with forwards of their own, which may compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from readers import INPUTS
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError


class Squashed(nn.Linear):
    """A Linear that gives something else than a Linear does, and a second tensor."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(input)
        return torch.tanh(logits), logits


class Plain(nn.Linear):
    """A Linear that computes what a Linear does, in its own words."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class First(nn.LayerNorm):
    """A LayerNorm with its channels first."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.transpose(1, 2)).transpose(1, 2)


class Subclasses(nn.Module):
    """Subclasses of torch's layers with forwards of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.squashed, self.plain, self.first = Squashed(16, 16), Plain(16, 16), First(5)

    def forward(self, x: Tensor) -> Tensor:
        scores, logits = self.squashed(x)
        return self.first(self.plain(scores) + logits)


@pytest.mark.parametrize(
    ("method", "target"),
    [("lora", {"type": "Linear"}), ("ia3", {"type": "Linear"}), ("bitfit", {"type": ["Linear", "LayerNorm"]}),
     ("ssf", {"type": "LayerNorm"}), ("norm", {"type": "LayerNorm"}), ("full", {"type": "Linear"})],
)  # fmt: skip
def test_a_subclass_with_a_forward_of_its_own_is_changed_through_its_weight(method, target):
    torch.manual_seed(0)
    model = Subclasses().eval()
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target}]}
    compiled = deltaspec.compile(model, spec, example_inputs=INPUTS)
    through = {site.site.row.fqn: site.site.host for delta in compiled.plan.deltas for site in delta.sites}
    assert all(through[fqn] == (None if fqn == "plain" else fqn) for fqn in through)
    assert torch.equal(compiled(INPUTS), model(INPUTS))
    disturb(compiled)
    attached = compiled(INPUTS)
    assert not torch.equal(attached, model(INPUTS))
    torch.testing.assert_close(compiled.merge("d")(INPUTS), attached, rtol=1e-4, atol=1e-5)
    attached.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in compiled.trainable_parameters())


def test_an_adapter_takes_the_first_output_of_such_a_linear_and_no_such_norm():
    model = Subclasses().eval()

    def compile(target: str) -> CompiledModel:
        delta = {"name": "d", "method": "adapter", "params": {"width": 2}, "target": target}
        return deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]}, example_inputs=INPUTS)

    compiled = compile("squashed")
    assert torch.equal(compiled(INPUTS), model(INPUTS))
    disturb(compiled)
    assert not torch.equal(compiled(INPUTS), model(INPUTS))
    with pytest.raises(DeltaSpecError, match="channels first"):
        compile("first")


def test_real_methods_refuse_complex_parameters_and_trained_copies_do_not():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))

    def plan(method: str) -> Any:
        delta = {"name": "d", "method": method, "target": {"type": "Linear"}}
        return deltaspec.plan(model, {"deltaspec": 1, "deltas": [delta]})

    assert plan("full").trainable == 20
    with pytest.raises(DeltaSpecError, match="the parameters of this Linear are complex, and lora is real"):
        plan("lora")


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "adalora", "hira", "oft", "ia3", "adapter", "full"])
@pytest.mark.parametrize("architecture", ["opt", "bart", "pegasus"])
def test_position_tables_that_take_more_than_ids(architecture, method):
    """Their classes look ids up by code of their own, and are called with several arguments."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 1}
    if architecture == "opt":
        from transformers import OPTConfig, OPTForCausalLM

        small = {"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 2}
        model = OPTForCausalLM(OPTConfig(**sizes, **small, word_embed_proj_dim=16))
        inputs, target = {"input_ids": torch.randint(3, 48, (2, 5))}, "**.embed_positions"
    else:
        from transformers import BartConfig, BartModel, PegasusConfig, PegasusModel

        config, kind = (BartConfig, BartModel) if architecture == "bart" else (PegasusConfig, PegasusModel)
        small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
        model = kind(config(**sizes, **small))
        inputs = {"input_ids": torch.randint(3, 48, (2, 5)), "decoder_input_ids": torch.randint(3, 48, (2, 4))}
        target = "encoder.embed_positions"
    delta = {"name": "a", "method": method, "target": target, "params": {"block_size": 4} if method == "oft" else {}}
    if method not in ("ia3", "adapter", "full", "oft"):
        delta["params"] = {"rank": 2}
    try:
        compiled = deltaspec.compile(model.eval(), {"deltaspec": 1, "deltas": [delta]})
    except DeltaSpecError as error:
        # Pegasus looks its table up without gradients, so only a method around the call could be trained.
        still = architecture == "pegasus" and method != "adapter"
        assert {finding.code for finding in error.diagnostics} <= {"DS402", "DS403" if still else "DS402"}
        assert all(finding.suggestion for finding in error.diagnostics)
        return
    with torch.no_grad():
        bare = model(**inputs)[0]
        assert torch.equal(compiled(**inputs)[0], bare)
        for parameter in compiled.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        changed = compiled(**inputs)[0]
        assert not torch.equal(changed, bare)
        if method != "adapter":
            torch.testing.assert_close(compiled.merge()(**inputs)[0], changed, rtol=1e-4, atol=1e-5)
