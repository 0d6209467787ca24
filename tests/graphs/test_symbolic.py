"""The symbolic capture: taken only where the trace is the model; there it computes what the other capture does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Branching, Traceable
from one_delta import perturb, single
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def build(
    model: nn.Module, target: Any, *, method: str = "lora", capture: str = "auto", **params: Any
) -> CompiledModel:
    params = {"rank": 2} | params if method == "lora" else params
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target, "params": params}]}
    compiled = deltaspec.compile(model.eval(), spec, capture=capture)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in compiled.deltas["d"].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return compiled


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if self.training else self.fc(x)


class Functional(Modes):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training)


class Optional(Modes):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x) * scale


class Constant(Modes):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.offset


class Hooked(Modes):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8))
        self.block = Inner()
        self.block.register_forward_hook(lambda m, i, o: o * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.fc(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Twice(Modes):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Modes, "training and in evaluation mode differ"),
        (Functional, "training and in evaluation mode differ"),
        (Optional, r"optional arguments \(scale\)"),
        (Constant, r"no parameters or buffers"),
        (Hooked, "block has hooks"),
        (Branching, "does not trace: TraceError"),
    ],
)
def test_where_a_trace_would_not_be_the_model_modules_are_taken(kind, why):
    target = "head" if kind is Branching else "fc"
    compiled = build(kind(), target)
    assert compiled.capture == "modules"
    with pytest.raises(DeltaSpecError, match=f'(?s)DS432.*{why}.*capture="modules"'):
        build(kind(), target, capture="symbolic")


def test_modes_are_respected_where_a_trace_would_burn_them_in():
    for kind in (Modes, Functional):
        model = kind()
        compiled = build(model, "fc")
        compiled.detach()
        assert torch.equal(compiled.eval()(X), model.eval()(X))
        compiled.attach()
        evaluated = compiled.eval()(X)
        torch.manual_seed(0)
        assert not torch.equal(compiled.train()(X), evaluated)


def test_auto_takes_a_trace_that_is_the_model_and_says_why():
    compiled = build(Traceable(), ["up", "head"])
    assert compiled.capture == "symbolic" and "it traces" in compiled.capture_reason
    asked = build(Traceable(), ["up", "head"], capture="modules")
    assert asked.capture == "modules" and asked.capture_reason == "asked for"


CASES = [
    (Traceable, ["up", "head"], "lora", {}),
    (Traceable, ["conv", "up"], "lora", {}),
    (Traceable, ["conv", "bn", "norm", "head"], "bitfit", {}),
    (Traceable, ["up", "norm"], "adapter", {"width": 3}),
    (Traceable, ["up"], "adapter", {"width": 3, "position": "before"}),
    (Traceable, ["bn", "norm", "head"], "full", {}),
    (Traceable, ["up", "head"], "lora", {"dropout": 0.5, "bias": True}),
    (Twice, "fc", "lora", {}),
    (Twice, "fc", "full", {}),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "target", "method", "params"), CASES)
def test_both_captures_compute_the_same(kind, target, method, params, training):
    inputs = X if kind is Twice else ARCHITECTURES["traceable-modules"].inputs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
    results = []
    for capture in ("symbolic", "modules"):
        compiled = build(model, target, method=method, capture=capture, **params).train(training)
        torch.manual_seed(5)
        output = compiled(inputs)
        output.pow(2).sum().backward()
        results.append((output, [p.grad for p in compiled.deltas["d"].parameters()]))
        compiled.graph.lint()
        for region in compiled.regions.values():
            region.graph.lint()
    assert torch.equal(results[0][0], results[1][0])
    for left, right in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_every_call_of_a_site_is_rewritten():
    model = Twice().eval()
    compiled = build(model, "fc", capture="symbolic")
    tensors = dict(compiled.deltas["d"].tensors())
    with torch.no_grad():
        weight = model.fc.weight + 8 * tensors["fc.up"] @ tensors["fc.down"]
        expected = F.linear(torch.tanh(F.linear(X, weight, model.fc.bias)), weight, model.fc.bias)
        torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-5)


def test_a_composite_site_stays_whole():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Inner(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x))

    spec = {
        "deltaspec": 1,
        "deltas": [
            {"name": "d", "method": "adapter", "target": "block", "params": {"width": 2}},
            {"name": "low", "method": "lora", "target": "block.fc", "params": {"rank": 2}},
        ],
    }
    model = Outer().eval()
    outputs = []
    for capture in ("symbolic", "modules"):
        compiled = deltaspec.compile(model, spec, capture=capture, example_inputs=X)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for delta in compiled.deltas.values():
                for parameter in delta.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        found = {}
        for names in ((), ("d",), ("low",), ("d", "low")):
            compiled.only(*names)
            found[names] = compiled(X)
        outputs.append(found)
    for names, output in outputs[0].items():
        assert torch.equal(output, outputs[1][names])
        assert torch.equal(output, model(X)) is (names == ())


class Remembering(nn.Module):
    """Writes into itself, which a trace would not."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner, self.what = nn.Linear(4, 4), what
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "calls":
            self.calls.add_(1)
        else:
            self.last = x
        return self.inner(x) * (1 + self.calls)


@pytest.mark.parametrize("what", ["calls", "last"])
def test_a_forward_that_writes_into_its_modules_is_not_traced(what):
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora", "target": "inner"}]}
    model, x = Remembering(what), torch.ones(1, 4)
    compiled = deltaspec.compile(model, spec)
    assert compiled.capture == "modules" and f"writes {what}" in compiled.capture_reason
    assert torch.equal(compiled(x), model(x))
    with pytest.raises(DeltaSpecError, match=f"DS432.*writes {what}"):
        deltaspec.compile(model, spec, capture="symbolic")


def test_a_hook_on_a_site_sees_what_leaves_the_delta_in_every_capture():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    compiled = deltaspec.compile(model, single())
    assert compiled.capture == "modules" and "hooks" in compiled.capture_reason
    with pytest.raises(DeltaSpecError, match="DS432"):
        deltaspec.compile(model, single(), capture="symbolic")
    perturb(compiled)
    x = torch.randn(2, 4)
    torch.testing.assert_close(compiled(x), compiled.merge()(x))
