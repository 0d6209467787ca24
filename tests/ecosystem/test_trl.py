"""TRL's trainers: the losses of PEFT's adapters with the same values, checkpoints of deltas, resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from trained import SPEC, arguments, llama, losses, texts, tokenizer
from transformers import AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training import DeltaTrainerMixin

OPTIONS = {"bf16": False, "gradient_checkpointing": False}
PROMPTS = Dataset.from_dict({"prompt": texts(1)})
PAIRS = Dataset.from_dict({"prompt": texts(1), "chosen": texts(2), "rejected": texts(3)})


def compiled_and_peft(folder, kind=llama):
    """Return a compiled model, and the same one with the same adapter in PEFT."""
    compiled = deltaspec.compile(kind(), SPEC)
    compiled.save_as("peft", folder)
    return compiled, peft.PeftModel.from_pretrained(kind(), folder, is_trainable=True)


def mixed(kind):
    return type(f"Delta{kind.__name__}", (DeltaTrainerMixin, kind), {})


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("of", [lambda c: c, lambda c: c.backbone], ids=["compiled", "backbone"])
def test_sft_trains_as_peft_and_resumes(tmp_path, packing, of):
    data = Dataset.from_dict({"text": texts(4, 24)})

    def trained(model, kind, resume=None, folder="out"):
        settings = SFTConfig(max_length=16, packing=packing, **OPTIONS, **arguments(tmp_path / folder))
        trainer = kind(model=model, args=settings, train_dataset=data, processing_class=tokenizer())
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer)

    compiled, theirs = compiled_and_peft(tmp_path / "adapter")
    found = trained(of(compiled), mixed(SFTTrainer))
    assert found == pytest.approx(trained(theirs, SFTTrainer, folder="peft"), abs=1e-5)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    again = deltaspec.compile(llama(), SPEC)
    assert trained(of(again), mixed(SFTTrainer), str(checkpoint)) == found
    back = deltaspec.restore(llama(), tmp_path / "out" / "checkpoint-3").deltas["d"]
    assert all(map(torch.equal, back.parameters(), compiled.deltas["d"].parameters()))


@pytest.mark.parametrize("reference", ["original", "view"])
def test_dpo_has_the_losses_of_peft_without_a_second_model(tmp_path, reference):
    def trained(model, reference, kind=DPOTrainer):
        settings = DPOConfig(**OPTIONS, **arguments(tmp_path / "out"))
        given = {"ref_model": reference, "args": settings, "train_dataset": PAIRS, "processing_class": tokenizer()}
        trainer = kind(model=model, **given)
        trainer.train()
        return losses(trainer)

    model = llama()
    compiled = deltaspec.compile(model, SPEC)
    ours = trained(compiled, model if reference == "original" else compiled.view().detach(), mixed(DPOTrainer))
    fresh = peft.PeftModel.from_pretrained(llama(), adapter(tmp_path), is_trainable=True)
    assert ours == pytest.approx(trained(fresh, None), abs=1e-5) and len(set(ours)) == 3


def adapter(folder: Path) -> str:
    deltaspec.compile(llama(), SPEC).save_as("peft", folder / "adapter")
    return str(folder / "adapter")


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_generates_and_learns(tmp_path, beta):
    llama().save_pretrained(tmp_path / "base")  # with a beta, TRL loads a reference from where the model is from
    model = type(llama()).from_pretrained(tmp_path / "base")
    compiled = deltaspec.compile(model, SPEC)
    start = [p.detach().clone() for p in compiled.trainable_parameters()]
    settings = GRPOConfig(num_generations=4, max_completion_length=5, beta=beta, **OPTIONS, **arguments(tmp_path))

    def reward(completions, **_):
        return [float(len(set(text.split()))) for text in completions]

    trainer = mixed(GRPOTrainer)(
        model=compiled, reward_funcs=reward, args=settings, train_dataset=PROMPTS, processing_class=tokenizer()
    )
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(start, compiled.trainable_parameters(), strict=True))
    assert (tmp_path / "checkpoint-3" / "manifest.json").exists()


def classifier():
    return AutoModelForSequenceClassification.from_config(llama(num_labels=1).config)


def test_reward_and_kto_train(tmp_path):
    spec = {"deltaspec": 1, "deltas": [*SPEC["deltas"], {"name": "h", "method": "full", "target": {"path": "score"}}]}
    settings = RewardConfig(**OPTIONS, **arguments(tmp_path / "reward"))
    data = PAIRS.remove_columns("prompt")
    trainer = mixed(RewardTrainer)(
        model=deltaspec.compile(classifier(), spec), args=settings, train_dataset=data, processing_class=tokenizer()
    )
    trainer.train()
    assert len(set(losses(trainer))) == 3 and (tmp_path / "reward" / "checkpoint-2" / "manifest.json").exists()
    model = llama()
    data = Dataset.from_dict({"prompt": texts(1), "completion": texts(2), "label": [True, False] * 4})
    trainer = mixed(KTOTrainer)(
        model=deltaspec.compile(model, SPEC), ref_model=model, args=KTOConfig(**OPTIONS, **arguments(tmp_path / "kto")),
        train_dataset=data, processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert len(losses(trainer)) == 3


@pytest.mark.parametrize("of", [lambda c: c, lambda c: c.backbone], ids=["compiled", "backbone"])
def test_a_delta_that_a_fused_head_would_go_around_is_refused(tmp_path, of):
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"type": "Linear"}}]}
    settings = SFTConfig(max_length=16, **OPTIONS, **arguments(tmp_path))
    data = Dataset.from_dict({"text": texts(4)})
    trainer = SFTTrainer(
        model=of(deltaspec.compile(llama(), spec)), args=settings, train_dataset=data, processing_class=tokenizer()
    )
    with pytest.raises(DeltaSpecError, match="DS437.*lm_head"):
        trainer.train()
