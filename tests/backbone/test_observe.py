"""Modules whose weights are read without a call: deltas go to the weight, or are refused; none is silently idle."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, TRANSFORMERS
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from deltaspec.backbone.clone import clone
from deltaspec.backbone.inputs import dummy_inputs
from deltaspec.backbone.observe import Observation, observe
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError

INPUTS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """torch's own attention, which never calls its `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Reader(nn.Module):
    """Reads one Linear's weight without calling it, and calls and reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.both, self.idle = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.read.weight))
        return F.linear(torch.tanh(self.both(x)), self.both.weight)


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


class Idle(nn.Module):
    """Calls a block and does not use what it gives, beside layers whose outputs are used in ways of their own."""

    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.pooler = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.kept: list[Tensor] = []
        self.use = use

    def forward(self, x: Tensor) -> Any:
        self.pooler(x)
        found = self.use(self.other(x))
        if found is None:
            self.kept = [self.other(x)]
        return self.used(x) if found is None else (self.used(x), found)


class Lists(nn.Module):
    """Bare parameters, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(16), torch.full((16,), 0.5)])
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x * scale
        return x + self.shift


class Recurrent(nn.Module):
    """An LSTM, and a head tied to an embedding through `F.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.lstm(self.embed(ids))[0], self.embed.weight)


class Encoder(nn.Module):
    """torch's encoder, whose fast path in evaluation mode reads all weights in one kernel."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def build(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def compiled(kind: type[nn.Module], method: str, target: Any, inputs: Tensor = INPUTS, **params: Any) -> CompiledModel:
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target, "params": params}]}
    made = deltaspec.compile(build(kind), spec, example_inputs=inputs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.deltas["d"].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def refusal(kind: type[nn.Module], method: str, target: Any, inputs: Tensor | None = INPUTS, **params: Any) -> str:
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target, "params": params}]}
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.plan(build(kind), spec, example_inputs=inputs)
    assert all(finding.suggestion for finding in caught.value.diagnostics)
    return str(caught.value)


def by_hand(kind: type[nn.Module], made: CompiledModel) -> nn.Module:
    """Write a LoRA's or BitFit's change into the weights of a plain model, by the formula."""
    model = build(kind)
    tensors = dict(made.deltas["d"].tensors())
    with torch.no_grad():
        for planned in made.plan["d"].sites:
            module = model.get_submodule(planned.fqn)
            if f"{planned.fqn}.down" in tensors:
                update = 16 / 4 * tensors[f"{planned.fqn}.up"] @ tensors[f"{planned.fqn}.down"]
                module.weight += update.t() if isinstance(module, nn.Embedding) else update
            else:
                module.bias += tensors[f"{planned.fqn}.bias"]
    return model


CASES: list[tuple[type[nn.Module], Any, Tensor]] = [
    (Attention, "attn.out_proj", INPUTS),
    (Attention, ["attn.out_proj", "head"], INPUTS),
    (Reader, "read", INPUTS),
    (Reader, "both", INPUTS),
    (Reader, ["read", "both"], INPUTS),
    (Encoder, {"type": "Linear"}, INPUTS),
    (Encoder, "encoder.layers.1.linear1", INPUTS),
    (Recurrent, "embed", torch.tensor([[1, 2, 19], [0, 3, 7]])),
]


@pytest.mark.parametrize("mode", ["eval", "train", "grad"])
@pytest.mark.parametrize(
    ("kind", "target", "inputs"), CASES, ids=lambda value: str(getattr(value, "__name__", ""))[:20]
)
def test_lora_reaches_weights_that_are_read(kind, target, inputs, mode):
    made = compiled(kind, "lora", target, inputs, rank=4)
    expected = by_hand(kind, made).train(mode == "train")
    made.train(mode == "train")
    with torch.set_grad_enabled(mode == "grad"):
        torch.testing.assert_close(made(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
        plain = build(kind).train(mode == "train")
        assert not torch.allclose(made(inputs), plain(inputs), atol=1e-3)
        torch.testing.assert_close(made.merge().train(mode == "train")(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
        assert torch.equal(made.detach()(inputs), plain(inputs))


@pytest.mark.parametrize(
    ("kind", "target", "inputs"), CASES, ids=lambda value: str(getattr(value, "__name__", ""))[:20]
)
def test_such_deltas_train(kind, target, inputs):
    made = compiled(kind, "lora", target, inputs, rank=4)
    for mode in (True, False):
        made.zero_grad()
        made.train(mode)(inputs).pow(2).sum().backward()
        assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in made.deltas["d"].parameters())


@pytest.mark.parametrize(("kind", "target"), [(Attention, "attn.out_proj"), (Reader, "read"), (Encoder, "**.linear2")])
def test_methods_around_a_call_are_refused_where_there_is_none(kind, target):
    message = refusal(kind, "adapter", target)
    assert "DS404" in message and "without calling it" in message and "use a method that changes the weight" in message


def test_dropout_has_no_place_where_there_is_no_call():
    assert "DS402" in refusal(Attention, "lora", "attn.out_proj", dropout=0.1)
    assert "overrides" in refusal(Attention, "lora", "attn.out_proj", dropout=0.1)


def test_a_module_that_no_forward_reaches_is_refused():
    message = refusal(Reader, "lora", ["read", "idle"])
    assert "DS403" in message and "idle" in message and "read" not in message.split("1 site:")[1].splitlines()[0]


def test_a_bias_that_is_not_read_is_refused():
    assert "not its bias" in refusal(Reader, "bitfit", "read")
    assert "no forward reads read.bias" in refusal(Reader, "full", "read")
    delta = {"name": "d", "method": "full", "target": {"parameter": "weight", "path": "read"}}
    plan = deltaspec.plan(build(Reader), {"deltaspec": 1, "deltas": [delta]}, example_inputs=INPUTS)
    assert plan.sites[0].fqn == "read.weight"


def test_the_bias_of_an_out_proj_is_reached():
    made = compiled(Attention, "bitfit", "attn.out_proj")
    with torch.no_grad():
        torch.testing.assert_close(made(INPUTS), by_hand(Attention, made)(INPUTS), rtol=1e-5, atol=1e-6)


FULL: list[tuple[type[nn.Module], Any, Tensor, Callable[[nn.Module], list[nn.Parameter]]]] = [
    (Lists, "scales", INPUTS, lambda m: list(m.scales)),
    (Lists, {"parameter": "shift"}, INPUTS, lambda m: [m.shift]),
    (Recurrent, "lstm", torch.tensor([[1, 2, 19]]), lambda m: list(m.lstm.parameters())),
    (Encoder, "encoder.layers.0", INPUTS, lambda m: list(m.encoder.layers[0].parameters())),
    (Attention, "attn", INPUTS, lambda m: list(m.attn.parameters())),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "target", "inputs", "chosen"), FULL, ids=lambda value: getattr(value, "__name__", ""))
def test_trained_copies_reach_parameters_that_are_read(kind, target, inputs, chosen, training):
    made = compiled(kind, "full", target, inputs).train(training)
    expected = build(kind).train(training)
    tensors = list(made.deltas["d"].parameters())
    assert [tuple(t.shape) for t in tensors] == [tuple(p.shape) for p in chosen(expected)]
    with torch.no_grad():
        plain = expected(inputs)
        for parameter, tensor in zip(chosen(expected), tensors, strict=True):
            parameter.copy_(tensor)
        torch.testing.assert_close(made(inputs), expected(inputs), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(made(inputs), plain, atol=1e-3)
        torch.testing.assert_close(made.merge()(inputs), expected(inputs), rtol=1e-5, atol=1e-6)
    made(inputs).pow(2).sum().backward()
    assert all(t.grad is not None and bool(t.grad.count_nonzero()) for t in tensors)
    assert torch.equal(made.detach()(inputs), build(kind).train(training)(inputs))


def test_without_inputs_torchs_own_bypasses_are_known_all_the_same():
    spec = {
        "deltaspec": 1,
        "deltas": [{"name": "d", "method": "lora", "params": {"rank": 4}, "target": "attn.out_proj"}],
    }
    made = deltaspec.compile(build(Attention), spec)
    with torch.no_grad():
        for parameter in made.deltas["d"].parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(made(INPUTS), by_hand(Attention, made)(INPUTS), rtol=1e-4, atol=1e-5)


def test_without_inputs_the_first_forward_tells_of_a_bypass():
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "adapter", "target": "read"}]}
    made = deltaspec.compile(build(Reader), spec)
    assert "not proven" in str(made.plan)
    with pytest.raises(DeltaSpecError, match="DS437.*'d' is bypassed: the model reads the weights of read"):
        made(INPUTS)
    assert torch.equal(made.detach()(INPUTS), build(Reader)(INPUTS))


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_without_inputs_a_weight_that_is_called_and_read_is_told_too(capture):
    def made(method: str) -> CompiledModel:
        spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": "both"}]}
        return deltaspec.compile(build(Reader), spec, capture=capture)

    with pytest.raises(DeltaSpecError, match="DS437.*reads the weights of both besides calling it"):
        made("lora")(INPUTS)
    assert made("adapter")(INPUTS).shape == (2, 5, 16)  # which works around the call, and leaves the weight alone


def test_without_inputs_a_good_first_forward_passes_and_leaves_no_hooks():
    model = ARCHITECTURES["branching"].model()
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": ["head", "block.up"]}]}
    made = deltaspec.compile(model, spec)
    made(ARCHITECTURES["branching"].inputs())
    hooks = [m for m in made.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert "forward" not in made.backbone.__dict__


# Observing


@pytest.mark.parametrize("architecture", [*TRANSFORMERS, "branching", "traceable-modules"])
def test_observing_leaves_the_model_as_it_is(architecture):
    model = ARCHITECTURES[architecture].model().train()
    before, state = snapshot(model, identity=True), torch.random.get_rng_state()
    seen, failure = observe(model, ARCHITECTURES[architecture].inputs())
    assert failure is None
    assert differences(before, snapshot(model, identity=True)) == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(seen) == {name for name, _ in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_transformers_models_bring_inputs_of_their_own(architecture):
    model = ARCHITECTURES[architecture].model()
    given, failure = observe(model)
    assert failure is None and dummy_inputs(model) is not None
    assert {k for k, v in given.items() if v.called} == {
        k for k, v in observe(model, ARCHITECTURES[architecture].inputs())[0].items() if v.called
    }


def test_widths_of_composite_modules_are_seen():
    seen, _ = observe(ARCHITECTURES["llama"].model())
    assert (seen["model.layers.0"].in_width, seen["model.layers.0"].width) == (32, 32)
    assert (seen["model.layers.0.mlp.gate_proj"].in_width, seen["model.layers.0.mlp.gate_proj"].width) == (32, 64)
    assert seen["model.layers.0.self_attn"].width == 32
    assert seen["lm_head"].width == 90


def test_readers_are_named():
    seen, _ = observe(build(Reader), INPUTS)
    assert seen["read"] == Observation(False, host="", reads=("weight",))
    assert (seen["both"].called, seen["both"].host, seen["both"].reads) == (True, "", None)
    assert not seen["idle"].called


def test_a_forward_that_fails_is_told_and_raises_nothing():
    seen, failure = observe(build(Reader), torch.zeros(2, 7))
    assert failure is not None and "RuntimeError" in failure
    assert isinstance(seen, dict)
    model = clone(build(Reader), device="meta")
    assert observe(model, INPUTS)[1] is None


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


USES: dict[str, Callable[[Tensor], Any]] = {
    "computed": lambda y: y * 2,
    "in place": lambda y: y.relu_().mul_(2) + 1,
    "written to a view": lambda y: torch.zeros(2, 2, 5, 16)[0].copy_(y),
    "detached": lambda y: y.detach() + 1,
    "an index": lambda y: y.argmax(-1),
    "a condition": lambda y: torch.ones(1) if (y.sum() > 0) else torch.zeros(1),
    "an object": lambda y: types.SimpleNamespace(inside=[y]),
    "kept": lambda y: None,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_module_whose_output_nothing_uses_is_refused_and_no_other(use):
    model = Idle(use).eval()

    def plan(target: str) -> Any:
        delta = {"name": "d", "method": "lora", "target": target}
        return deltaspec.plan(model, {"deltaspec": 1, "deltas": [delta]}, example_inputs=INPUTS)

    assert plan("used").trainable and plan("other").trainable
    with pytest.raises(DeltaSpecError, match="DS403.*nothing that the model gives is computed from what leaves this"):
        plan("pooler.0")
    seen, _ = observe(model, INPUTS)
    assert {fqn for fqn, found in seen.items() if found.fate == "idle"} == {"pooler", "pooler.0", "pooler.1"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_weight_in_a_forward_without_gradients_is_refused_and_an_adapter_is_not(method):
    class Table(nn.Embedding):
        """As the sinusoidal positions of Marian and Pegasus."""

        @torch.no_grad()
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    model = nn.Sequential(Table(20, 16), nn.Linear(16, 16)).eval()
    inputs = torch.arange(6).reshape(2, 3)

    def plan(method: str) -> Any:
        delta = {"name": "d", "method": method, "target": "0"}
        return deltaspec.plan(model, {"deltaspec": 1, "deltas": [delta]}, example_inputs=inputs)

    with pytest.raises(DeltaSpecError, match="this Table runs without gradients, so a delta of its weights"):
        plan(method)
    assert plan("adapter").trainable


@pytest.mark.parametrize("kind", ["BartForSequenceClassification", "BartForConditionalGeneration", "DebertaV2Model"])
def test_a_forward_that_looks_at_values_is_seen_without_weights(kind):
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    if kind.startswith("Bart"):
        halves = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        sizes = {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **halves}
    made = getattr(transformers, kind)
    config = made.config_class(**sizes, num_hidden_layers=2)
    with torch.device("meta"):
        bare = made(config)
    seen, failure = observe(bare)
    assert failure is None and seen == observe(made(config))[0]
    assert all(p.is_meta for p in bare.parameters())
