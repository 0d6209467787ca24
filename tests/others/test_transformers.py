"""What people do with transformers models, done with compiled ones: generation, training, casts, compilation."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, TRANSFORMERS, ids
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AlbertForMaskedLM,
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    Trainer,
    TrainingArguments,
    pipeline,
)

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import seed
from deltaspec.diagnostics.findings import DeltaSpecError

DELTAS = {
    "bert": {"role": ["attn.q", "attn.v"]},
    "gpt2": {"role": "attn.qkv"},
    "llama": {"role": ["attn.q", "attn.v"]},
    "t5": {"role": ["attn.q", "attn.v"]},
    "bart": {"role": ["attn.q", "attn.v"]},
    "vit": {"role": ["attn.q", "attn.v"]},
}
GENERATING = ("gpt2", "llama", "t5", "bart")


def spec(architecture: str, dropout: float = 0.0) -> dict[str, Any]:
    return {
        "deltaspec": 1,
        "deltas": [
            {
                "name": "low",
                "method": "lora",
                "params": {"rank": 2, "dropout": dropout},
                "target": DELTAS[architecture],
            },
            {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": {"role": "block"}},
        ],
    }


def build(architecture: str, model: nn.Module | None = None, **rest: Any) -> CompiledModel:
    """Compile both deltas and move them off their initial values."""
    compiled = deltaspec.compile(model or ARCHITECTURES[architecture].model(), spec(architecture, **rest))
    disturb(compiled)
    return compiled


@torch.no_grad()
def disturb(compiled: CompiledModel, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter))


@torch.no_grad()
def logits(model: Any, architecture: str, **rest: Any) -> Tensor:
    return model(**ARCHITECTURES[architecture].inputs(), **rest).logits


# Generation


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"num_beams": 2, "do_sample": True, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "uncached", "beam", "sampling", "beam-sampling"],
)
@pytest.mark.parametrize("architecture", GENERATING)
def test_generate(architecture, options):
    model = ARCHITECTURES[architecture].model()
    compiled = build(architecture, model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **options}

    def run(which: Any) -> list[list[int]]:
        with seed(5):
            return which.generate(input_ids=ids(2, 5), **options).tolist()

    attached = run(compiled)
    assert run(compiled.backbone) == attached
    merged = deltaspec.compile(model, spec(architecture) | {"deltas": spec(architecture)["deltas"][:1]})
    disturb(merged, 0.3)
    assert run(merged) == run(merged.merge())
    with compiled.detached():
        assert run(compiled) == run(model)
    assert run(compiled) == attached


def test_cached_and_uncached_generation_agree_with_deltas():
    for architecture in GENERATING:
        compiled = build(architecture)
        options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
        cached, uncached = (compiled.generate(input_ids=ids(2, 5), use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, uncached), architecture


def test_generation_changes_with_the_active_delta():
    compiled = build("llama")
    disturb(compiled, 1.0)
    seen = []
    for names in ((), ("low",), ("wide",), ("low", "wide")):
        compiled.only(*names)
        seen.append(compiled.generate(input_ids=ids(1, 5), max_new_tokens=12, do_sample=False).tolist())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


# Calls


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_optional_outputs(architecture):
    model = ARCHITECTURES[architecture].model()
    model.set_attn_implementation("eager")
    compiled = build(architecture, model)
    inputs = ARCHITECTURES[architecture].inputs()
    with torch.no_grad():
        out = compiled(**inputs, output_attentions=True, output_hidden_states=True)
        plain = compiled(**inputs)
        listed = compiled(**inputs, return_dict=False)
        base = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(listed[0], out.logits)
    for name in ("hidden_states", "attentions", "encoder_hidden_states", "cross_attentions"):
        if base.get(name):
            assert [tuple(t.shape) for t in out[name]] == [tuple(t.shape) for t in base[name]]
            assert any(not torch.equal(a, b) for a, b in zip(out[name], base[name], strict=True))


def test_labels_and_positional_arguments():
    compiled = build("bert")
    labels = torch.tensor([0, 2])
    out = compiled(ids(), labels=labels)
    expected = nn.functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, expected)
    mask = torch.ones_like(ids())
    mask[:, -2:] = 0
    with torch.no_grad():
        assert torch.equal(compiled(ids(), mask).logits, compiled(input_ids=ids(), attention_mask=mask).logits)
        assert not torch.equal(compiled(ids(), mask).logits, compiled(ids()).logits)


def test_wrong_arguments_fail_as_they_do_on_the_original():
    compiled = build("bert")
    with pytest.raises(TypeError):
        compiled(ids(), nonsense=1, attention_mask=None, input_ids=ids())


def test_the_root_forwards_what_the_backbone_has():
    compiled = build("llama")
    assert compiled.config is compiled.backbone.config
    assert compiled.device == torch.device("cpu") and compiled.dtype is torch.float32
    assert compiled.get_input_embeddings() is compiled.backbone.get_input_embeddings()
    assert compiled.generation_config is compiled.backbone.generation_config
    assert compiled.num_parameters() >= ARCHITECTURES["llama"].model().num_parameters()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = compiled.no_such_thing


# Trainer


class Texts(Dataset):
    """Eight rows of token ids with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": ids(8, 6)[index], "labels": torch.tensor(index % 3)}


@pytest.mark.parametrize("whole", [True, False], ids=["compiled", "backbone"])
def test_trainer_trains_and_saves(tmp_path, whole):
    model = ARCHITECTURES["bert"].model()
    before = snapshot(model, identity=True)
    compiled = build("bert", model, dropout=0.1)
    compiled.only("low")
    start = {key: value.clone() for key, value in compiled.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.05, save_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", gradient_checkpointing=not whole,
    )  # fmt: skip
    trainer = Trainer(model=compiled if whole else compiled.backbone, args=arguments, train_dataset=Texts())
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    compiled.eval()
    moved = {key for key, value in compiled.state_dict().items() if not torch.equal(value, start[key])}
    mine = {id(p) for p in compiled.deltas["low"].parameters()}
    assert moved == {key for key, p in compiled.named_parameters(remove_duplicate=False) if id(p) in mine}
    assert differences(before, snapshot(model, identity=True)) == []
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "end").is_dir()
    compiled.save(tmp_path / "deltas")
    back = deltaspec.restore(model, tmp_path / "deltas")
    assert torch.equal(logits(back, "bert"), logits(compiled, "bert"))
    compiled.detach()
    assert torch.equal(logits(compiled, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, reentrant):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        compiled = build(architecture)
        if checkpointing:
            compiled.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                compiled.enable_input_require_grads()
        for module in compiled.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        compiled.train()
        cache = {} if architecture == "bert" else {"use_cache": False}
        with seed(4):  # dropout that is no module of its own
            compiled(**ARCHITECTURES[architecture].inputs(), **cache).logits.pow(2).sum().backward()
        return {name: p.grad for name, p in compiled.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) > 4
    for name, value in plain.items():
        assert value is not None and checkpointed[name] is not None, name
        torch.testing.assert_close(value, checkpointed[name], rtol=1e-3, atol=1e-4)


# Other tools


def test_pipeline(minilm_dir):
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    model = AutoModel.from_pretrained(minilm_dir).eval()
    compiled = deltaspec.compile(
        model, {"deltaspec": 1, "deltas": [{"name": "low", "method": "lora", "params": {"rank": 4}}]}
    )
    plain = pipeline("feature-extraction", model=model, tokenizer=tokenizer)("deltas attach")
    extract = pipeline("feature-extraction", model=compiled.backbone, tokenizer=tokenizer)
    assert extract("deltas attach") == plain  # a fresh LoRA is the identity
    disturb(compiled)
    changed = extract("deltas attach")
    assert changed != plain
    batch = tokenizer("deltas attach", return_tensors="pt")
    with torch.no_grad():
        assert compiled(**batch).last_hidden_state.tolist() == changed
    compiled.detach()
    assert extract("deltas attach") == plain


def test_accelerate_hooks_on_a_module_run_and_stay():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    model = ARCHITECTURES["bert"].model()
    query = "bert.encoder.layer.0.attention.self.query"
    reference = logits(model, "bert")
    add_hook_to_module(model.get_submodule(query), Count())
    compiled = deltaspec.compile(model, spec("bert"))
    disturb(compiled)
    hookless = logits(build("bert"), "bert")
    Count.calls = 0
    assert torch.equal(logits(compiled, "bert"), hookless) and Count.calls == 1
    compiled.detach()
    assert torch.equal(logits(compiled, "bert"), reference) and Count.calls == 2
    assert torch.equal(logits(model, "bert"), reference) and Count.calls == 3
    with pytest.raises(DeltaSpecError, match=r"DS433.*attention\.self\.query"):
        pickle.dumps(compiled)
    twin = copy.deepcopy(compiled)
    assert torch.equal(logits(twin, "bert"), reference) and Count.calls == 4
    remove_hook_from_module(model.get_submodule(query))
    assert torch.equal(logits(model, "bert"), reference) and Count.calls == 4


def test_the_hook_of_a_copied_backbone_runs_the_copy():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = ARCHITECTURES["bert"].model()
    query = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    add_hook_to_module(query, ModelHook())
    compiled = build("bert", model)
    before = logits(compiled, "bert")
    with torch.no_grad():
        query._buffers.clear()
        query._parameters["weight"] = nn.Parameter(torch.zeros_like(query.weight))
    assert torch.equal(logits(compiled, "bert"), before)


# torch.compile and torch.export


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_torch_compile_follows_the_active_set(architecture):
    torch._dynamo.reset()
    compiled = build(architecture)
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    for names in (("low", "wide"), (), ("wide",), ("low", "wide"), ()):
        compiled.only(*names)
        torch.testing.assert_close(logits(fast, architecture), logits(compiled, architecture), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_torch_compile_of_the_backbone_trains():
    torch._dynamo.reset()
    compiled = build("bert")
    fast = torch.compile(compiled.backbone, fullgraph=True, backend="aot_eager")
    grads = []
    for which in (compiled.backbone, fast):
        compiled.zero_grad()
        which(**ARCHITECTURES["bert"].inputs()).logits.pow(2).sum().backward()
        grads.append([p.grad.clone() for p in compiled.trainable_parameters()])
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_export(architecture):
    inputs = ARCHITECTURES[architecture].inputs()
    cache = {} if architecture in ("bert", "vit") else {"use_cache": False}
    compiled = build(architecture)
    results = []
    for names in (("low", "wide"), ()):
        compiled.only(*names)
        program = compiled.export((), {**inputs, **cache}, strict=False)
        with torch.no_grad():
            out = program.module()(**inputs, **cache).logits
        torch.testing.assert_close(out, logits(compiled, architecture, **cache), rtol=1e-5, atol=1e-6)
        results.append(out)
    assert not torch.allclose(*results, atol=1e-5)


# Dtypes and states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_half_precision_backbones_give_half_precision_and_keep_float32_deltas(architecture, dtype, tmp_path):
    model = ARCHITECTURES[architecture].model().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[architecture].inputs().items()}
    compiled = deltaspec.compile(model, spec(architecture))
    with torch.no_grad():
        reference = model(**inputs).logits
        assert torch.equal(compiled(**inputs).logits, reference)
        disturb(compiled)
        out = compiled(**inputs).logits
        assert out.dtype is dtype and not torch.equal(out, reference)
        assert {p.dtype for p in compiled.trainable_parameters()} == {torch.float32}
        compiled.save(tmp_path)
        assert torch.equal(deltaspec.restore(model, tmp_path)(**inputs).logits, out)
    compiled(**inputs).logits.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in compiled.trainable_parameters())


@pytest.mark.parametrize("cast", [lambda c: c.half(), lambda c: c.to(torch.bfloat16), lambda c: c.double()])
def test_casting_a_compiled_model_casts_all_of_it(cast):
    model = ARCHITECTURES["bert"].model()
    compiled = build("bert", model)
    wanted = logits(compiled, "bert")
    assert cast(compiled) is compiled
    dtype = compiled.backbone.dtype
    assert {p.dtype for p in compiled.parameters()} == {dtype}
    out = logits(compiled, "bert")
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), wanted, rtol=0.1, atol=0.05)
    assert model.dtype is torch.float32
    compiled.detach()
    assert torch.equal(logits(compiled, "bert"), logits(cast(copy.deepcopy(model)), "bert"))


def test_casting_the_backbone_is_followed_too():
    compiled = build("gpt2")
    compiled.backbone.to(torch.float64)
    assert logits(compiled, "gpt2").dtype is torch.float64
    assert {p.dtype for p in compiled.parameters()} == {torch.float64}


def test_autocast():
    compiled = build("llama")
    plain = logits(compiled, "llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = compiled(**ARCHITECTURES["llama"].inputs()).logits
        cast.float().pow(2).sum().backward()
    assert cast.dtype is torch.bfloat16
    torch.testing.assert_close(cast.float(), plain, rtol=0.1, atol=0.05)
    assert all(p.grad is not None for p in compiled.trainable_parameters())


def test_inference_mode_leaves_the_model_fit_for_training():
    compiled = build("llama")
    with torch.inference_mode():
        compiled.detach()
        first = compiled(**ARCHITECTURES["llama"].inputs()).logits
        compiled.attach()
        second = compiled(**ARCHITECTURES["llama"].inputs()).logits
        assert first.is_inference() and not torch.equal(first, second)
    compiled(**ARCHITECTURES["llama"].inputs()).logits.sum().backward()
    assert all(p.grad is not None for p in compiled.trainable_parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_strict_and_followed(assign):
    compiled, other = build("bert"), build("bert")
    disturb(other, 0.5)
    wanted = logits(other, "bert")
    assert not torch.equal(logits(compiled, "bert"), wanted)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    result = compiled.load_state_dict(state, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(logits(compiled, "bert"), wanted)
    compiled.detach("low")
    other.detach("low")
    assert torch.equal(logits(compiled, "bert"), logits(other, "bert"))
    key = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        compiled.load_state_dict({k: v for k, v in state.items() if k != key}, strict=True)


def test_the_keys_of_the_state_do_not_depend_on_what_is_attached():
    compiled = build("t5")
    attached = list(compiled.state_dict())
    backbone = list(compiled.backbone.state_dict())
    compiled.detach()
    assert list(compiled.state_dict()) == attached and list(compiled.backbone.state_dict()) == backbone
    original = list(ARCHITECTURES["t5"].model().state_dict())
    assert [key for key in backbone if "deltaspec" not in key] == original
    assert attached == [f"backbone.{key}" for key in backbone]


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_pickling(architecture, way):
    compiled = build(architecture)
    compiled.only("wide")
    expected = logits(compiled, architecture)
    if way == "pickle":
        back = pickle.loads(pickle.dumps(compiled))
    else:
        stream = io.BytesIO()
        torch.save(compiled, stream)
        stream.seek(0)
        back = torch.load(stream, weights_only=False)
    assert isinstance(back, CompiledModel) and back.attached == ("wide",) and back.capture == compiled.capture
    assert torch.equal(logits(back, architecture), expected)
    for names in ((), ("low",), ("low", "wide")):
        back.only(*names)
        compiled.only(*names)
        assert torch.equal(logits(back, architecture), logits(compiled, architecture))
    flags = {n: p.requires_grad for n, p in compiled.detach().named_parameters()}
    assert {n: p.requires_grad for n, p in back.detach().named_parameters()} == flags


# Real weights


def test_minilm(minilm_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    model = AutoModel.from_pretrained(minilm_dir).eval()
    before = snapshot(model, identity=True)
    batch: BatchEncoding = tokenizer(
        ["a delta", "is attached to a pretrained model"], padding=True, return_tensors="pt"
    )
    compiled = deltaspec.compile(
        model,
        {
            "deltaspec": 1,
            "deltas": [
                {"name": "norms", "method": "full", "target": {"role": "norm"}},
                {"name": "low", "method": "lora", "params": {"rank": 4}},
                {"name": "wide", "method": "adapter", "params": {"width": 4}},
            ],
        },
    )
    assert {delta.name: len(delta.sites) for delta in compiled.plan.deltas} == {"norms": 13, "low": 12, "wide": 12}
    with torch.no_grad():
        reference = model(**batch).last_hidden_state
        assert torch.equal(compiled(**batch).last_hidden_state, reference)
        disturb(compiled, 0.02)
        out = compiled(**batch).last_hidden_state
        compiled.save(tmp_path)
        assert torch.equal(deltaspec.restore(model, tmp_path)(**batch).last_hidden_state, out)
        compiled.only("norms", "low")
        merged = compiled.merge()
        torch.testing.assert_close(
            merged(**batch).last_hidden_state, compiled(**batch).last_hidden_state, rtol=1e-4, atol=1e-5
        )
        compiled.detach()
        assert torch.equal(compiled(**batch).last_hidden_state, reference)
    assert differences(before, snapshot(model, identity=True)) == []


def test_albert_whose_layers_are_one(albert_dir):
    model = AlbertForMaskedLM.from_pretrained(albert_dir).eval()
    inputs = {"input_ids": torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))}
    query = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    delta = {"name": "low", "method": "lora", "params": {"rank": 4}, "target": query}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})
    assert len(compiled.plan.sites) == 1
    with torch.no_grad():
        reference = model(**inputs).logits
        assert torch.equal(compiled(**inputs).logits, reference)
        disturb(compiled)
        expected = copy.deepcopy(model)
        tensors = dict(compiled.deltas["low"].tensors())
        expected.get_submodule(query).weight += 16 / 4 * tensors[f"{query}.up"] @ tensors[f"{query}.down"]
        torch.testing.assert_close(compiled(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(compiled(**inputs).logits, reference, atol=1e-2)
        torch.testing.assert_close(compiled.merge()(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_efficientnet_whose_convolutions_are_a_subclass(efficientnet_weights: Path):
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(efficientnet_weights, weights_only=True))
    inputs = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    delta = {
        "name": "low",
        "method": "lora",
        "params": {"rank": 4},
        "target": {"all": [{"type": "Conv2d"}, {"path": "_blocks.*._project_conv"}]},
    }
    head = {"name": "head", "method": "full", "target": "_fc"}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta, head]}, example_inputs=inputs)
    assert len(compiled.plan["low"].sites) == 16
    assert {type(compiled.backbone.get_submodule(s.fqn)).__name__ for s in compiled.plan["low"].sites} != {"Conv2d"}
    with torch.no_grad():
        reference = model(inputs)
        assert torch.equal(compiled(inputs), reference)
        disturb(compiled, 0.02)
        out = compiled(inputs)
        assert not torch.allclose(out, reference, atol=1e-3)
        torch.testing.assert_close(compiled.merge()(inputs), out, rtol=1e-4, atol=1e-4)
        assert torch.equal(compiled.detach()(inputs), reference)
    compiled.attach()
    compiled(inputs).sum().backward()
    assert all(p.grad is not None for p in compiled.trainable_parameters())
