"""Beside transformers: the Trainer, gradient checkpointing, pipelines, and the hooks of accelerate."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import ARCHITECTURES, ids
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from two_deltas import build, disturb, logits, spec

import deltaspec
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import seed
from deltaspec.diagnostics.findings import DeltaSpecError


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
    for saved in ("deltas", "end", "checkpoint-2"):
        back = deltaspec.restore(model, tmp_path / saved)
        assert torch.equal(logits(back, "bert"), logits(compiled, "bert"))
    compiled.detach()
    assert torch.equal(logits(compiled, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("whole", [True, False], ids=["compiled", "backbone"])
def test_checkpoints_of_tied_models_hold_the_deltas_and_resume(tmp_path, whole):
    model = ARCHITECTURES["gpt2"].model()
    assert model.lm_head.weight is model.transformer.wte.weight
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 6)]

    def trained(**options):
        compiled = deltaspec.compile(model, spec("gpt2"))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.05, save_steps=1, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=compiled if whole else compiled.backbone, args=arguments, train_dataset=rows)
        trainer.train(**options)
        return compiled.eval()

    first = trained()
    assert not (logits(first, "gpt2") == logits(model, "gpt2")).all()
    assert torch.equal(logits(deltaspec.restore(model, tmp_path / "checkpoint-2"), "gpt2"), logits(first, "gpt2"))
    resumed = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.allclose(logits(resumed, "gpt2"), logits(first, "gpt2"), atol=1e-6)


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
