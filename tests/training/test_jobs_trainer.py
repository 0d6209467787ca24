"""Trainer for many jobs: each learns what it learns alone; logs, evaluations, checkpoints and resuming."""

import json

import pytest
import torch
from tiny_models import BASIC
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import deltaspec
from deltaspec.training import JobsTrainer

NAMES = ("lora[rank=2]", "lora[rank=3]")


def compiled():
    torch.manual_seed(0)
    config = BertConfig(**BASIC, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    lora = {"name": "lora", "method": "lora", "target": {"role": "attn.q"}, "matrix": {"rank": [2, 3]}}
    head = {"name": "head", "method": "full", "target": "classifier", "matrix": "lora", "train": {"lr": 1e-2}}
    spec = {"deltaspec": 1, "deltas": [{**lora, "train": {"lr": 5e-3, "warmup": 2}}, head]}
    return deltaspec.compile(BertForSequenceClassification(config), spec)


JOBS = {name: (name, name.replace("lora", "head")) for name in NAMES}


def rows(name, number=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, (number, 6), generator=generator)
    return [{"job": name, "input_ids": each, "labels": int(each[0] > 20)} for each in ids]


def mixed_rows():
    """Rows of both jobs in turns, so that each batch has as many of each."""
    return [row for both in zip(rows(NAMES[0]), rows(NAMES[1], seed=1), strict=True) for row in both]


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=6, per_device_eval_batch_size=4, num_train_epochs=2,
        learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.3, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, seed=3, **options,
    )  # fmt: skip


class InOrder(JobsTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_jobs_learn_what_they_learn_alone(tmp_path):
    c = compiled()
    trainer = InOrder(model=c, args=arguments(tmp_path), jobs=JOBS, train_dataset=mixed_rows())
    trainer.train()
    for number, name in enumerate(NAMES):
        alone = compiled()
        alone.only(*JOBS[name])

        class Plain(Trainer):
            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        data = [{key: value for key, value in row.items() if key != "job"} for row in rows(name, seed=number)]
        groups = alone.parameter_groups(*JOBS[name])
        optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
        factors = [lambda step: min(1.0, step / 2), lambda step: 1 - step / 8]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        options = arguments(tmp_path / "alone")
        options.per_device_train_batch_size = 3
        plain = Plain(model=alone, args=options, train_dataset=data, optimizers=(optimizer, schedule))
        plain.train()
        for delta in JOBS[name]:
            for key, tensor in alone.deltas[delta].tensors():
                assert torch.allclose(c.deltas[delta].tensor(key), tensor, atol=2e-6), (delta, key)
        theirs = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
        ours = [entry[f"loss_{name}"] for entry in trainer.state.log_history if "loss" in entry]
        assert ours == pytest.approx(theirs, abs=2e-4) and len(ours) == 8


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 4


def test_checkpoints_resume_to_the_same_numbers(tmp_path):
    def trainer(c, **options):
        given = arguments(tmp_path, eval_strategy="steps", eval_steps=4, **options)
        given.save_strategy, given.save_steps = "steps", 4
        kinds = {"compute_metrics": accuracy, "train_dataset": mixed_rows(), "eval_dataset": mixed_rows()}
        return JobsTrainer(model=c, args=given, jobs=JOBS, **kinds)

    whole = compiled()
    first = trainer(whole)
    first.train()
    evaluated = next(entry for entry in first.state.log_history if f"eval_{NAMES[0]}_accuracy" in entry)
    assert 0 <= evaluated[f"eval_{NAMES[0]}_accuracy"] <= 1
    metrics = first.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{name}_loss"] for name in NAMES) / 2)
    saved = tmp_path / "checkpoint-4"
    assert "model.safetensors" not in {path.name for path in saved.iterdir()}
    names = {entry["name"] for entry in json.loads((saved / "manifest.json").read_text())["deltas"]}
    assert names == {*whole.deltas}
    again = compiled()
    trainer(again).train(resume_from_checkpoint=str(saved))
    for name, delta in whole.deltas.items():
        for key, tensor in delta.tensors():
            assert torch.equal(again.deltas[name].tensor(key), tensor)


def test_a_job_that_diverges_ends_alone(tmp_path):
    def loss(outputs, batch):
        value = torch.nn.functional.cross_entropy(outputs.logits, batch["labels"])
        return value * (float("nan") if len(calls) > 2 else 1)

    calls = []

    class Counting(InOrder):
        def training_step(self, *args, **kwargs):
            calls.append(1)
            return super().training_step(*args, **kwargs)

    c, expected = compiled(), compiled()
    trainer = Counting(
        model=c, args=arguments(tmp_path), jobs=JOBS, train_dataset=mixed_rows(), job_loss={NAMES[0]: loss}
    )
    trainer.train()
    assert trainer.diverged == {NAMES[0]: 3}
    InOrder(model=expected, args=arguments(tmp_path), jobs=JOBS, train_dataset=mixed_rows()).train()
    for delta in JOBS[NAMES[1]]:
        for key, tensor in expected.deltas[delta].tensors():
            assert torch.allclose(c.deltas[delta].tensor(key), tensor, atol=1e-6)


def test_what_is_no_job(tmp_path):
    c = compiled()
    wrong = [{**row, "job": "lora[rank=9]"} for row in rows("x")]
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS386.*of the job \"lora\[rank=9\]\""):
        JobsTrainer(model=c, args=arguments(tmp_path), jobs=JOBS, train_dataset=wrong).train()
    with pytest.raises(TypeError, match=r"model is what deltaspec\.compile returns"):
        JobsTrainer(model=c.backbone, args=arguments(tmp_path), train_dataset=wrong)
    with pytest.raises(deltaspec.DeltaSpecError, match="DS434"):
        JobsTrainer(model=c, args=arguments(tmp_path), jobs={"a": "nope"}, train_dataset=wrong)


def evaluated(folder, callbacks=(), *, labels=None, **options):
    """Train with an evaluation a step, on rows of which the second job's have other labels than it learns."""
    c = compiled()
    given = arguments(folder, eval_strategy="steps", eval_steps=1, **options)
    given.learning_rate, given.max_grad_norm = 0.05, 0.0
    right, wrong = rows(NAMES[0]), rows(NAMES[1], seed=1)
    data = [*right, *({**row, "labels": 1 - row["labels"]} for row in wrong)]
    kinds = {"train_dataset": mixed_rows(), "eval_dataset": data, "callbacks": list(callbacks)}
    return c, InOrder(model=c, args=given, jobs=JOBS, compute_metrics=accuracy, **kinds, **(labels or {}))


def test_a_job_that_gets_no_better_ends_with_its_best_and_the_others_go_on(tmp_path):
    c, trainer = evaluated(tmp_path, labels={"patience": {NAMES[1]: 2}})
    counted = []

    class Rows(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **_):
            counted.append((metrics[f"eval_{NAMES[1]}_loss"], metrics["eval_loss"]))
            kept.append({d: [p.detach().clone() for p in c.deltas[d].parameters()] for d in JOBS[NAMES[1]]})

    kept = []
    trainer.add_callback(Rows())
    trainer.train()
    losses = [loss for loss, _ in counted]
    best = losses.index(min(losses[: trainer.stopped[NAMES[1]]]))
    assert trainer.stopped == {NAMES[1]: best + 3} and best + 3 < 8 == len(losses)  # 8 evaluations, each told of once
    assert all(
        torch.equal(p, q) for d in JOBS[NAMES[1]] for p, q in zip(c.deltas[d].parameters(), kept[best][d], strict=True)
    )
    logs = [entry for entry in trainer.state.log_history if f"loss_{NAMES[0]}" in entry]
    assert [f"loss_{NAMES[1]}" in entry for entry in logs] == [step < best + 3 for step in range(8)]
    other, plain = evaluated(tmp_path)
    plain.train()
    for delta in JOBS[NAMES[0]]:
        for key, tensor in other.deltas[delta].tensors():
            assert torch.allclose(c.deltas[delta].tensor(key), tensor, atol=1e-5)


def test_training_ends_with_its_last_job_and_early_stopping_of_transformers_sees_the_mean(tmp_path):
    _, trainer = evaluated(tmp_path, labels={"patience": 1, "best": "accuracy"})
    trainer.train()
    assert trainer.stopped.keys() == set(NAMES) and trainer.state.global_step == max(trainer.stopped.values()) < 8
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    _, trainer = evaluated(tmp_path, [stopping], metric_for_best_model="eval_loss", greater_is_better=False)
    trainer.train()
    assert trainer.state.global_step == 2 and not trainer.stopped  # no loss falls by 100


def test_patience_that_counts_nothing_is_refused(tmp_path):
    given = {"model": compiled(), "args": arguments(tmp_path), "jobs": JOBS, "train_dataset": mixed_rows()}
    with pytest.raises(ValueError, match=r"give eval_dataset=…"):
        JobsTrainer(**given, patience=2).train()
    with pytest.raises(ValueError, match="is 1 or more, not 0"):
        JobsTrainer(**given, patience=0)
    for wrong in ({"patience": {"lora[rank=9]": 2}}, {"job_loss": {"lora[rank=9]": min}}):
        with pytest.raises(deltaspec.DeltaSpecError, match=r"DS382.*lora\[rank=9\].*no such job"):
            JobsTrainer(**given, **wrong)


def test_jobs_that_stand_on_one_frozen_head(tmp_path):
    c = compiled()
    head = "head[rank=2]"
    for name in ("head[rank=2]", "head[rank=3]"):
        c.deltas[name].requires_grad_(False)
    before = [parameter.clone() for parameter in c.deltas[head].parameters()]
    trainer = InOrder(model=c, args=arguments(tmp_path), jobs={n: (n, head) for n in NAMES}, train_dataset=mixed_rows())
    trainer.train()
    assert all(map(torch.equal, before, c.deltas[head].parameters()))
    assert {group["delta"] for group in trainer.optimizer.param_groups} == {*NAMES}
    with pytest.raises(deltaspec.DeltaSpecError, match="DS382.*is trained by the jobs 'a' and 'b'"):
        JobsTrainer(model=c, args=arguments(tmp_path), jobs={"a": NAMES, "b": NAMES[0]}, train_dataset=mixed_rows())
    with pytest.raises(deltaspec.DeltaSpecError, match="DS381"):
        JobsTrainer(model=c, args=arguments(tmp_path), jobs={"a": head}, train_dataset=mixed_rows())
