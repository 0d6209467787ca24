"""What others patch after compiling: classes, hooks on modules of a trace, weights that are computed from then on."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from live_model import IDS, QV, build, llama, logits, lora, net
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.models.llama.modeling_llama import LlamaMLP

from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_a_patched_class_is_followed(monkeypatch):
    delta = {"name": "a", "method": "adapter", "params": {"width": 4}, "target": "model.layers.*.mlp"}
    compiled = build(delta)
    before, own = logits(compiled), LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x) * 2)
    expected = logits(build(delta))
    assert torch.equal(logits(compiled), expected) and not torch.equal(before, expected)
    assert torch.equal(logits(compiled.detach()), logits(llama()))
    assert torch.equal(logits(compiled.attach()), expected)
    monkeypatch.undo()
    assert torch.equal(logits(compiled), before)


class Triple(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(3 * x, self.weight, self.bias)


def test_another_class_of_a_site_is_refused():
    compiled = build(lora(target=["up"]), model=net(), capture="modules")
    compiled.backbone.up.__class__ = Triple
    with pytest.raises(DeltaSpecError, match="DS458.*up.*Triple"):
        compiled(X)
    other = net()
    other.up.__class__ = Triple
    assert torch.equal(compiled.detach()(X), other(X))


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize("kind", ["before", "after"])
def test_hooks_on_a_site_are_around_the_delta(capture, kind):
    compiled = build(lora(target=["up"]), model=net(), capture=capture)
    compiled(X)
    if kind == "after":
        compiled.backbone.up.register_forward_hook(lambda module, args, output: output * 2)
    else:
        compiled.backbone.up.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    expected = compiled.merge("a")(X)
    torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(compiled(X, deltas=["a"] * 5), expected)
    torch.testing.assert_close(compiled.view()(X), expected)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("method", ["lora", "hira"])
def test_a_weight_that_is_computed_since_is_read_or_refused(method):
    compiled = build({"name": "a", "method": method, "params": {"rank": 2}, "target": QV})
    parametrize.register_parametrization(compiled.backbone.model.layers[0].self_attn.q_proj, "weight", Double())
    if method == "lora":
        logits(compiled)
    else:
        with pytest.raises(DeltaSpecError, match="DS458.*computed"):
            logits(compiled)
    with pytest.raises(DeltaSpecError, match="DS458.*computed"):
        compiled.merge("a")


def test_rows_whose_first_call_is_transformed_are_refused():
    compiled = build(lora("a"), lora("b")).detach()
    tensors = {n: torch.stack([p.detach(), p.detach() * 0]) for n, p in compiled.named_parameters() if ".a." in n}
    call = {"input_ids": IDS, "deltas": ["a", "b"]}

    def run(given: dict[str, Tensor]) -> Tensor:
        return functional_call(compiled, given, kwargs=call).logits

    with pytest.raises(DeltaSpecError, match=r"DS441.*'a'.*\n.*once before"):
        vmap(run)(tensors)
    logits(compiled, deltas=["a", "b"])
    found = vmap(run)(tensors)
    torch.testing.assert_close(found[0], logits(compiled, deltas=["a", "b"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][0], logits(compiled)[0], rtol=1e-5, atol=1e-5)


def test_nothing_is_added_while_another_view_runs():
    compiled = build(lora("a", ["up"]), model=net(), capture="modules")
    view, found = compiled.view(), []

    def add() -> None:
        try:
            compiled.add({"deltaspec": 1, "deltas": [lora("n", ["up"], attached=False)]})
        except DeltaSpecError as error:
            found.append(str(error))

    def within(*_: object) -> None:
        if not found:
            thread = threading.Thread(target=add)
            thread.start()
            thread.join()

    view.backbone.up.register_forward_pre_hook(within)
    view(X)
    assert "DS456" in found[0] and list(compiled.deltas) == ["a"]


class Fused:
    """What trainers put on a language model: a forward that computes the head from its weight."""

    def __init__(self, model, read):
        self.before, self.model, self.read = model.forward, model, read

    def __call__(self, input_ids, fused=False, **kwargs):
        if not fused:
            return self.before(input_ids, **kwargs)
        hidden = self.model.model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.read(hidden, self.model.lm_head.weight))


@pytest.mark.parametrize("read", [F.linear, lambda x, weight: x @ weight.T, lambda x, weight: x.matmul(weight.t())])
@pytest.mark.parametrize("of", [lambda c: c, lambda c: c.backbone], ids=["compiled", "backbone"])
def test_a_forward_put_on_the_model_may_not_go_around_a_delta(of, read):
    heads, inner = lora("h", target=["lm_head"]), lora("q", target=["**.q_proj"])
    compiled = build(heads, inner)
    disturb(compiled)
    expected = logits(compiled.only("q") and compiled)
    compiled.only("h", "q")
    model = of(compiled)
    model.forward = Fused(model, read)
    whole = model(IDS).logits
    assert not torch.equal(whole, expected)
    with pytest.raises(DeltaSpecError, match="DS437.*'h'.*lm_head.*without calling"):
        model(IDS, fused=True)
    compiled.only("q")
    torch.testing.assert_close(model(IDS, fused=True).logits, expected)
    rows = model(IDS, deltas=["q", None]).logits if model is compiled else None
    assert rows is None or torch.allclose(rows[0], expected[0], atol=1e-5)


def test_a_forward_put_on_a_compiled_model_counts_as_one():
    compiled = build(lora("q", target=["**.q_proj"]))

    def switches(input_ids):
        compiled.detach()
        return compiled.backbone(input_ids)

    compiled.forward = switches
    with pytest.raises(DeltaSpecError, match="DS456"):
        compiled(IDS)
