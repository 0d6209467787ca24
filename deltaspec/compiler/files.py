"""What a compiled model writes and reads, and the plain forms that others take: files, merged models, exports."""

from __future__ import annotations

import os
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from deltaspec.backbone.sharded import in_parts
from deltaspec.compiler.answers import kept_answers, verify_saved
from deltaspec.compiler.engine import require_served, wishes_for
from deltaspec.compiler.handles import known_names
from deltaspec.compiler.leaving import leaving
from deltaspec.formats.base import Base
from deltaspec.formats.opening import open_set
from deltaspec.formats.outgoing import Wishes
from deltaspec.formats.saving import write_files, writer
from deltaspec.library.libraries import Libraries
from deltaspec.library.view import LibraryView, open_view
from deltaspec.runtime.active import Active
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.host import Host
from deltaspec.runtime.shared import Shared
from deltaspec.storage.agreement import Verification
from deltaspec.storage.load import load
from deltaspec.storage.matching import Match, checked
from deltaspec.storage.save import save
from deltaspec.transforms.merge import merge


class Files(nn.Module):
    """The part of a compiled model that has to do with files, and with models that know nothing of deltas."""

    _active: Active
    _shared: Shared
    _host: Host
    _libraries: Libraries
    view: Any
    """Makes another compiled model over the same weights and deltas; see `CompiledModel`."""

    def library(
        self,
        directory: str | PathLike[str],
        *names: str,
        limit: int | str | None = None,
        preload: bool = False,
        by: str = "delta",
        example_inputs: Any = None,
        match: Match = "weights",
    ) -> LibraryView:
        """Make the names of saved deltas known, to be loaded when they are attached; see `deltaspec.library`.

        `directory` is what `save` wrote, or holds such directories; `names` choose some of it. `limit` is how many of
        them may be in memory, or their size (`"2GiB"`); those that were not used for longest, and are not attached,
        make way. `preload` loads all at once. `by="folder"` names deltas by their directories, `by="identity"` by their
        content (`sha256:…`, of which a beginning will do). They apply after the compiled ones, in order; their
        parameters are frozen. `.plan`, `save` and `state_dict` are those of the compiled deltas alone. `example_inputs`
        as for `compile`, `match` as for `restore`. Raises DeltaSpecError.
        """
        return open_view(self._libraries, directory, names, limit, preload, by, example_inputs, match)

    def save(self, directory: str | PathLike[str], *names: str, golden: Any = None) -> None:
        """Write deltas, by name or all (safetensors, resolved spec, lock), to a directory, in place of what it held.

        `golden` are a few inputs, as `example_inputs` for `compile`: what the model gives for them, under each delta
        alone and under what is attached, is kept too, for `verify`. Raises DeltaSpecError (DS550: too much of that).
        """
        in_parts(self)
        answers = None if golden is None else lambda names, attached: kept_answers(self.view(), golden, names, attached)
        save(self._active, self._shared.plan, self._host.deltas, directory, names, answers)

    def verify(self, directory: str | PathLike[str], *names: str, tolerance: float | None = None) -> Verification:
        """Compare what saved deltas, by name or all, gave when they were saved (`golden`) with what this model gives.

        The result is true where all agree, and prints as a table. Differences are measured over the largest magnitude,
        and rounding leaves 1e-4 of it in float32, 1e-2 in float16, 5e-2 in bfloat16; or say how much: `tolerance`. What
        is attached stays so. Raises DeltaSpecError where no answers were kept (DS551).
        """
        return verify_saved(self.view(), directory, names, tolerance)

    def save_as(
        self,
        form: str,
        directory: str | PathLike[str],
        *names: str,
        uniform: bool = False,
        approximate: int | None = None,
        engine: str | None = None,
    ) -> dict[str, float]:
        """Write these deltas, or all attached ones, as one adapter in the form of another library, such as `peft`.

        It computes what they compute together here, at their strengths: several low-rank deltas become one. `uniform`
        gives all modules one rank and one scale, for readers that know no patterns. What has no exact form is refused,
        and nothing is written; `approximate` is the rank of low-rank updates that stand for it. Return the relative
        error of each module where they do; the card has them, too. `engine` writes it so that this engine's check
        passes (`deltaspec.engines`). Raises DeltaSpecError (DS560, or DS575 for a model in shards) with all findings,
        TypeError, ValueError, OSError.
        """
        _require_plain(form, directory, approximate)
        target, wishes = writer(form), Wishes(uniform=uniform, approximate=approximate)
        if engine is not None:
            wishes = wishes_for(engine, wishes)
        chosen = known_names(self._shared, names) if names else self._active.active
        out = leaving(self._active, self._shared, self._host, chosen, wishes)
        files = target.write(out)
        if engine is not None:
            require_served(files, target.MAIN, out.base.model, engine, None)
        write_files(Path(directory), files, target.MAIN)
        return out.errors

    def load(self, directory: str | PathLike[str], *names: str, match: Match = "weights") -> Self:
        """Read the tensors of saved deltas, by name or all; `match` as for `restore`, `.plan` says what it let pass."""
        level = checked(match)
        in_parts(self)
        base = cache(lambda: Base(without_deltas(self._host)))
        known = names or tuple(delta.name for delta in self._shared.plan.deltas)
        called = known[0] if len(known) == 1 else None  # a foreign adapter has no name of its own
        self._shared.plan = load(
            self._active, self._shared.plan, self._host.deltas, lambda: open_set(directory, base, called), names, level
        )
        return self

    def merge(self, *names: str) -> nn.Module:
        """Return a new plain model of the original class with these deltas, or all attached ones, folded in.

        With nothing attached, and no name given, there is nothing to fold in: that raises DeltaSpecError (DS417),
        unless the backbone may have been trained (`compile(..., train_backbone=True)`).
        """
        chosen = known_names(self._shared, names) if names else self._active.active
        return merge(self._active, self._shared, self._host, chosen)

    def export(self, *args: Any, **options: Any) -> torch.export.ExportedProgram:
        """Export the model with its attached deltas: `torch.export.export(self.backbone, …)`, same arguments."""
        self._active.require_proof()
        return torch.export.export(self._host.backbone, *args, **options)


def _require_plain(form: Any, directory: Any, approximate: Any) -> None:
    """Raise TypeError or ValueError where these are not what `save_as` takes."""
    if not isinstance(form, str):
        raise TypeError(f"form must be a name such as 'peft', not {form!r}")
    if not isinstance(directory, str | PathLike):
        raise TypeError(f"directory must be a path, not {directory!r}")
    if not os.fspath(directory):
        raise ValueError("directory must not be empty: '.' is the one at hand")
    if approximate is not None and (not isinstance(approximate, int) or isinstance(approximate, bool)):
        raise TypeError(f"approximate must be a rank, a whole number, or None, not {approximate!r}")
    if approximate is not None and approximate < 1:
        raise ValueError(f"approximate must be a rank of 1 or more, not {approximate}")
