"""A mixin for trainers made of transformers' Trainer: checkpoints that hold deltas and no backbone.

>>> class MyTrainer(DeltaTrainerMixin, Trainer): ...
>>> MyTrainer(model=c, args=args, train_dataset=rows).train(resume_from_checkpoint=True)
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from deltaspec.compiler.found import Held, held_in
from deltaspec.compiler.standard_verbs import written_elsewhere
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.checkpoints import acting, holds_deltas, in_shards, read, write
from deltaspec.training.hints import regroup, reschedule

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # so that this package needs no transformers; who uses the mixin has it


class DeltaTrainerMixin(Trainer):
    """Stands before a trainer: `class MyTrainer(DeltaTrainerMixin, SFTTrainer)`.

    The trainer is given a compiled model, its backbone, or a module that holds one. Checkpoints have the deltas as
    `c.save` writes them (so `deltaspec.restore` takes a checkpoint), what trains around the backbone, and the states of
    optimizer, scheduler and random numbers. Resuming, `load_best_model_at_end` and `save_model` use the same form,
    under DDP and FSDP 2, too. Hints of the spec (`train:`) are in the optimizer that the trainer makes. While nothing
    is attached, the trainer does all as it does without this mixin.
    """

    model: Any
    args: Any
    state: Any
    lr_scheduler: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Raise DeltaSpecError where the model holds no deltas (DS565), or would be flattened (DS567)."""
        if self.model_init is None:
            _require_deltas(self.model)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            message = "FSDP 1 flattens parameters, and a checkpoint of deltas cannot tell them apart"
            hint = 'use version 2: fsdp_config={"fsdp_version": 2}'
            raise DeltaSpecError([Diagnostic("DS567", message, "<model>", suggestion=hint)])
        return super().train(*args, **kwargs)

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """Make the model anew, as `model_init` says. Raise DeltaSpecError (DS565) where it holds no deltas."""
        model = super().call_model_init(*args, **kwargs)
        _require_deltas(model)
        return model

    def _held(self, model: Any) -> list[Held]:
        """Return the compiled models whose deltas are trained, and saved."""
        return acting(model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer, with the hints of the deltas (`train:`) in it."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not given and (held := self._held(self.model)):
            regroup(optimizer, held)
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Make the scheduler, with the hints of the deltas (`train:`) in it. Raise DeltaSpecError (DS568)."""
        given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if not given:
            reschedule(scheduler, scheduler.optimizer.param_groups, num_training_steps)
        return scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the deltas, with what the trainer writes beside a model."""
        if (held := self._held(self.model)) and in_shards(self.model):
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            write(self.model, held, folder, first=self.args.should_save)
            if self.args.should_save:
                self._save(str(folder))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)
        pushed = _internal_call and self.args.push_to_hub and self.args.hub_strategy != "end"
        if held and pushed and (self.args.should_save or in_shards(self.model)):
            # What is uploaded meanwhile is this directory, and the trainer copies only files that it knows.
            write(self.model, held, Path(self.args.output_dir), first=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not (held := self._held(self.model)) or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        with written_elsewhere():
            super()._save(str(folder), state_dict={})
        _remove_if_empty(folder / "model.safetensors")
        if not in_shards(self.model):  # else all processes did it together
            write(self.model, held, folder, first=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if held := self._held(model):
            read(model, held, Path(resume_from_checkpoint))
        elif holds_deltas(model, Path(resume_from_checkpoint)):
            message = f"{resume_from_checkpoint} holds deltas, and none is attached to take their values"
            hint = 'attach those that were trained before the trainer is made: c.only("french")'
            raise DeltaSpecError([Diagnostic("DS569", message, "<model>", suggestion=hint)])
        elif model is self.model:
            super()._load_from_checkpoint(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if held := self._held(self.model):
            read(self.model, held, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not (self.is_fsdp_enabled and self._held(self.model)):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # As the trainer does, without the whole model beside them.
        import torch

        plugin, accelerate = self.accelerator.state.fsdp_plugin, import_module("accelerate.utils")
        accelerate.save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))


def _require_deltas(model: Any) -> None:
    if not held_in(model):
        message = f"the trainer was given a {type(model).__name__} that holds no deltas"
        hint = "give it deltaspec.compile(model, spec), or the backbone of that; or leave DeltaTrainerMixin out"
        raise DeltaSpecError([Diagnostic("DS565", message, "<model>", suggestion=hint)])


def _remove_if_empty(path: Path) -> None:
    """Remove the file that a trainer writes for a model that cannot save itself: nothing is in it."""
    if path.exists():
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            empty = not list(file.keys())
        if empty:
            path.unlink()
