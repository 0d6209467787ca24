"""Mixed batches: every row under its own deltas is what it is alone, in outputs, gradients and generation."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from models import Traceable
from test_behaviour import ARCHITECTURES, BUILDERS, PARAMS, TOKENS, base
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import builtin_methods, methods

PROMPTS = ("prefix", "soft_prompt", "p_tuning")
"""Tested in test_rows_prompts.py."""
METHODS = tuple(name for name in builtin_methods() if name not in PROMPTS)
ROWS = ["a", None, "b", "a", {"b": 0.5}]


def entry(name: str, method: str, target: Any = None, **params: Any) -> dict[str, Any]:
    found = {"name": name, "method": method, "params": PARAMS[method] | {"dropout": 0.0} | params}
    if "dropout" not in methods()[method].Params.model_fields:
        del found["params"]["dropout"]
    return found | {"attached": False} | ({} if target is None else {"target": target})


def build(model: nn.Module, *deltas: dict[str, Any]) -> CompiledModel:
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": list(deltas)})
    disturb(compiled)
    return compiled


def ids(rows: int = 5, length: int = 6) -> Tensor:
    found = torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(2))
    found[:, 0] = torch.tensor(TOKENS)[torch.arange(rows) % len(TOKENS)]  # tokens that trainable_tokens has
    return found


def batch(architecture: str) -> dict[str, Tensor]:
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    mask[3, :1] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    return given | ({"decoder_input_ids": ids()[:, :4]} if architecture == "t5" else {})


def alone(compiled: CompiledModel, given: dict[str, Tensor], row: int, deltas: Any) -> Tensor:
    """Run one row by itself."""
    if isinstance(deltas, dict):
        names = deltas
    else:
        names = dict.fromkeys((deltas,) if isinstance(deltas, str) else deltas or (), 1.0)
    with compiled.only(names) if names else compiled.detached():
        return compiled(**{key: value[row : row + 1] for key, value in given.items()}).logits[0]


def close(left: Tensor, right: Tensor, tolerance: float = 2e-5) -> bool:
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_what_it_is_alone(method, architecture):
    compiled = build(base(architecture), entry("a", method), entry("b", method))
    given = batch(architecture)
    with torch.no_grad():
        bare = compiled(**given).logits
        mixed = compiled(**given, deltas=ROWS).logits
        for row, deltas in enumerate(ROWS):
            assert close(mixed[row], alone(compiled, given, row, deltas)), deltas
        assert not close(mixed[0], bare[0])
        assert torch.equal(compiled(**given).logits, bare)
    assert not any("forward" in module.__dict__ for module in compiled.backbone.modules())


@pytest.mark.parametrize("method", METHODS)
def test_one_backward_gives_each_delta_the_gradient_of_its_own_rows(method):
    compiled = build(base("llama"), *(entry(name, method) for name in "abc"))
    given, rows = batch("llama"), ["a", None, "b", "a", "b"]
    weight = torch.randn(5, 6, 48, generator=torch.Generator().manual_seed(3))
    (compiled(**given, deltas=rows).logits * weight).sum().backward()
    found = {name: [p.grad for p in delta.parameters()] for name, delta in compiled.deltas.items()}
    assert all(gradient is None for gradient in found["c"])
    assert all(p.grad is None for n, p in compiled.backbone.named_parameters() if not n.startswith("deltaspec."))
    compiled.zero_grad()
    for name in "ab":
        own = [row for row, deltas in enumerate(rows) if deltas == name]
        with compiled.only(name):
            (compiled(**{key: value[own] for key, value in given.items()}).logits * weight[own]).sum().backward()
        expected = [p.grad for p in compiled.deltas[name].parameters()]
        largest = max(float(gradient.abs().max()) for gradient in expected)
        assert largest > 0
        for gradient, wanted in zip(found[name], expected, strict=True):
            assert gradient is not None
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * max(1.0, largest))


def family(model: nn.Module) -> CompiledModel:
    """Deltas of many methods and ranks."""
    return build(
        model,
        entry("lora2", "lora"),
        entry("lora4", "lora", rank=4),
        entry("adapter", "adapter"),
        entry("bitfit", "bitfit"),
        entry("ia3", "ia3"),
        entry("reft", "reft"),
        entry("again", "lora"),
        entry("hira", "hira", {"role": ["mlp.up", "attn.o"]}),
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_methods_ranks_stacks_and_strengths_mix(architecture):
    compiled = family(base(architecture))
    given = batch(architecture)
    choices: list[Any] = [None, *compiled.deltas, ("lora2", "adapter"), ("adapter", "again"), ("lora2", "again"),
                          ("reft", "bitfit", "ia3"), {"adapter": 0.3, "lora4": 2.0}, ("hira", "lora4")]  # fmt: skip
    pick = random.Random(0)
    with torch.no_grad():
        for _ in range(4):
            rows = [pick.choice(choices) for _ in range(5)]
            mixed = compiled(**given, deltas=rows).logits
            for row, deltas in enumerate(rows):
                assert close(mixed[row], alone(compiled, given, row, deltas)), (rows, deltas)


def test_order_of_a_stack_is_that_of_the_spec_as_everywhere():
    compiled = family(base("llama"))
    given = batch("llama")
    with torch.no_grad():
        left = compiled(**given, deltas=[("adapter", "again")] * 5).logits
        right = compiled(**given, deltas=[("again", "adapter")] * 5).logits
    assert torch.equal(left, right)


def test_what_is_attached_does_not_reach_rows_and_stays():
    compiled = family(base("llama"))
    compiled.only("adapter")
    given = batch("llama")
    with torch.no_grad():
        before = compiled(**given).logits
        mixed = compiled(**given, deltas=[None, "lora2", "ia3", None, "adapter"]).logits
        assert compiled.attached == ("adapter",) and torch.equal(compiled(**given).logits, before)
        assert close(mixed[4], before[4])
        assert close(mixed[0], alone(compiled, given, 0, None))


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beams", "several", "uncached"],
)
def test_generation_expands_rows(architecture, options):
    compiled = family(base(architecture))
    given = {key: value for key, value in batch(architecture).items() if key != "decoder_input_ids"}
    rows = ["lora4", None, ("lora2", "adapter"), "ia3", {"reft": 0.7}]
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    several = options.get("num_return_sequences", 1)
    mixed = compiled.generate(**given, **told, deltas=rows)
    for row, deltas in enumerate(rows):
        names = deltas if isinstance(deltas, dict) else (deltas,) if isinstance(deltas, str) else deltas or ()
        with compiled.only(names) if isinstance(names, dict) else compiled.only(*names):
            single = compiled.generate(**{key: value[row : row + 1] for key, value in given.items()}, **told)
        own = mixed[row * several : (row + 1) * several, : single.shape[1]]
        assert torch.equal(own, single), deltas


def test_sampling_with_the_same_seed_follows_the_rows():
    compiled = family(base("llama"))
    told = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(0)
    left = compiled.generate(ids(), **told, deltas=["lora2"] * 5)
    torch.manual_seed(0)
    with compiled.only("lora2"):
        right = compiled.generate(ids(), **told)
    assert torch.equal(left, right)


def test_one_compiled_graph_serves_a_hundred_assignments():
    torch._dynamo.reset()
    deltas = [entry(f"d{number}", "lora") for number in range(12)]
    compiled = build(BUILDERS["short llama"]().eval(), *deltas)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(compiled, fullgraph=True, backend=count)
    pick = random.Random(1)
    tokens = ids()
    with torch.no_grad():
        for _ in range(100):
            names = [pick.choice([None, *compiled.deltas]) for _ in range(4)] + ["d3"]
            rows = [{name: pick.random()} if name and pick.random() < 0.3 else name for name in names]
            output = fast(tokens, deltas=compiled.rows(rows)).logits
        assert len(graphs) == 1
        assert close(output, compiled(tokens, deltas=rows).logits)
        # Other values of the same shapes: trained further, or loaded.
        disturb(compiled)
        assert close(fast(tokens, deltas=compiled.rows(rows)).logits, compiled(tokens, deltas=rows).logits)
        assert not close(fast(tokens, deltas=compiled.rows(rows)).logits, output)
        assert len(graphs) == 1
        compiled.rows([None] * 5, among=["d0"])
        fast(tokens, deltas=compiled.rows([None] * 5, among=["d0"]))
        assert len(graphs) == 1


def test_switches_and_other_kinds_in_between_compile_nothing_anew():
    torch._dynamo.reset()
    low = [entry(name, "lora", "**.q_proj", rank=rank) for name, rank in (("a", 2), ("b", 2), ("c", 3))]
    compiled = build(BUILDERS["short llama"]().eval(), *low, entry("d", "ssf", "**.q_proj"))
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    fast, rows = torch.compile(compiled, fullgraph=True, backend=count), ["a", None, "b", {"a": 0.5}, None]
    with torch.no_grad():
        expected = compiled(ids(), deltas=rows).logits
        for between in ((), ("a",), ({"b": 0.5},), ("c",)):
            assert close(fast(ids(), deltas=compiled.rows(rows, among=["c"])).logits, expected)
            compiled.only(*between)
        for other in ("c", "d"):
            compiled(ids(), deltas=[other, None, "a", None, None])
            assert close(fast(ids(), deltas=compiled.rows(rows, among=["c"])).logits, expected)
            compiled.detach()
    assert len(graphs) == 1


def test_one_compiled_graph_serves_batches_of_any_size():
    torch._dynamo.reset()
    compiled = build(BUILDERS["short llama"]().eval(), entry("a", "lora"), entry("b", "lora"))
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(compiled, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        for size in (2, 3, 5, 7):
            rows = [(None, "a", "b")[number % 3] for number in range(size)]
            mixed = fast(ids(size, 4 + size), deltas=compiled.rows(rows)).logits
            assert close(mixed, compiled(ids(size, 4 + size), deltas=rows).logits)
    assert len(graphs) == 1


def test_under_compile_rows_must_be_made_outside():
    torch._dynamo.reset()
    compiled = build(BUILDERS["short llama"]().eval(), entry("a", "lora"))
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="DS444"):
        fast(ids(), deltas=["a"] * 5)
    rows = compiled.rows(["a"] * 5)
    compiled.detach()
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="DS444"):
        fast(ids(), deltas=rows)


def test_rows_made_before_a_cast_are_made_anew():
    compiled = family(base("llama"))
    rows = compiled.rows(["lora2", "adapter", None, "ia3", "again"])
    compiled.double()
    given = batch("llama")
    with torch.no_grad():
        mixed = compiled(**given, deltas=rows).logits
        assert mixed.dtype is torch.float64
        assert close(mixed[4], alone(compiled, given, 4, "again"), 1e-10)


def test_half_precision_backbones_mix_float32_deltas():
    compiled = build(BUILDERS["llama"]().eval().bfloat16(), entry("a", "lora"), entry("b", "adapter"))
    given = batch("llama")
    with torch.no_grad():
        mixed = compiled(**given, deltas=["a", "b", None, ("a", "b"), "b"]).logits
        assert mixed.dtype is torch.bfloat16
        for row, deltas in enumerate(["a", "b", None, ("a", "b"), "b"]):
            assert close(mixed[row].float(), alone(compiled, given, row, deltas).float(), 5e-2)


@pytest.mark.parametrize(
    ("deltas", "error", "text"),
    [
        (["a", "nobody", None, "somebody", "a"], deltaspec.DeltaSpecError, "(?s)DS434.*nobody.*DS434.*somebody"),
        (["a", "a"], DeltaSpecError, "DS443.*2 rows, and the batch has 5"),
        (["a"], DeltaSpecError, "DS443.*1 row, and the batch has 5"),
        ([], DeltaSpecError, "DS443.*0 rows, and the batch has 5"),
        ("a", TypeError, "one entry a row"),
        ([1, None, None, None, None], TypeError, r"deltas\[0\]"),
        ([("a", 2), None, None, None, None], TypeError, r"deltas\[0\]"),
        ([("a", "a"), None, None, None, None], ValueError, "twice"),
        ([{"a": float("inf")}, None, None, None, None], ValueError, "finite"),
        ([{"a": "much"}, None, None, None, None], TypeError, "strength of 'a'"),
        ([("full1", "full2"), None, None, None, None], DeltaSpecError, "DS436"),
    ],
)
def test_wrong_assignments_are_refused_before_anything_runs(deltas, error, text):
    compiled = build(
        base("llama"),
        entry("a", "lora"),
        entry("full1", "full", {"role": "mlp.down"}),
        entry("full2", "full", {"role": "mlp.down"}),
    )
    with pytest.raises(error, match=text):
        compiled(ids(), deltas=deltas)
    assert not any("forward" in module.__dict__ for module in compiled.backbone.modules())


def test_an_error_in_a_forward_with_rows_leaves_nothing_behind():
    compiled = build(base("llama"), entry("a", "lora"))
    with torch.no_grad():
        before = compiled(ids()).logits
        with pytest.raises(IndexError):
            compiled(torch.full((2, 3), 10**6), deltas=["a", None])
        assert torch.equal(compiled(ids()).logits, before)
        assert close(compiled(ids(), deltas=["a"] * 5).logits[1], alone(compiled, {"input_ids": ids()}, 1, "a"))


def test_flags_and_state_are_those_of_a_fresh_clone_afterwards():
    model = base("llama")
    compiled = build(model, entry("a", "lora"), entry("b", "adapter"))
    keys = list(compiled.state_dict())
    compiled(ids(), deltas=["a", "b", None, "a", "a"])
    assert list(compiled.state_dict()) == keys
    fresh = deltaspec.compile(model, {"deltaspec": 1, "deltas": [entry("a", "lora"), entry("b", "adapter")]})
    for (name, ours), (_, theirs) in zip(compiled.named_parameters(), fresh.named_parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad, name
    for ours, theirs in zip(compiled.backbone.modules(), fresh.backbone.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()


def test_images_convolutions_and_norms_mix():
    model = Traceable().eval()
    pairs = itertools.product(["lora", "bitfit", "ssf", "ia3", "loha", "oft", "hira", "full"], "ab")
    places = {"lora": ["conv", "up", "head"], "bitfit": ["conv", "bn", "norm"], "ssf": ["conv", "bn", "norm", "up"],
              "oft": ["up"], "full": ["conv", "norm"]}  # fmt: skip
    compiled = build(model, *(entry(f"{m}_{n}", m, places.get(m, ["conv"])) for m, n in pairs))
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for method in places.keys() | {"ia3", "loha", "hira"}:
            rows = [f"{method}_a", None, f"{method}_b", f"{method}_b", None, f"{method}_a"]
            mixed = compiled(x, deltas=rows)
            for row, name in enumerate(rows):
                with compiled.only(name) if name else compiled.detached():
                    assert close(mixed[row], compiled(x[row : row + 1])[0]), (method, name)


@pytest.mark.parametrize("site", ["layers.0.linear1", "layers.1.self_attn.out_proj"])
def test_hosts_that_read_weights_without_a_call_take_rows(site):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(4, 5, 16)
    deltas = [entry(name, "lora", site) for name in "ab"]
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, example_inputs=x)
    disturb(compiled)
    rows = ["a", None, {"b": 0.5}, ("a", "b")]
    with torch.no_grad():
        mixed = compiled(x, deltas=rows)
        for row, names in enumerate([("a",), (), {"b": 0.5}, ("a", "b")]):
            with compiled.only(names) if isinstance(names, dict) else compiled.only(*names):
                assert close(mixed[row], compiled(x[row : row + 1])[0])


def test_a_batch_in_the_second_dimension_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 1, enable_nested_tensor=False).eval()
    x = torch.randn(5, 4, 16)
    deltas = [entry("a", "lora", "**.out_proj")]
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, example_inputs=x)
    with pytest.raises(DeltaSpecError, match="DS441.*second dimension"):
        compiled(x, deltas=["a", None, None, None])


def test_statistics_of_a_batch_are_refused():
    compiled = build(Traceable().eval(), entry("a", "full", "bn"))
    with pytest.raises(DeltaSpecError, match="DS441.*statistics"):
        compiled(torch.randn(2, 3, 8, 8), deltas=["a", None])


def test_tokens_flattened_by_a_model_are_told_apart():
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(-1, 8)).reshape(x.shape)

    compiled = build(Flattening().eval(), entry("a", "lora", "inner"), entry("b", "adapter", "inner", width=2))
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        mixed = compiled(x, deltas=["a", None, "b"])
        for row, name in enumerate(["a", None, "b"]):
            with compiled.only(name) if name else compiled.detached():
                assert close(mixed[row], compiled(x[row : row + 1])[0])


def test_hidden_states_that_tell_no_rows_are_refused():
    class Routing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, 8)
            return x.sum() + self.inner(flat[flat[:, 0] > 0]).sum()

    compiled = build(Routing().eval(), entry("a", "lora", "inner"))
    x = torch.randn(2, 16, 8)
    x[0, :3, 0], x[1, :, 0], x[0, 3:, 0] = 1.0, 1.0, -1.0
    with pytest.raises(DeltaSpecError, match="DS442"):
        compiled(x, deltas=["a", None])


class Misplaced(nn.Module):
    """Gives its linear layer the rows of a batch otherwise than in order, along dimension 0."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if self.way == "time first":
            return self.inner(x.transpose(0, 1)).transpose(0, 1)
        if self.way == "time first, flat":
            flat = self.inner(x.transpose(0, 1).reshape(batch * length, width))
            return flat.view(length, batch, width).transpose(0, 1)
        if self.way == "turned round":
            return self.inner(x.flip(0)).flip(0)
        if self.way == "moved on":
            return self.inner(x.roll(1, 0)).roll(-1, 0)
        if self.way == "sorted":
            order = x.sum((1, 2)).argsort()
            return self.inner(x[order])[order.argsort()]
        return torch.cat([self.inner(row[None]) for row in x])


@pytest.mark.parametrize("way", ["time first", "time first, flat", "turned round", "moved on", "sorted", "one by one"])
@pytest.mark.parametrize("length", [4, 5])
def test_rows_that_are_not_along_the_first_dimension_are_refused_before_anything_runs(way, length):
    compiled = build(Misplaced(way).eval(), entry("a", "lora", "inner"))
    with pytest.raises(DeltaSpecError, match="DS442.*inner"):
        compiled(torch.randn(4, length, 8), deltas=["a", None, "a", None])


def test_inputs_that_all_rows_share_are_told_from_rows():
    model = BUILDERS["gpt2"]().eval()
    compiled = build(model, entry("places", "lora", "**.wpe"), entry("a", "lora"))
    given = batch("gpt2")
    with torch.no_grad():
        mixed = compiled(**given, deltas=["places", None, "a", ("places", "a"), None]).logits
        for row, deltas in enumerate(["places", None, "a", ("places", "a"), None]):
            assert close(mixed[row], alone(compiled, given, row, deltas))


def test_hosts_that_run_once_a_delta_must_write_no_cache():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    compiled = build(model, entry("a", "lora", "**.dt_proj"))
    with torch.no_grad():
        with pytest.raises(DeltaSpecError, match="DS442.*cache"):
            compiled(ids(), deltas=["a", None, "a", None, "a"])
        mixed = compiled(ids(), deltas=["a", None, "a", None, "a"], use_cache=False).logits
        for row, deltas in enumerate(["a", None]):
            assert close(mixed[row], alone(compiled, {"input_ids": ids()}, row, deltas))


def test_rows_first_used_in_inference_mode_train_afterwards():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    with torch.inference_mode():
        compiled(ids(), deltas=["a", None, "b", "a", None])
    compiled(ids(), deltas=["a", None, "b", "a", None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.trainable_parameters("a", "b"))


def test_rows_under_autocast():
    compiled = build(base("llama"), entry("a", "adapter"), entry("b", "lora"))
    rows = ["a", None, "b", "a", None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = compiled(ids(), deltas=rows).logits
        for row, deltas in enumerate(rows):
            assert close(mixed[row].float(), alone(compiled, {"input_ids": ids()}, row, deltas).float(), 5e-2)


def test_a_single_row_shows_nothing_so_the_next_batch_is_still_tried():
    compiled = build(Misplaced("time first").eval(), entry("a", "lora", "inner"))
    compiled(torch.randn(1, 1, 8), deltas=["a"])
    with pytest.raises(DeltaSpecError, match="DS442.*inner"):
        compiled(torch.randn(4, 4, 8), deltas=["a", None, "a", None])


@pytest.mark.parametrize("way", ["time first, flat", "turned round", "moved on", "sorted"])
def test_a_first_batch_that_shows_little_hides_nothing(way):
    x = torch.randn(4, 4, 8)
    for first in (x[:1].repeat(4, 1, 1), torch.zeros(4, 4, 8), x * float("nan"), x[:2], torch.cat([x[:2], x[:2]])):
        compiled = build(Misplaced(way).eval(), entry("a", "lora", "inner"))
        with pytest.raises(DeltaSpecError, match="DS442.*inner"):
            compiled(first, deltas=["a", None, "a", None][: len(first)])


def test_rows_that_are_alike_or_no_numbers_are_tried_on_others():
    compiled = build(Traceable().eval(), entry("a", "lora", "up"))
    compiled(torch.zeros(2, 3, 8, 8), deltas=["a", None])
    compiled = build(Traceable().eval(), entry("a", "lora", "up"))
    x = torch.randn(3, 3, 8, 8)
    x[1] = float("nan")
    assert compiled(x, deltas=["a", "a", None])[[0, 2]].isfinite().all()


def test_rows_inside_of_a_structure_are_tried_too():
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, given: Any) -> Tensor:
            x = given["x"] if isinstance(given, dict) else given[0]
            return self.inner(x.flip(0)).flip(0)

    for given in ({"x": torch.randn(4, 8)}, [torch.randn(4, 8)], (torch.randn(4, 8),)):
        compiled = build(Inside().eval(), entry("a", "lora", "inner"))
        with pytest.raises(DeltaSpecError, match="DS442.*inner"):
            compiled(given, deltas=["a", None, "a", None])


def test_rows_of_whole_numbers_that_are_all_alike_show_nothing():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)).eval()
    compiled = build(model, entry("a", "lora", "1"))
    with pytest.raises(DeltaSpecError, match="DS442.*alike"):
        compiled(torch.ones(3, 4, dtype=torch.long), deltas=["a", None, "a"])
    compiled(torch.tensor([[1, 2], [2, 1], [3, 3]]), deltas=["a", None, "a"])


def test_the_trial_leaves_buffers_as_they_were():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model = Counting().eval()
    compiled = build(model, entry("a", "lora", "inner"))
    compiled(torch.randn(4, 8), deltas=["a", None, "a", None])
    compiled.detach()
    assert compiled.backbone.calls == model.calls == 0


@pytest.mark.parametrize("method", ["lora", "full", "loha", "trainable_tokens"])
def test_padding_has_no_gradient_in_a_mixed_batch_either(method):
    model = nn.Sequential(nn.Embedding(40, 8, padding_idx=0), nn.Linear(8, 8)).eval()
    compiled = build(model, entry("a", method, "0"), entry("b", "lora", "1"))
    tokens = torch.randint(0, 3, (4, 6), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(4, 6, 8)
    (compiled(tokens, deltas=["a", "b", ("a", "b"), None]) * weights).sum().backward()
    mixed = [p.grad for p in compiled.trainable_parameters("a")]
    compiled.zero_grad()
    for row, names in ((0, ("a",)), (2, ("a", "b"))):
        with compiled.only(*names):
            (compiled(tokens[row : row + 1])[0] * weights[row]).sum().backward()
    for left, right in zip(mixed, compiled.trainable_parameters("a"), strict=True):
        torch.testing.assert_close(left, right.grad)


def test_stacking_leaves_no_second_copy_of_the_deltas():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    compiled(ids(), deltas=ROWS)
    assert not any(compiled._attachments.stacks._left)
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    view = compiled.view()
    view(ids(), deltas=ROWS)
    view(ids(), deltas=ROWS)  # no kernel can still be reading what was left
    assert not any(compiled._attachments.stacks._left)


def test_a_model_that_wants_its_rows_in_one_order_is_refused_and_its_own_errors_are_raised():
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.rnn = nn.Linear(8, 8), nn.LSTM(8, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(self.inner(x), lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    x, lengths = torch.randn(3, 5, 8), torch.tensor([5, 3, 2])
    model = Packing().eval()
    spec = {"deltaspec": 1, "deltas": [entry("a", "lora", "inner")]}
    compiled = deltaspec.compile(model, spec, example_inputs=(x, lengths))
    with pytest.raises(DeltaSpecError, match="DS442.*another order"):
        compiled(x, lengths, deltas=["a", None, "a"])
    with pytest.raises(RuntimeError, match="sorted"):
        compiled(x, lengths.flip(0), deltas=["a", None, "a"])
    assert torch.equal(compiled.detach()(x, lengths), model(x, lengths))
