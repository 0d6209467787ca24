"""The backbone's buffers and flags stay as they are while deltas are attached."""

import torch
from five_deltas import build, outputs, spec
from models import ARCHITECTURES
from one_delta import X, perturb, single
from torch import nn

import deltaspec
from deltaspec.backbone.reserved import RESERVED
from deltaspec.contract.trial import same


def test_buffers_that_one_delta_wrote_do_not_reach_the_next():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    document = single(target="1")
    document["deltas"].append({"name": "e", "method": "lora", "target": "1"})
    compiled = deltaspec.compile(model, document).eval()
    perturb(compiled)
    compiled.only("e")
    expected = compiled(X)
    compiled.only("d")
    compiled.train()
    for _ in range(3):
        compiled(X)
    compiled.eval()
    compiled.only("e")
    assert torch.equal(compiled(X), expected)


def test_flags_that_were_off_before_stay_off_after():
    model = ARCHITECTURES["bert"].model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layer.1" in name
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    compiled = deltaspec.compile(model, spec("bert"))
    for names in (("low",), (), ("low", "wide"), ()):
        compiled.only(*names)
        found = {n: p.requires_grad for n, p in compiled.backbone.named_parameters() if not n.startswith(RESERVED)}
        assert found == (dict.fromkeys(flags, False) if names else flags)
    assert {n for n, p in compiled.named_parameters() if p.requires_grad and n.startswith(f"backbone.{RESERVED}")}


def test_batch_statistics_of_the_backbone_never_move_and_those_of_a_delta_do():
    chosen = ARCHITECTURES["traceable-modules"]
    model, inputs = chosen.model(), chosen.inputs()
    compiled = build("traceable-modules").train()
    base = model.bn.running_mean.clone()
    own = dict(compiled.deltas["norms"].tensors())["bn.running_mean"]
    for active, moves in ((("low",), False), (("norms", "low"), True)):
        compiled.only(*active)
        kept = own.clone()
        compiled(inputs)
        assert torch.equal(own, kept) is not moves
        assert torch.equal(compiled.backbone.bn.running_mean, base)
    compiled.detach()
    compiled.eval()
    assert same(outputs(compiled, inputs), outputs(model, inputs))
