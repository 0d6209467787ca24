"""Checkpoints of jobs: one file, written whole, with all that the next step depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.atomic import write_atomically
from deltaspec.training.kept import tensors_of
from deltaspec.training.state import JobState

FILE = "jobs.pt"
_VERSION = 1


def generators() -> dict[str, Any]:
    """Return the states of torch's generators, of which dropout draws."""
    found: dict[str, Any] = {"cpu": torch.default_generator.get_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_generators(states: Mapping[str, Any]) -> None:
    """Put torch's generators into states that `generators` gave."""
    torch.default_generator.set_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def write(directory: str | PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint into a directory, in place of the one that is there."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    torch.save({"version": _VERSION, **content}, buffer)
    write_atomically(folder / FILE, buffer.getvalue())


def read(directory: str | PathLike[str], states: Sequence[JobState]) -> dict[str, Any]:
    """Read the checkpoint of these jobs. Raises DeltaSpecError (DS385) with all that does not fit, OSError."""
    path = Path(directory) / FILE

    def refuse(*messages: str) -> DeltaSpecError:
        hint = "resume with the jobs, deltas and steps that it was written with"
        return DeltaSpecError([Diagnostic("DS385", message, str(path), suggestion=hint) for message in messages])

    if not path.is_file():
        hint = f"a checkpoint is a directory with {FILE}, which checkpoint=… or .save(…) wrote"
        raise DeltaSpecError([Diagnostic("DS385", "there is no checkpoint of jobs", str(path), suggestion=hint)])
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        known = content["version"] == _VERSION and isinstance(content["jobs"], dict)
    except (RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, UnpicklingError) as error:
        raise refuse(f"this is no checkpoint of jobs: {type(error).__name__}") from None
    if not known:
        raise refuse("this is a checkpoint of another version")
    wrong = [f"the job {name!r} is not in it" for name in (s.job.name for s in states) if name not in content["jobs"]]
    names = {state.job.name for state in states}
    wrong += [f"its job {name!r} is none of these" for name in content["jobs"] if name not in names]
    for state in states:
        saved = content["jobs"].get(state.job.name)
        if saved is None:
            continue
        if saved["result"]["steps"] != state.total:
            wrong.append(f"the job {state.job.name!r} had {saved['result']['steps']} steps, and has {state.total}")
        own = {key: tuple(tensor.shape) for key, tensor in tensors_of(state.deltas).items()}
        if own != {key: tuple(tensor.shape) for key, tensor in saved["tensors"].items()}:
            wrong.append(f"the deltas of the job {state.job.name!r} had other tensors")
    if wrong:
        raise refuse(*wrong)
    return content
