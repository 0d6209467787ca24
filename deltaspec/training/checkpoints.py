"""Checkpoints of a module that holds compiled models: their deltas as `c.save` writes them, and what trains beside.

manifest.json, d.3f9a1c2b.safetensors …        the deltas, as `restore` takes them; several models: a folder each
outside.safetensors                            parameters in training, and buffers, of modules around the backbones
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaspec.backbone.origin import origin
from deltaspec.backbone.sharded import in_parts, is_sharded, sharded_as, unsharded
from deltaspec.compiler.found import Held, held_in
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.atomic import write_atomically
from deltaspec.names.paths import is_inside
from deltaspec.storage.card import write_card
from deltaspec.storage.delta_set import MANIFEST

OUTSIDE = "outside.safetensors"


def acting(model: nn.Module | None) -> list[Held]:
    """Return the compiled models that a module holds, with what is attached; none where it trains as a plain one."""
    return [held for held in ([] if model is None else held_in(model)) if held.acts()]


def in_shards(model: nn.Module) -> bool:
    """Return whether every process has to take part in writing (FSDP)."""
    in_parts(model)
    return any(map(is_sharded, model.parameters()))


def write(model: nn.Module, held: Sequence[Held], folder: Path, *, first: bool) -> None:
    """Write a checkpoint's tensors. Where they are in shards, all processes call this; the `first` one writes.

    Raise DeltaSpecError as `save` does, and where a module keeps a state that is no tensor (DS566).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for where, one in _folders(held, folder):
        one.compiled.save(where)
        if first:
            backbone = one.compiled.backbone
            write_card(where, one.compiled.plan, type(backbone), origin(backbone).get("id"))
    outside = {key: unsharded(value.detach()) for key, value in _outside(model).items()}
    if outside and first:
        from safetensors.torch import save

        write_atomically(folder / OUTSIDE, save({key: value.clone().contiguous() for key, value in outside.items()}))


def read(model: nn.Module, held: Sequence[Held], folder: Path) -> None:
    """Read a checkpoint's tensors into the model; every process calls this.

    Raise DeltaSpecError as `load` does, and where it is one of another model around the deltas (DS566).
    """
    in_parts(model)
    targets = _outside(model)
    values = _read_outside(folder, targets)
    for where, one in _folders(held, folder):
        one.compiled.load(where)
    with torch.no_grad():
        for key, value in values.items():
            targets[key].copy_(sharded_as(targets[key], value))


def holds_deltas(model: nn.Module, folder: Path) -> bool:
    """Return whether a checkpoint has deltas for one of the compiled models that a module holds, attached or not."""
    return any((where / MANIFEST).exists() for where, _ in _folders(held_in(model), folder))


def _folders(held: Sequence[Held], folder: Path) -> Iterator[tuple[Path, Held]]:
    for one in held:
        yield (folder if len(held) == 1 else folder / one.place), one


def _outside(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes outside the backbones: parameters in training, and buffers that are kept."""
    held = [one for one in held_in(model) if one.acts() or not one.trained]
    inside = {id(tensor) for one in held for tensor in one.compiled.backbone.state_dict(keep_vars=True).values()}
    found, odd = dict[str, Tensor](), list[str]()
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in inside or any(is_inside(key, one.place) for one in held):
            continue
        if not isinstance(value, Tensor):
            odd.append(key)
        elif value.requires_grad or not isinstance(value, nn.Parameter):
            found[key] = value
    if odd:
        message = (
            f"{odd[0]} is a state of the model around the deltas, and no tensor: a checkpoint of deltas has no place"
        )
        raise DeltaSpecError([Diagnostic("DS566", message, "<model>", suggestion="train without DeltaTrainerMixin")])
    return found


def _read_outside(folder: Path, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / OUTSIDE
    values: dict[str, Tensor] = load_file(path) if path.exists() else {}
    wrong = [f"lacks {key}" for key in targets.keys() - values.keys()]
    wrong += [f"has {key}, which the model has not" for key in values.keys() - targets.keys()]
    wrong += [
        f"has {key} as {list(value.shape)}, the model as {list(targets[key].shape)}"
        for key, value in values.items()
        if key in targets and value.shape != targets[key].shape
    ]
    if wrong:
        hint = "resume with the model, and the flags of training, that wrote it"
        raise DeltaSpecError(
            [Diagnostic("DS566", f"the checkpoint {line}", str(path), suggestion=hint) for line in sorted(wrong)]
        )
    return values
