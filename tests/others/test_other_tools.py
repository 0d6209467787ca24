"""Other tools that change a compiled model: what they put on stays, what they replace is followed or refused."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from live_model import IDS, Acting, build, llama, logits, lora, two
from torch import nn

from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

NORMS = {"name": "norms", "method": "norm", "target": {"role": "norm"}, "attached": False}
ADAPTER = {
    "name": "adapter", "method": "adapter", "params": {"width": 4}, "target": "model.layers.*.mlp", "attached": False,
}  # fmt: skip


def linears(compiled: CompiledModel) -> list[nn.Module]:
    return [m for n, m in compiled.backbone.named_modules() if isinstance(m, nn.Linear) and "deltaspec" not in n]


def query(compiled: CompiledModel) -> Any:
    return compiled.backbone.model.layers[0].self_attn.q_proj


class Counted(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def test_hooks_put_on_under_one_delta_and_taken_off_under_another():
    compiled = two()
    acting, seen = Acting(compiled, "french", "german"), []
    compiled.only("french")
    for module in linears(compiled):
        add_hook_to_module(module, ModelHook())
    seen.append(acting(logits(compiled)))
    seen.append(acting(logits(compiled.only("german") and compiled)))
    for module in linears(compiled):
        remove_hook_from_module(module)
    seen.append(acting(logits(compiled)))
    seen.append(acting(logits(compiled.detach())))
    seen.append(acting(logits(compiled.attach("french"))))
    assert seen == ["french", "german", "german", "base", "french"]


@pytest.mark.parametrize("attached", [False, True])
def test_a_hook_stays_through_switches(attached):
    compiled = two()
    acting, hook = Acting(compiled, "french", "german"), Counted()
    if attached:
        compiled.only("french")
    add_hook_to_module(query(compiled), hook)
    for name in ("german", "french", "base", "german"):
        compiled.only(*() if name == "base" else (name,))
        before = hook.calls
        assert acting(logits(compiled)) == name and hook.calls == before + 1
    view = compiled.view()
    view.only("french")
    assert acting(logits(view)) == "french" and acting(logits(compiled)) == "german"


@pytest.mark.parametrize(("kind", "name"), [("LlamaRMSNorm", "norms"), ("LlamaMLP", "adapter"), ("Linear", "french")])
@pytest.mark.parametrize("attached", [False, True])
def test_a_forward_that_replaces_the_modules_own_is_beneath_the_deltas(kind, name, attached):
    compiled, calls = two(NORMS, ADAPTER), []
    acting = Acting(compiled, "french", name)

    def own(self: nn.Module, *args: Any) -> Any:
        calls.append(1)
        return type(self).forward(self, *args)

    if attached:
        compiled.only(name)
    modules = [module for module in compiled.backbone.modules() if type(module).__name__ == kind]
    for module in modules:
        module.forward = types.MethodType(own, module)
    for wanted in ("base", name, "french", name):
        compiled.only(*() if wanted == "base" else (wanted,))
        calls.clear()
        assert acting(logits(compiled)) == wanted
        # A norm whose weights are others runs its class's own forward.
        assert len(calls) == len(modules) or (kind == "LlamaRMSNorm" and wanted == "norms")
    compiled.detach()
    assert all(module.__dict__["forward"].__func__ is own for module in modules)


def test_wrappers_that_lead_to_ours_stay_around_it():
    compiled = two()
    acting = Acting(compiled, "french", "german")
    compiled.only("french")
    root, own = compiled.backbone.forward, query(compiled).forward
    compiled.backbone.forward = lambda *args, **kwargs: root(*args, **kwargs)
    query(compiled).forward = lambda x: own(x)
    for name in ("french", "german"):
        compiled.only(name)
        assert acting(logits(compiled)) == name
    mixed = logits(compiled, deltas=["french", None])
    torch.testing.assert_close(mixed[0], acting.known["french"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], acting.known["base"][1], rtol=1e-5, atol=1e-5)
    assert acting(logits(compiled.detach())) == "base"
    assert query(compiled).__dict__["forward"].__name__ == "<lambda>"


REGISTRY: dict[str, Any] = {}


@pytest.mark.parametrize(("way", "code"), [("never", "DS437"), ("only in training", "DS437"), ("hidden", "DS458")])
def test_wrappers_that_do_not_call_ours_are_refused_by_name(way, code):
    compiled = two()
    compiled.only("french")
    module = query(compiled)
    own = REGISTRY["own"] = module.forward
    module.forward = {
        "never": lambda x: module.weight.sum() * 0 + x if own is not None else own(x),
        "only in training": lambda x: own(x) if module.training else nn.functional.linear(x, module.weight),
        "hidden": lambda x: REGISTRY["own"](x),
    }[way]
    with pytest.raises(DeltaSpecError, match=rf"{code}.*model\.layers\.0\.self_attn\.q_proj"):
        logits(compiled)


@pytest.mark.parametrize("name", ["classifier", "layer", "another"])
def test_modules_in_the_place_of_others_are_followed(name):
    compiled = two({"name": "head", "method": "full", "target": "lm_head", "attached": False})
    acting = Acting(compiled, "french", "head")
    compiled.only("head" if name == "classifier" else "french")
    logits(compiled)
    backbone = compiled.backbone
    if name == "classifier":
        backbone.lm_head = nn.Linear(32, 60, bias=False)
    elif name == "layer":
        backbone.model.layers[1] = copy.deepcopy(llama().model.layers[1])
    else:
        backbone.model.norm = copy.deepcopy(backbone.model.norm)
    assert acting(logits(compiled)) == compiled.attached[0]  # what `full` trains stands in for whatever is there
    compiled.detach()
    assert (acting(logits(compiled)) == "base") if name != "classifier" else True
    assert not any("forward" in module.__dict__ for module in backbone.model.modules())
    assert all(parameter.requires_grad for module in linears(compiled) for parameter in module.parameters())


def bias(compiled: CompiledModel) -> None:
    compiled.backbone.model.layers[0].self_attn.q_proj = nn.Linear(32, 32)


def wider(compiled: CompiledModel) -> None:
    compiled.backbone.model.layers[0].self_attn.q_proj = nn.Linear(32, 64, bias=False)


def quantised(compiled: CompiledModel) -> None:
    torch.ao.quantization.quantize_dynamic(compiled.backbone, {nn.Linear}, inplace=True)


@pytest.mark.parametrize("change", [bias, wider, quantised])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_deltas_do_not_fit_any_more_is_refused_by_name(change):
    compiled = two()
    compiled.only("french")
    logits(compiled)
    change(compiled)
    with pytest.raises(DeltaSpecError, match=r"DS458.*'french'.*model\.layers\.0\.self_attn\.q_proj"):
        logits(compiled)
    logits(compiled.detach()) if change is not wider else None
    with pytest.raises(DeltaSpecError, match="DS458"):
        compiled.attach("german")
    with pytest.raises(DeltaSpecError, match="DS458"):
        compiled.merge("german")


def test_resized_embeddings():
    compiled = two(
        {"name": "words", "method": "lora", "params": {"rank": 2}, "target": {"role": "embed"}, "attached": False}
    )
    acting = Acting(compiled, "french")
    compiled.only("french")
    compiled.backbone.resize_token_embeddings(70, mean_resizing=False)
    assert logits(compiled).shape[-1] == 70 and acting(logits(compiled)) == "french"
    assert acting(logits(compiled.detach())) == "base"
    with pytest.raises(DeltaSpecError, match=r"DS458.*'words'.*\[70, 32\]"):
        compiled.attach("words")
    with pytest.raises(DeltaSpecError, match="DS458"):
        compiled.merge("words")


@pytest.mark.parametrize("what", ["layers", "backbone", "forward"])
def test_compiled_parts_follow_switches_views_and_copies(what):
    torch._dynamo.reset()
    compiled = two()
    acting = Acting(compiled, "french", "german")
    compiled.only("french")
    if what == "backbone":
        compiled.backbone.compile(backend="eager")
    for layer in compiled.backbone.model.layers:
        if what == "layers":
            layer.compile(backend="eager")
        elif what == "forward":
            layer.self_attn.q_proj.forward = torch.compile(layer.self_attn.q_proj.forward, backend="eager")
    for name in ("french", "german", "base", "french"):
        compiled.only(*() if name == "base" else (name,))
        assert acting(logits(compiled)) == name
    view, twin = compiled.view(), copy.deepcopy(compiled)
    view.only("german")
    assert [acting(logits(model)) for model in (view, twin, compiled)] == ["german", "french", "french"]
    torch._dynamo.reset()


def test_a_trace_after_a_change_is_refused():
    torch._dynamo.reset()
    compiled = two()
    acting = Acting(compiled, "french")
    compiled.only("french")
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    assert acting(logits(fast)) == "french"
    for module in linears(compiled):
        module.forward = types.MethodType(nn.Linear.forward, module)
    with pytest.raises(Exception, match="DS458"):
        logits(fast)
    assert acting(logits(compiled)) == "french" and acting(logits(fast)) == "french"
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [False, True])
def test_deltas_come_back_from_offloading(whole):
    compiled = two()
    acting = Acting(compiled, "french", "german")
    compiled.only("french")
    cpu_offload(compiled if whole else compiled.backbone, execution_device=torch.device("cpu"))
    for name in ("french", "german", "base", "french"):
        compiled.only(*() if name == "base" else (name,))
        assert acting(logits(compiled)) == name
    mixed = logits(compiled, deltas=["french", "german"])
    torch.testing.assert_close(mixed[1], acting.known["german"][1], rtol=1e-5, atol=1e-5)
    assert {p.device.type for delta in compiled.deltas.values() for p in delta.parameters()} == {"cpu"}


def test_parameters_put_in_while_attached_are_put_back_into_training():
    compiled = build(lora())
    layer = query(compiled)
    logits(compiled)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    compiled.detach()
    assert layer.weight.requires_grad  # as the one in whose place it is
    assert torch.equal(logits(compiled), llama()(input_ids=IDS).logits)
