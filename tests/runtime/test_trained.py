"""Which modules train in other ways while deltas are attached, and that a model is as it was without them."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from models import ARCHITECTURES
from training import assert_same_gradients, gradients, serve_small, spread

import deltaspec

LORA = {"method": "lora", "params": {"rank": 2, "dropout": 0.5}}


def spec(name: str = "a", path: object = "**.mlp.*", **more: object) -> dict[str, object]:
    return {"deltaspec": 1, "deltas": [{"name": name, **LORA, "target": {"path": path}}], **more}


def llama(*specs: dict[str, object], passes: object = True) -> deltaspec.CompiledModel:
    chosen = ARCHITECTURES["llama"]
    compiled = deltaspec.compile(chosen.model(), *(specs or (spec(),)), passes=passes).train()
    spread(compiled)
    return compiled


PATHS = ["**.gate_proj", "**.up_proj", "**.down_proj"]
INPUTS = ARCHITECTURES["llama"].inputs()


def changed(compiled: deltaspec.CompiledModel) -> set[str]:
    return {n.rpartition(".")[2] for n, m in compiled.backbone.named_modules() if "forward" in m.__dict__}


def test_activations_are_changed_while_a_delta_is_attached_beside_them():
    compiled = llama(spec(path=PATHS))
    assert changed(compiled) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    compiled.detach()
    assert changed(compiled) == set()
    compiled.attach()
    assert "act_fn" in changed(compiled)
    assert "act_fn" not in changed(llama(spec(path="**.q_proj")))


@pytest.mark.parametrize("passes", [False, ["recompute"], ["feed_forward"]])
def test_what_is_left_out_is_not_changed(passes):
    assert "act_fn" not in changed(llama(spec(path=PATHS), passes=passes))
    assert "act_fn" not in changed(llama(spec(path=PATHS, passes=passes)))


def test_all_deltas_of_a_site_must_let_a_pass_work_on_it():
    both = llama(spec("a", PATHS), spec("b", PATHS, passes=False))
    assert "act_fn" not in changed(both)
    both.detach("b")
    assert "act_fn" in changed(both)


def test_added_deltas_follow_what_was_asked_for_the_model(monkeypatch):
    serve_small(monkeypatch)
    compiled = llama(spec(path="**.q_proj"), passes=False)
    compiled.add(spec("b", PATHS))
    assert "act_fn" not in changed(compiled)


def test_copies_and_pickles_train_alike(monkeypatch):
    serve_small(monkeypatch)
    compiled = llama(spec(path=PATHS))
    expected = gradients(compiled, INPUTS)
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert_same_gradients(gradients(twin, INPUTS), expected)


def test_threads_with_views_of_their_own_train_alike(monkeypatch):
    serve_small(monkeypatch)
    compiled = llama(spec(path=PATHS)).eval()
    expected = gradients(compiled, INPUTS)[""]
    views, found = [compiled.view() for _ in range(3)], []

    def run(view: deltaspec.CompiledModel) -> None:
        for _ in range(3):
            parameters = view.trainable_parameters()
            output = view(**INPUTS).logits
            weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
            loss = (output * weights).sum()
            found.append((loss.detach(), torch.autograd.grad(loss, list(parameters))[0]))

    threads = [threading.Thread(target=run, args=(view,)) for view in views]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    for loss, gradient in found:
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, found[0][1])


def test_a_frozen_backbones_weights_may_be_replaced_for_one_call(monkeypatch):
    serve_small(monkeypatch)
    compiled = llama(spec(path=PATHS)).eval()
    name = next(n for n, _ in compiled.backbone.named_parameters() if n.endswith("mlp.up_proj.weight"))
    weight = compiled.backbone.get_parameter(name).detach() * 2
    weight.requires_grad_()
    output = torch.func.functional_call(compiled.backbone, {name: weight}, (), INPUTS).logits
    assert torch.autograd.grad(output.sum(), weight)[0].abs().sum() > 0
