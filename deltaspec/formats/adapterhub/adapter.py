"""An AdapterHub adapter while it is read: its keys by kind of module, and the places that it is on."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.adapterhub.configuration import parts_of
from deltaspec.formats.adapterhub.places import Places, places_of
from deltaspec.formats.base import Base
from deltaspec.formats.foreign import Foreign
from deltaspec.formats.formulas import ACTIVATIONS
from deltaspec.formats.options import Options
from deltaspec.methods.shared.activations import Activation
from deltaspec.names.folding import shown

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_KINDS = ("adapters", "invertible_adapters", "loras", "prefix_tunings", "prefix_gates", "prompt_tunings", "refts",
          "shared_parameters", "adapter_fusion_layer")  # fmt: skip
_OLDER = {
    **dict.fromkeys(
        ("attention_text_task_adapters", "attention_text_lang_adapters", "layer_text_task_adapters",
         "layer_text_lang_adapters"), "adapters",
    ),
    "invertible_lang_adapters": "invertible_adapters",
}  # fmt: skip
"""What kinds of modules were called in version 1."""
_KEY = re.compile(rf"(?:(?P<module>.+?)\.)?(?P<kind>{'|'.join(_KINDS)})\.(?P<name>[^.]+)\.(?P<rest>.+)")
_TRAINING = ("architecture", "init_weights", "init_weights_seed", "dtype")
"""Options of all architectures that say nothing of what the adapter computes: dtypes are those of the tensors."""


class Adapter(Foreign):
    """The tensors of an AdapterHub directory, by kind and by the modules that they were added to."""

    def __init__(self, folder: Path, base: Base, name: str) -> None:
        super().__init__(folder, base, name, "AdapterHub")
        self.whole = self.json(CONFIG)
        self.incoming.base = _text(self.whole.get("model_name"))
        self.domains: dict[str, str] = {}
        """By delta: which of the states between a sublayer and its norm it changes; see `forms`."""
        self.occupied: dict[str, list[str]] = {}
        """By delta of bottlenecks: the projections whose output they see."""

    @cached_property
    def arrangement(self) -> Places:
        """Places of the base model. Raises DeltaSpecError where its architecture is not known."""
        found = places_of(self.base.table)
        if found is None:
            kind = self.base.table.model_type or self.base.table.model_class
            message = f"where AdapterHub puts its modules in {kind} is not known here"
            self.find("DS549", message, "merge it with adapters: model.merge_adapter(…), or convert it to PEFT")
            self.settle()
        assert found is not None
        return found

    def configurations(self) -> list[Options]:
        """Return the configurations that it is made of. Raises DeltaSpecError."""
        around = Options(self, self.whole, CONFIG)
        around.ignore("config", "config_id", "type")  # the last two of version 1
        for name in ("name", "model_class", "model_name", "model_type", "version"):
            if around.get(name) is not None:
                around.text(name, "")
        if around.get("hidden_size") is not None:
            around.whole("hidden_size", 1, least=1)
        around.finish("an adapter_config.json of AdapterHub")
        try:
            parts = parts_of(self.whole.get("config"), self.whole)
        except ValueError as error:
            self.find("DS544", f"config: {error}", "save the adapter again", CONFIG)
            self.settle()
            return []
        self.settle()
        found = [Options(self, part, CONFIG) for part in parts]
        for options in found:
            options.ignore(*_TRAINING)
        return found

    def read_keys(self) -> None:
        """Read the weights, under the names of the last version, and check whose they are. Raises DeltaSpecError."""
        self.load(WEIGHTS)
        self.widen()
        self.weights = {_modern(key): value for key, value in self.weights.items()}
        self.incoming.account = dict.fromkeys(self.weights, "")
        names = {split["name"] for key in self.weights if (split := _KEY.fullmatch(key)) is not None}
        saved = self.whole.get("name")
        if isinstance(saved, str) and names - {saved}:
            others = ", ".join(sorted(names - {saved}))
            message = f"has tensors of {others}, and {CONFIG} is of {saved}, so AdapterHub would not load them"
            self.find("DS543", message, "the file and the configuration are of two adapters", self.file)
        elif len(names) > 1:
            message = f"has tensors of several adapters: {', '.join(sorted(names))}"
            self.find("DS543", message, "save each by itself: model.save_adapter(dir, name)", self.file)
        self.settle()

    def modules(self, kind: str) -> dict[str, dict[str, str]]:
        """Return the modules that have tensors of a kind, and the keys of these by their own names."""
        found: dict[str, dict[str, str]] = {}
        for key in self.weights:
            split = _KEY.fullmatch(key)
            if split is not None and split["kind"] == kind:
                found.setdefault(split["module"] or "", {})[split["rest"]] = key
        return found

    def compare(self, own: Collection[str], meant: Collection[str], what: str) -> None:
        """Compare places that have tensors with those that the configuration means.

        AdapterHub leaves out keys of places that it does not mean, and draws at random those that are missing.
        """
        if lacking := [place for place in meant if place not in own]:
            message = f"has no {what} for {counted(len(lacking), 'place')} that its configuration means: "
            hint = "the file was cut, or is for a model with fewer layers"
            self.find("DS543", message + shown(lacking), hint, self.file)
        if other := [place for place in own if place not in meant]:
            message = f"has {what} for {shown(other)}, which its configuration leaves out"
            self.find("DS543", message, "the file and the configuration are of two adapters", self.file)

    def left_out(self, options: Options) -> frozenset[int]:
        """Return the numbers of the layers that are left out."""
        return frozenset(options.items("leave_out", [], int))

    def activation(self, options: Options, default: str) -> Activation:
        """Return our name of the activation."""
        named = options.text("non_linearity", default)
        found = ACTIVATIONS.get(named.lower())
        if found is None:
            hint = "merge it, or train it anew with one of those"
            self.find("DS549", f"non_linearity: {named!r} is none of the activations here", hint, CONFIG)
        return found or "relu"

    def unsupported(self, what: str, why: str, suggestion: str) -> None:
        """Refuse something that it computes."""
        self.find("DS549", f"{what}: {why}", suggestion, CONFIG)

    def lost(self, what: str, why: str) -> None:
        """Refuse it for something that its files lack."""
        self.find("DS538", f"{what}: {why}", "save it again from the model that it was trained in", self.file)


def _modern(key: str) -> str:
    return ".".join(_OLDER.get(segment, segment) for segment in key.split("."))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def names_of(whole: Mapping[str, Any]) -> str:
    """Return the class of the model that an adapter was saved from, for people."""
    return str(whole.get("model_class") or whole.get("model_type") or "another model")
