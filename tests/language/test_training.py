"""Hints for training in a document: what they may be, and the answers to misspelt ones."""

import pytest

import deltaspec


def spec(train, method="lora"):
    return {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": "*", "train": train}]}


def test_all_hints():
    train = {"lr": 1e-3, "weight_decay": 0, "lr_ratio": 16, "warmup": 0.1, "schedule": "cosine", "seed": 3}
    loaded = deltaspec.load(spec(train))
    assert loaded.deltas[0].train.to_data() == train
    assert deltaspec.load(loaded.to_data()) == loaded != deltaspec.load(spec({**train, "seed": 4}))
    assert deltaspec.load(spec({"warmup": 100})).deltas[0].train.warmup == 100


@pytest.mark.parametrize(
    ("train", "code", "where", "words"),
    [
        ({}, "DS209", "", "empty mapping"),
        ({"learning_rate": 1}, "DS201", ".learning_rate", 'did you mean "lr"?'),
        ({"warmup_steps": 1}, "DS201", ".warmup_steps", 'did you mean "warmup"?'),
        ({"lr_scheduler_type": "linear"}, "DS201", ".lr_scheduler_type", 'did you mean "schedule"?'),
        ({"loraplus_lr_ratio": 2}, "DS201", ".loraplus_lr_ratio", 'did you mean "lr_ratio"?'),
        ({"weigth_decay": 0}, "DS201", ".weigth_decay", 'did you mean "weight_decay"?'),
        ({"momentum": 1}, "DS201", ".momentum", "known keys: lr, weight_decay, lr_ratio, warmup, schedule, seed"),
        ({"lr": 0}, "DS204", ".lr", "greater than 0"),
        ({"lr": "1e-3"}, "DS203", ".lr", "write 1e-3"),
        ({"weight_decay": -1}, "DS204", ".weight_decay", "at least 0"),
        ({"warmup": 1.5}, "DS204", ".warmup", "less than 1"),
        ({"schedule": "cosinus"}, "DS205", ".schedule", 'did you mean "cosine"?'),
        ({"seed": -1}, "DS204", ".seed", "at least 0"),
        ({"lr_ratio": 4}, "DS229", ".lr_ratio", "write lr, too"),
    ],
)
def test_wrong_hints(train, code, where, words):
    [found] = deltaspec.validate(spec(train))
    assert (found.code, found.where) == (code, f"deltas[0].train{where}")
    assert words in f"{found.message} {found.suggestion}"


def test_hints_beside_the_delta_and_for_methods_without_a_second_factor():
    [found] = deltaspec.validate({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "*", "lr": 1}]})
    assert found.suggestion == "hints for training go under train: train: {lr: …}"
    [found] = deltaspec.validate(spec({"lr": 1e-3, "lr_ratio": 4}, method="full"))
    assert found.code == "DS229" and "full has no second factor" in found.message
