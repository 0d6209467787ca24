"""Every method in half precision, under autocast, under other defaults of the process, and on empty batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import PARAMS, base
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import builtin_methods, methods

VARIANTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    **{name: (name, {}, None) for name in builtin_methods()},
    "dora": ("lora", {"use_dora": True}, None),
    "lora with bias": ("lora", {"bias": True}, None),
    "lora on an embedding": ("lora", {}, {"type": "Embedding"}),
    "oft on an embedding": ("oft", {}, {"type": "Embedding"}),
    "oft by solving": ("oft", {"transform": "cayley"}, None),
    "boft of two factors": ("boft", {"factors": 2}, None),
    "bat": ("miss", {"variant": "bat"}, None),
    "mini": ("miss", {"variant": "mini"}, None),
    "reft at the ends": ("reft", {"first": 1, "last": 1}, None),
    "adapter before": ("adapter", {"position": "before"}, None),
}
"""Every method, and variants that compute in another way."""
STARTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "ssf at random": ("ssf", {"init": "normal"}, None),
    "pissa": ("lora", {"init": "pissa"}, None),
    "fast pissa": ("lora", {"init": "pissa", "svd_iterations": 2}, None),
    "orthogonal": ("lora", {"init": "orthogonal"}, None),
}
"""Variants that start in another way."""
each = pytest.mark.parametrize("variant", VARIANTS)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 3]])
TOLERANCE = 0.1
"""Of logits about 1 in bfloat16."""


def entry(variant: str, **more: Any) -> dict[str, Any]:
    method, params, target = (VARIANTS | STARTS)[variant]
    found: dict[str, Any] = {"name": "a", "method": method, "params": {**PARAMS[method], **params}, **more}
    if "dropout" in found["params"]:
        found["params"]["dropout"] = 0.0
    if target is None and method in ("bitfit", "ssf"):
        target = {"type": "Linear"}  # the norms of Llama have no place for a bias
    return found if target is None else found | {"target": target}


def compiled(model: nn.Module, variant: str, **more: Any) -> CompiledModel:
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": [entry(variant, **more)]})
    disturb(c)
    return c


def merges(variant: str) -> bool:
    return methods()[(VARIANTS | STARTS)[variant][0]].promises.weight is not None


@pytest.mark.parametrize("way", ["cast after", "narrow"])
@each
def test_half_precision(variant, way):
    """Forwards, backwards, merged and row by row; `narrow`: the delta alone."""
    dtype = torch.float32 if way == "narrow" else torch.bfloat16
    model = base("bert", torch.float32 if way == "cast after" else dtype)
    c = compiled(model, variant, **({} if way == "cast after" else {"dtype": "bfloat16"}))
    c = c.to(dtype) if way == "cast after" else c
    output = c(input_ids=IDS, labels=IDS)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.trainable_parameters())
    logits = output.logits.detach()
    assert logits.dtype == dtype and logits.isfinite().all()
    with torch.no_grad():
        rows = c(input_ids=IDS, deltas=["a", None]).logits
        torch.testing.assert_close(rows[0], logits[0], atol=TOLERANCE, rtol=0)
        if merges(variant):
            merged = c.merge()(input_ids=IDS).logits
            torch.testing.assert_close(merged, logits, atol=1e-4 if way == "narrow" else TOLERANCE, rtol=0)


def dtypes(model: nn.Module, **given: Any) -> dict[str, torch.dtype]:
    """Run a model under autocast, and return what dtype leaves each of its modules."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaving = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if leaving is not None:
                seen[name.removeprefix("backbone.")] = leaving.dtype

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, **given)
    for hook in hooks:
        hook.remove()
    return seen


@cache
def bare(architecture: str) -> dict[str, torch.dtype]:
    return dtypes(base(architecture))


@pytest.mark.parametrize(
    ("variant", "architecture"), [*((v, "bert") for v in VARIANTS), *((v, "gpt2") for v in ("lora", "dora", "hira"))]
)
def test_autocast_gives_the_dtypes_of_the_bare_model(variant, architecture):
    """With and without gradients, at a strength, row by row; BERT's linear layers have biases, GPT-2 has Conv1D."""
    c = compiled(base(architecture), variant)
    wanted = bare(architecture)

    def check(model: nn.Module, **given: Any) -> None:
        found = dtypes(model, **given)
        assert {name: found[name] for name in wanted} == wanted

    check(c.backbone)
    with torch.no_grad():
        check(c.backbone)
        if methods()[VARIANTS[variant][0]].strength is not None:
            with c.only({"a": 0.5}):
                check(c.backbone)
    c.detach()
    check(c, deltas=["a", None])


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@cache
def fresh(variant: str) -> dict[str, Tensor]:
    c = deltaspec.compile(base("llama"), {"deltaspec": 1, "deltas": [entry(variant)]})
    return dict(c.deltas["a"].tensors())


@pytest.mark.parametrize("variant", VARIANTS | STARTS)
def test_the_defaults_of_the_process_change_nothing(variant, request):
    model, ids, wanted = base("llama"), IDS.clone(), fresh(variant)
    expected = deltaspec.compile(model, {"deltaspec": 1, "deltas": [entry(variant)]})(input_ids=ids).logits
    request.getfixturevalue("other_defaults")
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": [entry(variant)]})
    found = dict(c.deltas["a"].tensors())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert torch.equal(c(input_ids=ids).logits, expected)
    assert torch.equal(c(input_ids=ids, deltas=["a", None]).logits.argmax(-1)[0], expected.argmax(-1)[0])
    if merges(variant):
        c.merge()


class Net(nn.Module):
    """A layer of each kind that takes a batch without values."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv = nn.Embedding(48, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.fc, self.norm, self.out = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        text = self.emb(ids)
        text = text if not ids.shape[1] else self.conv(text.transpose(1, 2)).transpose(1, 2)  # it takes no length 0
        out: Tensor = self.out(self.norm(torch.tanh(self.fc(text))))
        return out


NOWHERE = {"p_tuning", "parallel_adapter", "prefix", "reft at the ends", "road", "soft_prompt"}
"""Variants that take no layer of that net."""


@each
def test_batches_without_values(variant):
    torch.manual_seed(0)
    model, taken = Net().eval(), 0
    for kind in ("Linear", "Embedding", "LayerNorm", "Conv1d"):
        spec = {"deltaspec": 1, "deltas": [entry(variant) | {"target": {"type": kind}}]}
        try:
            c = deltaspec.compile(model, spec, example_inputs=torch.zeros(2, 3, dtype=torch.long))
        except DeltaSpecError as error:
            assert {finding.code for finding in error.diagnostics} == {"DS402"}
            continue
        disturb(c)
        taken += 1
        without_values(c, [(0, 3)] if kind == "Conv1d" else [(0, 3), (2, 0), (0, 0)])
    assert taken or variant in NOWHERE


def without_values(c: CompiledModel, shapes: list[tuple[int, int]]) -> None:
    for shape in shapes:
        ids = torch.zeros(shape, dtype=torch.long)
        output = c(ids)
        assert output.shape == (*shape, 16)
        output.sum().backward()
        with torch.no_grad():
            assert c(ids).shape == (*shape, 16)
            assert c(ids, deltas=["a", None][: shape[0]]).shape == (*shape, 16)
