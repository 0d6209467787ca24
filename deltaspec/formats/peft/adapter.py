"""A PEFT adapter while it is read: each option of its configuration and each key of its file is taken, or a finding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming, IncomingDelta, IncomingSite
from deltaspec.formats.unread import Unread
from deltaspec.names.folding import shown
from deltaspec.names.paths import below
from deltaspec.names.prefixes import prefixes

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments that torch.compile, DataParallel, FSDP and activation checkpointing put into names."""
_COMMON = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip
"""Options of all types that say nothing of what the adapter computes."""


class Adapter(Unread):
    """A PEFT directory: options and keys are taken one by one, and `finish` says which were not."""

    def __init__(self, folder: Path, base: Base, name: str) -> None:
        super().__init__(folder)
        self.base, self.name = base, name
        self.config = self.json(CONFIG)
        self._options = set(self.config) - {*_COMMON}
        """Names of the options that nobody has asked for."""
        self.weights: dict[str, Tensor] = {}
        """Tensors by their names without `base_model.model.`; those that were taken are gone."""
        self.file = WEIGHTS[0]
        self.incoming = Incoming(folder, "PEFT")

    @property
    def type(self) -> str:
        """PEFT type, in upper case; empty where the configuration names none."""
        named = self.config.get("peft_type")
        return named.upper() if isinstance(named, str) else ""

    def load(self) -> None:
        """Read the weights. Raises DeltaSpecError."""
        held = [file for file in WEIGHTS if (self.folder / file).exists()]
        if not held:
            self.find("DS521", f"has no {WEIGHTS[0]}", "save the adapter again: model.save_pretrained(dir)")
            self.settle()
        self.file = held[0]
        self.incoming.file = self.file if self.file.endswith(".safetensors") else ""
        for key, value in self.tensors(self.file).items():
            plain = _plain(key)
            if plain in self.weights:
                self.find("DS543", f"has {plain} twice, under two prefixes", "save the adapter again", self.file)
            self.weights[plain] = value
            self.incoming.origin[id(value)] = key
            self.incoming.account[plain] = ""

    # Options.

    def option(self, name: str, default: Any = None) -> Any:
        """Return an option of the configuration; the default where it is left out."""
        self._options.discard(name)
        return self.config.get(name, default)

    def ignore(self, *names: str) -> None:
        """Take options that matter in training, or for storage, alone."""
        self._options.difference_update(names)

    def refuse(self, name: str, reason: str, suggestion: str, *, unless: Iterable[Any] = (None, False)) -> None:
        """Refuse an option that has no counterpart here, unless it is off or has one of these values."""
        if (value := self.option(name)) not in (*unless, [], {}):
            self.find("DS544", f"{name}: {value!r}: {reason}", suggestion, CONFIG)

    # Keys.

    def take(self, key: str, became: str) -> Tensor | None:
        """Take a tensor, saying what became of it; None where the file has none of this name."""
        found = self.weights.pop(key, None)
        if found is not None:
            self.incoming.account[key] = became
        return found

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

    def places(self, modules: Iterable[str]) -> Mapping[str, str]:
        """Return the FQNs here of modules as PEFT's names call them; what has none is a finding.

        They may lie under another prefix: adapters of a model with a head fit the model without it, and the reverse.
        """
        named = {module: _unwrapped(module) for module in modules}
        rows = self.base.rows
        fits = prefixes(named.values(), rows)
        if fits:
            prefix = fits[0]
            return {module: prefix.to_here(name) or "" for module, name in named.items()}
        here = {module: name for module, name in named.items() if name in rows}
        lost = [name for name in named.values() if name not in rows]
        if lost:
            kind = self.base.table.model_class
            message = f"is for another model: {shown(lost)} {'is' if len(lost) == 1 else 'are'} not in this {kind}"
            named_base = self.config.get("base_model_name_or_path")
            hint = f"load its base model, {named_base}" if named_base else "load the model that it was trained on"
            self.find("DS523", message, hint, self.file)
        return here

    def tensor_of(self, module: str, suffix: str, became: str) -> Tensor | None:
        """Take a module's tensor; None where there is none."""
        return self.take(below(module, suffix), became)

    # Results.

    def add(
        self, method: str, params: Mapping[str, Any], sites: Iterable[IncomingSite], part: str = "", **more: Any
    ) -> None:
        """Add a delta; `part` is put behind the adapter's name where it is not the only one."""
        found = tuple(sites)
        if found:
            name = f"{self.name}-{part}" if part else self.name
            self.incoming.deltas.append(IncomingDelta(name, method, params, found, **more))

    def remark(self, text: str) -> None:
        """Say something that a reader must know."""
        self.incoming.remarks.append(text)

    def finish(self) -> Incoming:
        """Return what was read. Raises DeltaSpecError where an option or a key was not taken, or nothing was found."""
        unknown = [name for name in sorted(self._options) if self.config[name] not in (None, False, [], {}, "")]
        for name in unknown:
            message = f"{name}: {self.config[name]!r} is no option of {self.type} that is known here"
            self.find("DS544", message, "if it does not matter, delete it; else report it", CONFIG)
        if left := list(self.weights):
            message = f"holds {shown(left)}, which {'fits' if len(left) == 1 else 'fit'} nowhere"
            self.find("DS543", message, "the file and the configuration are of two adapters, or one was cut", self.file)
        if not self.findings and not self.incoming.deltas:
            self.find("DS543", "holds no tensor of an adapter", "save the adapter again", self.file)
        self.settle()
        return self.incoming


def _plain(key: str) -> str:
    """Return a key without the wrappers of PEFT and torch."""
    segments = [segment for segment in key.split(".") if segment not in _WRAPPERS[2:] and segment != "_orig_mod"]
    while segments and segments[0] == "module":
        segments = segments[1:]
    if segments[:1] == ["base_model"]:  # which is all that types without layers of their own put in front
        segments = segments[2:] if segments[1:2] == ["model"] else segments[1:]
        while segments and segments[0] == "module":
            segments = segments[1:]
    return ".".join(segments)


def _unwrapped(module: str) -> str:
    """Return a module's name without PEFT's own layers around it."""
    return ".".join(segment for segment in module.split(".") if segment != "base_layer")
