"""Lightning: fit, resume from a checkpoint, averaged weights, and processes that it spawns."""

from __future__ import annotations

import os

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, WeightAveraging
from lit_module import Module
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from trained import IDS


def fit(folder, module, resume=None, **options):
    settings = dict(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=2, default_root_dir=folder)
    trainer = lightning.Trainer(**{**settings, **options})
    trainer.fit(module, DataLoader(IDS, batch_size=4), ckpt_path=resume)
    return module


@pytest.mark.parametrize("whole", [True, False], ids=["compiled", "backbone"])
def test_fit_and_resume(tmp_path, whole):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    first = fit(tmp_path, Module(whole), callbacks=[keep, ModelSummary(max_depth=-1)])
    path = tmp_path / "epoch=0.ckpt"
    again = fit(tmp_path, Module(whole), str(path), enable_checkpointing=False)
    assert len(first.found) == 4 and again.found == first.found[2:]
    loaded = Module.load_from_checkpoint(tmp_path / "epoch=1.ckpt", whole=whole)  # strict: each key has a place
    assert all(map(torch.equal, loaded.parameters(), first.parameters()))


def test_averaged_weights(tmp_path):
    trained = fit(
        tmp_path,
        Module(),
        enable_checkpointing=False,
        callbacks=[WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5))],
    )
    plain = fit(tmp_path, Module(), enable_checkpointing=False)
    assert trained.found == plain.found
    same = map(torch.equal, trained.model.trainable_parameters(), plain.model.trainable_parameters())
    assert not all(same)


def test_processes_that_are_spawned_train_one_model(tmp_path):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    options = dict(max_epochs=1, enable_checkpointing=False)
    module = fit(tmp_path, Module(), strategy="ddp_spawn", devices=2, **options)
    alone, found = Module(), list(module.model.trainable_parameters())
    optimizer = alone.configure_optimizers()
    alone.training_step(IDS, 0).backward()
    optimizer.step()
    for one, other in zip(found, alone.model.trainable_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
