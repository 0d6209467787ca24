"""What each of two processes does that trains with accelerate or Trainer: under DDP, and in shards of FSDP 2.

accelerate makes shards on accelerators alone; processes on CPUs are let believe that they are that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jobs_worker
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, state
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from trained import IDS, LORA, ROWS, arguments, llama, losses
from transformers import Trainer, TrainingArguments

import deltaspec
from deltaspec.training import DeltaTrainerMixin

WORLD = 2
SPEC = {"deltaspec": 1, "deltas": [LORA, {**LORA, "name": "idle", "attached": False}]}
ACCELERATE = {
    "ddp": None,
    "root": {},
    "layers": {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]},
    "over meta": {"cpu_ram_efficient_loading": True, "state_dict_type": "FULL_STATE_DICT"},
}
"""Options of FSDP, by way; None: no shards."""
MIXED = ["d", None, "idle", {"d": 0.5}]


class DeltaTrainer(DeltaTrainerMixin, Trainer):
    pass


def build(tied: bool = False) -> Any:
    """Return a new compiled model with two deltas, one of which is idle."""
    return deltaspec.compile(llama(tie_word_embeddings=tied), SPEC)


def steps(call: Any, optimizer: Any, part: slice, backward: Any, count: int = 2, **given: Any) -> list[float]:
    """Take steps, and return their losses."""
    found = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = call(input_ids=IDS[part], labels=IDS[part], **given).loss
        backward(loss)
        optimizer.step()
        found.append(loss.item())
    return found


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """Return an optimizer of all that requires gradients."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def tensors(compiled: Any) -> list[torch.Tensor]:
    """Return the tensors of all deltas, whole."""
    found = (tensor.detach() for delta in compiled.deltas.values() for _, tensor in delta.tensors())
    return [getattr(tensor, "full_tensor", tensor.clone)() for tensor in found]


def accelerated(way: str, rank: int, folder: Path) -> dict[str, Any]:
    """Train with accelerate, save its state and load it, save the deltas by `c.save` and by torch's checkpoints."""
    compiled = build(tied=way == "over meta")
    target = compiled.backbone if way == "layers" else compiled
    # torch reads the state of an optimizer only where each of its parameters has one.
    compiled.deltas["idle"].requires_grad_(way == "ddp")
    accelerator = _accelerator(ACCELERATE[way])
    model, optimizer = accelerator.prepare(target, optimizer_of(target))
    part = slice(4 * rank, 4 * rank + 4)
    found: dict[str, Any] = {"losses": steps(model, optimizer, part, accelerator.backward)}
    found["kind"] = str(accelerator.distributed_type), type(next(iter(model.parameters()))).__name__
    accelerator.save_state(str(folder / way / "state"))
    compiled.save(folder / way / "deltas")
    found["tensors"] = tensors(compiled)
    dcp.save({"model": get_model_state_dict(target)}, checkpoint_id=folder / way / "dcp")
    before = steps(model, optimizer, part, accelerator.backward)
    accelerator.load_state(str(folder / way / "state"))
    found["again"] = before == steps(model, optimizer, part, accelerator.backward)
    compiled.load(folder / way / "deltas")  # what one process would have written: by name, whole
    found["loaded"] = tensors(compiled)
    with torch.no_grad():
        for delta in compiled.deltas.values():
            for parameter in delta.parameters():
                parameter.zero_()
    held = {"model": get_model_state_dict(target)}
    dcp.load(held, checkpoint_id=folder / way / "dcp")
    set_model_state_dict(target, held["model"])
    found["read"] = tensors(compiled)
    found["unwrapped"] = accelerator.unwrap_model(model) is target
    if way == "ddp":
        rows = {"deltas": MIXED}
        found["mixed"] = steps(model, optimizer, part, accelerator.backward, count=1, **rows)
        found["mixed tensors"] = tensors(compiled)
    return found


_made = state.AcceleratorState.__init__


def _accelerator(options: dict[str, Any] | None) -> Accelerator:
    plainly()
    if options is None:
        return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    return Accelerator(cpu=True, fsdp_plugin=believed(options))


def plainly() -> None:
    """Let accelerate start anew, and see that these are CPUs."""
    state.AcceleratorState._reset_state()
    state.AcceleratorState.__init__ = _made  # type: ignore[method-assign]
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        os.environ.pop(name, None)


def believed(options: dict[str, Any]) -> FullyShardedDataParallelPlugin:
    """Return a plugin that accelerate takes on CPUs, too."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, **options)

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        _made(self, *args, **kwargs)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    state.AcceleratorState.__init__ = made  # type: ignore[method-assign]
    return plugin


def trained(way: str, folder: Path) -> dict[str, Any]:
    """Train with Trainer and the mixin, resume from a checkpoint of the middle, load the best."""
    options: dict[str, Any] = {}
    plainly()
    if way != "ddp":
        believed(ACCELERATE[way] or {})
        options = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}
    given = arguments(
        folder / f"trainer {way}", max_steps=4, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, greater_is_better=True, **options,
    )  # fmt: skip
    found = []
    for resume in (None, str(folder / f"trainer {way}" / "checkpoint-2")):
        compiled = build()
        compiled.deltas["idle"].requires_grad_(way == "ddp")
        trainer = DeltaTrainer(compiled, TrainingArguments(**given), train_dataset=ROWS * 2, eval_dataset=ROWS[:2])
        trainer.train(resume_from_checkpoint=resume)
        found.append(losses(trainer))
    best = trainer.state.best_model_checkpoint
    trainer.save_model(str(folder / f"trainer {way}" / "end"))
    return {"losses": found, "tensors": tensors(compiled), "best": best, "sharded": trainer.is_fsdp_enabled}


def work(rank: int, folder: str, port: int) -> None:
    """Be one of the processes."""
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    found = {f"trainer {way}": trained(way, Path(folder)) for way in ("ddp", "layers")}
    found |= {way: accelerated(way, rank, Path(folder)) for way in ACCELERATE}
    found["jobs"] = {way: jobs_worker.with_training(jobs_worker.sharded(way), Path(folder) / way / "jobs", rank)
                     for way in jobs_worker.WAYS}  # fmt: skip
    plainly()
    found["jobs"]["trainer ddp"] = jobs_worker.with_trainer(Path(folder) / "jobs ddp", 4)
    believed(ACCELERATE["layers"] or {})
    options = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}
    found["jobs"]["trainer layers"] = jobs_worker.with_trainer(Path(folder) / "jobs layers", 4, **options)
    plainly()
    found["jobs"]["refused"] = jobs_worker.refused(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
