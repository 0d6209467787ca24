"""An OpenDelta directory while it is read: the keys of one delta type after the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.base import Base
from deltaspec.formats.foreign import Foreign
from deltaspec.formats.formulas import ACTIVATIONS
from deltaspec.formats.opendelta.addressing import addressed, structures
from deltaspec.formats.options import Options
from deltaspec.methods.shared.activations import Activation
from deltaspec.names.folding import shown
from deltaspec.names.patterns import PatternError

CONFIG = "config.json"
WEIGHTS = ("pytorch_model.bin",)
_COMMON = (
    "delta_type", "opendelta_version", "transformers_version", "backbone_class", "backbone_checkpoint_name",
    "backbone_hash", "unfrozen_modules", "interactive_modify", "backend",
)  # fmt: skip
"""Options of all types that say nothing of what the delta computes. OpenDelta's hash of a backbone is of the names and
shapes of another version of transformers, so it says nothing here."""


class Saved(Foreign):
    """The tensors of an OpenDelta directory, by the modules that they were added to."""

    def __init__(self, folder: Path, base: Base, name: str) -> None:
        super().__init__(folder, base, name, "OpenDelta")
        self.sites_of: dict[str, str] = {}
        """Modules that a delta was read for, and its type."""

    def options(self, config: Mapping[str, Any], file: str) -> Options:
        """Return the options of a configuration, without those that all have."""
        options = Options(self, config, file)
        options.ignore(*_COMMON)
        return options

    def modules(self, infix: str) -> dict[str, list[str]]:
        """Return the modules that have tensors of a kind, and the names of these."""
        found: dict[str, list[str]] = {}
        for key in self.weights:
            if (split := re.fullmatch(rf"(?:(?P<module>.+)\.)?{infix}\.(?P<rest>.+)", key)) is not None:
                found.setdefault(split["module"] or "", []).append(split["rest"])
        return found

    def sites(self, infix: str, options: Options) -> dict[str, str]:
        """Return the modules that have tensors of a kind, and what they are called here.

        They are compared with those that the configuration means.
        """
        modules = list(self.modules(infix))
        places = self.places(modules)
        for module in modules:
            if (other := self.sites_of.setdefault(module, infix)) != infix:
                message = f"{module} has both {other} and {infix}, and the file does not say which comes first"
                self.find("DS539", message, "save each delta by itself", self.file)
        self.compare(modules, options)
        return places

    def compare(self, modules: Iterable[str], options: Options) -> None:
        """Compare modules that have tensors with those that `modified_modules` means, where that can be said."""
        meant = self.meant(options)
        own = set(self.places(modules).values())
        if meant is None or not own <= {row.fqn for row in self.base.table.rows}:
            return
        if lacking := [fqn for fqn in meant if fqn not in own]:
            message = f"has no tensors for {counted(len(lacking), 'module')} that modified_modules means: "
            hint = "the file was cut, or is for a model with fewer layers"
            self.find("DS543", message + shown(lacking), hint, self.file)
        if other := sorted(own - set(meant)):
            message = f"has tensors for {shown(other)}, which modified_modules does not mean"
            self.find("DS543", message, "the file and the configuration are of two deltas", self.file)

    def meant(self, options: Options) -> list[str] | None:
        """Return the modules that a configuration means, in the model's order; None where it cannot be said."""
        patterns = options.items("modified_modules", [], str)
        excluded = options.items("exclude_modules", ["lm_head"], str)
        common = options.flag("common_structure", False)
        called = ((self.prefix.to_saved(row.fqn), row) for row in self.base.table.rows)
        here = {row.fqn if name is None else name: row for name, row in called}  # as patterns name them
        within = structures({name: row.type for name, row in here.items()}) if common else {}
        if common and not within:  # OpenDelta knows none either: the file is another library's
            return None
        try:
            return [here[name].fqn for name in addressed([n for n in here if n], patterns, excluded, within)]
        except PatternError as error:
            message = f"modified_modules cannot be used: {error}"
            self.find("DS544", message, "save the delta again", CONFIG)
            return None

    def activation(self, options: Options, default: str = "gelu_new") -> Activation:
        """Return our name of the activation."""
        named = options.text("non_linearity", default)
        found = ACTIVATIONS.get(named.lower())
        if found is None:
            self.find("DS549", f"non_linearity: {named!r} is none of the activations here", "merge it", CONFIG)
        return found or "relu"
