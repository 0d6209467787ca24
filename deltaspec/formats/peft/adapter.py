"""A PEFT adapter while it is read: each option of its configuration and each key of its file is taken, or a finding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.formats.base import Base
from deltaspec.formats.foreign import Foreign, without_wrappers
from deltaspec.formats.incoming import Incoming
from deltaspec.formats.options import Options
from deltaspec.formats.peft.words import TASKS
from deltaspec.names.folding import shown
from deltaspec.names.paths import below

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FAST = "TransformerEncoderLayer"
"""torch's layer that has a fast path."""
DEFAULT = "default"
"""What PEFT calls an adapter that nobody named."""
_COMMON = (
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip
"""Options of all types that say nothing of what the adapter computes."""
_COPIES = f".modules_to_save.{DEFAULT}."
"""Where its wrappers hold the copy of a module."""
_AROUND = ("base_layer", "token_adapter")
"""What PEFT's layers and wrappers call what they are around, and are called beside it."""
_NORM = "lora_magnitude_vector"
"""A module in PEFT, and a tensor in what it saves."""


class Adapter(Foreign):
    """A PEFT directory: options and keys are taken one by one, and `finish` says which were not."""

    def __init__(self, folder: Path, base: Base, name: str) -> None:
        super().__init__(folder, base, name, "PEFT")
        self.config = self.json(CONFIG)
        self.options = Options(self, self.config, CONFIG)
        """The configuration: each option is asked for, with what it may be."""
        self.options.ignore(*_COMMON)
        self.task = self.options.word("task_type", "", TASKS)
        """Task that it was trained for; empty where the configuration names none."""
        self.incoming.base, self.incoming.revision = self._said("base_model_name_or_path"), self._said("revision")

    @property
    def type(self) -> str:
        """PEFT type, in upper case; empty where the configuration names none."""
        named = self.config.get("peft_type")
        return named.upper() if isinstance(named, str) else ""

    def plain(self, key: str) -> str:
        """Return a key without the wrappers of PEFT and torch."""
        segments = self._without_name(without_wrappers(key).split("."))
        if segments[:1] != ["base_model"]:
            return super().plain(".".join(segments))
        # `base_model` is all that types without layers of their own put in front
        return super().plain(".".join(segments[2:] if segments[1:2] == ["model"] else segments[1:]))

    def load(self, files: Sequence[str]) -> None:
        """Read the first of these files that there is; biases that were saved twice keep both of their names."""
        super().load(files)
        for key in [key for key in self.weights if _COPIES in key]:
            short = key.replace(_COPIES, ".")
            if short not in self.weights:
                self.weights[short] = self.weights.pop(key)
                self.incoming.account[short] = self.incoming.account.pop(key)

    def _without_name(self, segments: list[str]) -> list[str]:
        """Return a key's segments without the adapter's name, which a model's own `state_dict` has."""
        for at, (segment, after) in enumerate(pairwise(segments)):
            if segment == _NORM:
                return segments[: at + 1]
            if (
                after == DEFAULT
                and "_" in segment
                and segment != "modules_to_save"
                and f"{segment}.{after}" not in self._endings
            ):
                return segments[: at + 1] + segments[at + 2 :]
        return segments

    @cached_property
    def _endings(self) -> frozenset[str]:
        """The last two segments of all modules' names."""
        return frozenset(".".join(fqn.split(".")[-2:]) for fqn in self.base.rows)

    def called(self, module: str) -> str:
        """Return what the base model calls a module that PEFT's layers are around; its own may be called as those."""
        if module in self.base.rows:
            return module
        return super().called(".".join(segment for segment in module.split(".") if segment not in _AROUND))

    def _said(self, name: str) -> str | None:
        return None if self.config.get(name) is None else self.options.text(name, "") or None

    # Options.

    def option(self, name: str, default: Any = None) -> Any:
        """Return an option of the configuration; the default where it is left out."""
        return self.options.get(name, default)

    def ignore(self, *names: str) -> None:
        """Take options that matter in training, or for storage, alone."""
        self.options.ignore(*names)

    def refuse(self, name: str, reason: str, suggestion: str, *, unless: Iterable[Any] = (None, False)) -> None:
        """Refuse an option that has no counterpart here, unless it is off or has one of these values."""
        if (value := self.option(name)) not in (*unless, [], {}):
            self.find("DS544", f"{name}: {value!r}: {reason}", suggestion, CONFIG)

    # Keys.

    def modules(self, *suffixes: str) -> dict[str, set[str]]:
        """Return the modules that have keys with these endings, in the file's order, and the endings of each."""
        found: dict[str, set[str]] = defaultdict(set)
        for key in self.weights:
            for suffix in suffixes:
                if key.endswith("." + suffix):
                    found[key[: -len(suffix) - 1]].add(suffix)
                elif key == suffix:  # the model itself is the module
                    found[""].add(suffix)
        return dict(found)

    def tensor_of(self, module: str, suffix: str, became: str) -> Tensor | None:
        """Take a module's tensor; None where there is none."""
        return self.take(below(module, suffix), became)

    # Result.

    def _remark_fast_path(self) -> None:
        """Say where PEFT in evaluation mode leaves out what it computes in training."""
        changed = {site.fqn for delta in self.incoming.deltas if delta.method != "full" for site in delta.sites}
        layers = [row.fqn for row in self.base.table.rows if _FAST in row.bases]
        if passed := [fqn for fqn in layers if any(at.startswith(f"{fqn}.") for at in changed)]:
            self.remark(
                f"in evaluation mode torch's fast path reads the weights in {shown(passed)} by itself, so PEFT "
                "computes there without the adapter, unlike in training: here it acts in both"
            )

    def finish(self) -> Incoming:
        """Return what was read. Raises DeltaSpecError where an option or a key was not taken, or nothing was found."""
        self.options.finish(self.type)
        for key, (fqn, own) in self.owned(self.weights).items() if not self.findings else ():
            self.leave_own(key, below(fqn, own))
        self._remark_fast_path()
        return super().finish()
