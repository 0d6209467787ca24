"""DeltaTrainerMixin beside transformers' Trainer: the same losses, checkpoints of deltas alone, resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, ids
from torch import nn
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from two_deltas import logits, spec

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training import DeltaTrainerMixin


class DeltaTrainer(DeltaTrainerMixin, Trainer):
    pass


def rows(architecture):
    if architecture == "bert":
        return [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ids(8, 6))]
    return [{"input_ids": row, "labels": row} for row in ids(8, 6)]


def arguments(folder, kind=TrainingArguments, **options):
    given = {
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_steps": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    return kind(str(folder), **given)


def build(architecture="gpt2", **given):
    return deltaspec.compile(ARCHITECTURES[architecture].model(), spec(architecture, dropout=0.1), **given)


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def files(folder):
    return {path.name.partition(".")[2] if path.name.count(".") > 1 else path.name for path in Path(folder).iterdir()}


STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


@pytest.mark.parametrize(
    ("architecture", "of"), [("gpt2", lambda c: c), ("bert", lambda c: c.backbone)], ids=["tied", "backbone"]
)
def test_checkpoints_hold_deltas_alone_and_resume_to_the_same_losses(tmp_path, architecture, of):
    settings = arguments(tmp_path / "plain", save_strategy="no")
    plain = Trainer(of(build(architecture)), settings, train_dataset=rows(architecture))
    plain.train()
    whole = build(architecture)
    trainer = DeltaTrainer(of(whole), arguments(tmp_path), train_dataset=rows(architecture))
    trainer.train()
    assert losses(trainer) == losses(plain)
    checkpoint = tmp_path / "checkpoint-2"
    assert {"model.safetensors", "config.json", "pytorch_model.bin"}.isdisjoint(files(checkpoint))
    assert STATES | {"manifest.json", "README.md"} <= files(checkpoint)
    held = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert held < 1.3 * sum(p.nbytes for p in whole.trainable_parameters()) + 8192
    again = build(architecture)
    resumed = DeltaTrainer(of(again), arguments(tmp_path), train_dataset=rows(architecture))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(trainer)
    for delta in whole.deltas:
        assert all(map(torch.equal, whole.deltas[delta].parameters(), again.deltas[delta].parameters()))
    back = deltaspec.restore(ARCHITECTURES[architecture].model(), tmp_path / "checkpoint-3")
    assert torch.equal(logits(back, architecture), logits(whole.eval(), architecture))


def test_the_best_model_is_loaded_and_old_checkpoints_go(tmp_path):
    compiled = build()
    settings = arguments(
        tmp_path, max_steps=6, learning_rate=5.0, save_steps=1, eval_strategy="steps", eval_steps=1, save_total_limit=1,
        load_best_model_at_end=True, greater_is_better=True,  # of the loss: the best are not the last
    )  # fmt: skip
    data, stop = rows("gpt2"), EarlyStoppingCallback(2)
    trainer = DeltaTrainer(compiled.backbone, settings, train_dataset=data, eval_dataset=data[:2], callbacks=[stop])
    trainer.train()
    known = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = trainer.state.best_model_checkpoint
    assert len(known) < 6 and known.index(max(known)) == len(known) - 3
    assert trainer.evaluate()["eval_loss"] == max(known)
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert Path(best).name in left and len(left) <= 2
    assert torch.equal(logits(deltaspec.restore(ARCHITECTURES["gpt2"].model(), best), "gpt2"), logits(compiled, "gpt2"))


def test_a_seq2seq_trainer_generates_and_resumes(tmp_path):
    class Mine(DeltaTrainerMixin, Seq2SeqTrainer):
        pass

    data = rows("t5")
    trainers = []
    for name in (None, "checkpoint-2"):
        settings = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=6)
        trainers.append(Mine(build("t5"), settings, train_dataset=data, eval_dataset=data[:2]))
        trainers[-1].train(resume_from_checkpoint=name and str(tmp_path / name))
    first, second = (trainer.predict(data[:2]).predictions for trainer in trainers)
    assert losses(trainers[0]) == losses(trainers[1]) and (first == second).all()


class Classifier(nn.Module):
    """A head of the user's own on a compiled backbone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = build("bert").backbone
        self.head, self.frozen = nn.Linear(3, 4), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.reference = build("bert").detach()  # which nothing trains

    def forward(self, input_ids, labels):
        self.seen += 1
        scores = self.head(self.frozen(self.encoder(input_ids=input_ids).logits))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def test_what_trains_around_a_backbone_is_kept(tmp_path):
    first = DeltaTrainer(Classifier(), arguments(tmp_path), train_dataset=rows("bert"))
    first.train()
    assert {"model.safetensors"}.isdisjoint(files(tmp_path / "checkpoint-2"))
    again = DeltaTrainer(Classifier(), arguments(tmp_path), train_dataset=rows("bert"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(first)
    assert torch.equal(again.model.head.weight, first.model.head.weight) and again.model.seen == first.model.seen
    assert (tmp_path / "checkpoint-2" / "outside.safetensors").stat().st_size < 500
    other = Classifier()
    other.head = nn.Linear(3, 5)
    start = [p.clone() for p in other.parameters()]
    trainer = DeltaTrainer(other, arguments(tmp_path), train_dataset=rows("bert"))
    with pytest.raises(DeltaSpecError) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [finding.code for finding in error.value.diagnostics] == ["DS566"] * 2
    assert all(map(torch.equal, start, other.parameters()))


def test_a_model_without_deltas_is_refused_before_it_trains(tmp_path):
    model = ARCHITECTURES["gpt2"].model()
    with pytest.raises(DeltaSpecError, match="DS565.*GPT2LMHeadModel"):
        DeltaTrainer(model, arguments(tmp_path), train_dataset=rows("gpt2")).train()
    with pytest.raises(DeltaSpecError, match="DS565"):
        DeltaTrainer(model_init=lambda: model, args=arguments(tmp_path), train_dataset=rows("gpt2"))


def test_models_made_anew_train_each_time(tmp_path):
    trainer = DeltaTrainer(
        model_init=lambda: build(), args=arguments(tmp_path, max_steps=1), train_dataset=rows("gpt2")
    )
    found = [trainer.train().training_loss for _ in range(2)]
    assert found[0] == found[1]
    assert json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())["attached"] == ["low", "wide"]


def test_a_checkpoint_of_deltas_is_not_resumed_while_none_is_attached(tmp_path):
    DeltaTrainer(build(), arguments(tmp_path, max_steps=1), train_dataset=rows("gpt2")).train()
    fresh = build()
    fresh.detach()
    with pytest.raises(DeltaSpecError, match="DS569"):
        trainer = DeltaTrainer(fresh, arguments(tmp_path, max_steps=2), train_dataset=rows("gpt2"))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_is_trained_with_nothing_attached_is_saved_whole(tmp_path):
    compiled = build(train_backbone=True)
    compiled.detach()
    trainer = DeltaTrainer(compiled.backbone, arguments(tmp_path, max_steps=1), train_dataset=rows("gpt2"))
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "config.json").exists()
    saved = type(ARCHITECTURES["gpt2"].model()).from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(logits(saved.eval(), "gpt2"), logits(compiled.eval(), "gpt2"))


def test_a_backbone_leads_to_its_deltas_when_the_compiled_model_is_gone(tmp_path):
    trainer = DeltaTrainer(build().backbone, arguments(tmp_path, max_steps=1), train_dataset=rows("gpt2"))
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "manifest.json").exists()


def test_hints_of_the_spec_are_in_the_optimizer(tmp_path):
    given = spec("gpt2")
    given["deltas"][0] |= {"train": {"lr": 0.5, "warmup": 2, "schedule": "constant"}}
    compiled = deltaspec.compile(ARCHITECTURES["gpt2"].model(), given)
    settings = arguments(tmp_path, weight_decay=0.25, max_grad_norm=0)
    trainer = DeltaTrainer(compiled, settings, train_dataset=rows("gpt2"))
    trainer.train()
    low = {id(p) for p in compiled.deltas["low"].parameters()}
    groups = [(group, {id(p) for p in group["params"]}) for group in trainer.optimizer.param_groups]
    assert all(own for _, own in groups)
    hinted = [group for group, own in groups if own and own <= low]
    others = [group for group, own in groups if own and not own & low]
    assert sum(len(own & low) for _, own in groups) == len(low)
    assert {(group["initial_lr"], group["weight_decay"]) for group in hinted} == {(0.5, 0.25)}
    assert {group["initial_lr"] for group in others} == {0.05} and others
    assert {group["lr"] for group in hinted} == {0.5} and {group["lr"] for group in others} == {0.0}
    assert compiled.check_optimizer(trainer.optimizer.optimizer)
    again = deltaspec.compile(ARCHITECTURES["gpt2"].model(), given)
    resumed = DeltaTrainer(again, settings, train_dataset=rows("gpt2"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    settings = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    with pytest.raises(DeltaSpecError, match="DS568.*low.*ReduceLROnPlateau"):
        DeltaTrainer(again, settings, train_dataset=rows("gpt2"), eval_dataset=rows("gpt2")).train()
