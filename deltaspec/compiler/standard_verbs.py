"""What the standard methods of transformers' models (and others with `save_pretrained`) do on a compiled backbone.

Saving writes the deltas alone, in the form that `restore` reads; with nothing attached, the plain model. Methods of
transformers that would put PEFT's layers in are refused, and say what does it here.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.origin import origin
from deltaspec.backbone.reserved import Reserved
from deltaspec.backbone.sharded import in_parts, is_sharded
from deltaspec.compiler.adapter_verbs import ADAPTERS, adapter_verb
from deltaspec.compiler.build import Built
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.atomic import write_atomically
from deltaspec.names.paths import below, is_inside
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.verbs import put
from deltaspec.storage.card import write_card
from deltaspec.storage.save import save

WAYS = "c.save(dir) saves the deltas, c.merge().save_pretrained(dir) a plain model with them in its weights"
RESUMED = "model.safetensors"
"""File in which transformers' Trainer looks for tensors when it resumes."""
_SAVING = ("save_pretrained", "save")
_PUSHING = ("push_to_hub", "save_to_hub")
_MEANINGLESS = {"max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format",
                "distributed_checkpoint", "model_name", "create_model_card", "train_datasets", "exist_ok",
                "replace_model_card", "organization", "tags"}  # fmt: skip
"""Options of other libraries' saving that say how a whole model is written."""


_WRITTEN_ELSEWHERE: ContextVar[bool] = ContextVar("written_elsewhere", default=False)


@contextmanager
def written_elsewhere() -> Iterator[None]:
    """Let saving write no deltas inside: whoever asks for it writes them in a way of its own."""
    token = _WRITTEN_ELSEWHERE.set(True)
    try:
        yield
    finally:
        _WRITTEN_ELSEWHERE.reset(token)


def install(built: Built) -> None:
    """Let the backbone's own standard methods know of the deltas."""
    backbone = built.host.backbone
    for module in backbone.modules():
        kind = type(module)
        if isinstance(module, Reserved) or not hasattr(kind, "save_pretrained"):
            continue
        for name in (*_SAVING, *_PUSHING):
            if hasattr(kind, name):
                whole = _push if name in _PUSHING else _save
                put(module, name, functools.partial(whole if module is backbone else _part, built, name, module))
        for name in ADAPTERS:
            if "peft" in getattr(getattr(kind, name, None), "__module__", ""):  # not a method of the user's own
                put(module, name, functools.partial(_refuse_adapter, name))
    if getattr(backbone, "is_quantized", False):
        # Trainer trains a quantised model only where this attribute is true, and asks nothing else by it.
        put(backbone, "_hf_peft_config_loaded", functools.partial(_refuse_adapter, "load_adapter"))


def _refuse_adapter(name: str, *args: Any, **kwargs: Any) -> None:
    raise adapter_verb(name)


def _part(built: Built, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Save a module inside the backbone by its own method, while no delta is attached."""
    if built.active.acts:
        message = f"{name} of a {type(module).__name__} inside a compiled model would leave the deltas out"
        raise DeltaSpecError([Diagnostic("DS476", message, "<model>", suggestion=WAYS)])
    return getattr(type(module), name)(module, *args, **kwargs)


def _save(built: Built, name: str, backbone: nn.Module, directory: str | PathLike[str], *args: Any, **kw: Any) -> Any:
    """Do what `save_pretrained` does: write what is attached, without the backbone; the plain model if nothing is."""
    if _WRITTEN_ELSEWHERE.get():
        return None
    if not built.active.acts:
        if (given := kw.get("state_dict")) is not None:
            kw["state_dict"] = {key: value for key, value in given.items() if not is_inside(key, built.host.home)}
        return getattr(type(backbone), name)(without_deltas(built.host), directory, *args, **kw)
    return _save_deltas(built, directory, *args, **kw)


def _save_deltas(
    built: Built,
    directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    built.libraries.refuse_attached(built.active.active, "saved")
    in_parts(built.host.backbone)
    hub = {key: options.pop(key) for key in _HUB if key in options}
    _refuse_options(options)
    tensors = {below(built.host.home, key): tensor for key, tensor in built.host.deltas.state_dict().items()}
    given = {key.removeprefix("backbone."): value for key, value in (state_dict or {}).items()}
    if differing := [key for key, value in given.items() if key in tensors and _differs(value, tensors[key])]:
        message = f"state_dict has other values of {differing[0]} than the model"
        hint = "load them first, c.backbone.load_state_dict(state_dict, strict=False), then save"
        raise DeltaSpecError([Diagnostic("DS477", message, "<model>", suggestion=hint)])
    sharded = any(map(is_sharded, tensors.values()))
    if is_main_process or sharded:  # shards are put together by all processes
        save(built.active, built.shared.plan, built.host.deltas, directory)
    if not is_main_process:
        return
    folder, backbone = Path(directory), built.host.backbone
    if not sharded:  # Trainer keeps shards in files of its own
        from safetensors.torch import save as to_bytes

        whole = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
        write_atomically(folder / RESUMED, to_bytes(whole, {"format": "pt"}))
    write_card(folder, built.shared.plan, type(backbone), origin(backbone).get("id"))
    if push_to_hub:
        _upload(folder, **{"repo_id": folder.name, **hub})


def _differs(given: Tensor, own: Tensor) -> bool:
    return given.shape != own.shape or not torch.equal(given.to(own.device), own)


def _push(built: Built, name: str, backbone: nn.Module, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Do what `push_to_hub` does, with what `save_pretrained` writes."""
    if not built.active.acts:
        return getattr(type(backbone), name)(without_deltas(built.host), repo_id, *args, **kwargs)
    if args:
        raise TypeError(f"{name} takes its options by name")
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    with tempfile.TemporaryDirectory() as folder:
        _save_deltas(built, folder, **kwargs)
        return _upload(Path(folder), **{**hub, "repo_id": repo_id})


_HUB = ("repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description")
"""Options of an upload."""


def _upload(folder: Path, repo_id: str, private: bool | None = None, token: Any = None, **commit: Any) -> Any:
    """Upload a folder to a repository of the hub, made if need be."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    made = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit["commit_message"] = commit.get("commit_message") or "Upload deltas"
    return hub.upload_folder(repo_id=made, folder_path=folder, **commit)


def _refuse_options(options: Mapping[str, Any]) -> None:
    if unknown := sorted(options.keys() - _MEANINGLESS):
        raise TypeError(f"saving deltas takes no {unknown[0]!r}")
