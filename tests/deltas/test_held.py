"""What an optimizer holds: every way to get it wrong is told, beside wrappers of other libraries."""

import pytest
import torch
from accelerate import Accelerator
from blends import Net
from torch import nn

import deltaspec


def compiled(**options):
    deltas = [{"name": name, "method": "lora", "target": "*", "params": {"rank": 2}} for name in ("one", "two")]
    return deltaspec.compile(Net(), {"deltaspec": 1, "deltas": deltas}, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def messages(report):
    return [finding.message for finding in report.findings]


def test_what_is_as_it_should_be():
    c = compiled()
    report = c.check_optimizer(torch.optim.AdamW(c.parameter_groups()))
    assert report and report.findings == [] and report.require() is None
    assert report["one"].held == ("a.down", "a.up", "b.down", "b.up") and not report["one"].missing
    c.only("one")
    assert c.check_optimizer(sgd(c.parameter_groups("one")))  # the other delta is not attached
    assert c.check_optimizer([sgd(c.parameter_groups("one")), sgd(c.parameter_groups("two"))], "one", "two")
    assert "one" in str(report) and "held" in str(report)


def test_what_is_missing_held_twice_or_frozen():
    c = compiled()
    one = list(c.deltas["one"].parameters())
    report = c.check_optimizer([sgd(one[:3]), sgd(one[2:3])], "one", "two")
    assert report["one"].missing == ("b.up",) and report["one"].twice == ("b.down",) and not report["two"].held
    assert (
        messages(report)
        == [
            "it misses 1 parameter (b.up) of the delta 'one'",
            "it holds 1 parameter (b.down) of the delta 'one' twice",
            "it misses 4 parameters ({a..b}.{down,up}) of the delta 'two'",
        ]
        or len(messages(report)) == 3
    )
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        report.require()
    assert [d.code for d in caught.value.diagnostics] == ["DS380"] * 3
    one[0].requires_grad = False
    c.only("one")
    [told] = messages(c.check_optimizer(sgd(one)))
    assert told == "it holds 1 parameter (a.down) of the delta 'one', which require no gradients"


def test_the_backbone():
    c = compiled()
    report = c.check_optimizer(sgd(c.parameters()))
    assert report.backbone == ("a.weight", "a.bias", "b.weight", "b.bias") and "which is frozen" in messages(report)[0]
    own = compiled(train_backbone=True)
    assert own.check_optimizer(sgd(own.parameters()))
    own.detach()
    assert own.check_optimizer(sgd([own.backbone.a.weight]))
    model = Net()
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "*"}]})
    told = messages(c.check_optimizer(sgd(model.parameters())))
    assert told[0] == "the optimizer holds no parameter of any delta"
    assert "4 tensors: other parameters over the memory of the backbone's weights" in told[-1]


def test_parameters_that_were_replaced():
    c = compiled()
    c.only("one")
    optimizer = sgd(c.parameter_groups("one"))
    c.deltas["one"].register_parameter("a~up", nn.Parameter(torch.zeros(6, 2)))
    report = c.check_optimizer(optimizer)
    assert report["one"].missing == ("a.up",)
    assert report.strangers == {"parameters that are no more those of the delta 'one'": 1}
    c = compiled().to(torch.float64)  # in place: the parameters stay the same objects
    optimizer = sgd(c.parameter_groups())
    assert c.check_optimizer(optimizer) and c.to(torch.float32).check_optimizer(optimizer)
    copied = sgd([nn.Parameter(p.detach()) for p in c.deltas["one"].parameters()])
    assert "over the memory of the delta 'one'" in messages(c.check_optimizer(copied))[-1]
    assert "not of this model" in messages(c.check_optimizer(sgd([nn.Parameter(torch.zeros(1))])))[-1]


def test_wrappers():
    c = compiled()
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW(c.parameter_groups()))
    assert type(optimizer).__name__ == "AcceleratedOptimizer" and c.check_optimizer(optimizer)
    assert c.view().check_optimizer(optimizer)
    with pytest.raises(TypeError, match="an optimizer has param_groups, and dict has none"):
        c.check_optimizer({})


def test_zero(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        c = compiled()
        held = ZeroRedundancyOptimizer(c.parameter_groups(), torch.optim.AdamW, lr=1e-3)
        assert c.check_optimizer(held)
        part = ZeroRedundancyOptimizer(c.parameter_groups("one"), torch.optim.AdamW, lr=1e-3)
        assert not c.check_optimizer(part)
    finally:
        torch.distributed.destroy_process_group()
