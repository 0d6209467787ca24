"""Writing deltas of a method that PEFT has as a type of its own: one delta a module, its tensors under PEFT's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.aside import PREFIX, is_bias, write_aside
from deltaspec.formats.peft.biases_out import write_all_biases
from deltaspec.formats.peft.naming import by_name, by_name_below, hidden_by, target_list

LAYERS = {
    "Linear": nn.Linear, "Embedding": nn.Embedding, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d,
}  # fmt: skip
"""Classes that PEFT has layers for, by the names that its types list them under; `Conv1D` is transformers'."""
NO_MODULES = "dummy-target-modules"
"""PEFT's own name for an adapter that has no module of its type, but others beside it."""
Value = TypeVar("Value", bound=Hashable)


class Single:
    """The parts of one method on their way into a type; what PEFT has no form for is refused."""

    def __init__(
        self,
        out: Outgoing,
        type_name: str,
        method: str,
        layers: Collection[str],
        biases: bool = True,
        rows: bool = False,
    ) -> None:
        self.out, self.type = out, type_name
        added = write_aside(out, type_name, biases=biases, rows=rows)
        for fqn in added:
            shifts = [part for part in out.at(fqn) if is_bias(part)]
            out.refuse(shifts, f"this module has no bias, and PEFT's {type_name} adds none")
        self.parts: dict[str, Part] = {}
        for fqn, parts in out.take(lambda part: part.method == method).items():
            if reason := self._refusal(parts, layers):
                out.refuse(parts, reason)
            else:
                self.parts[fqn] = parts[0]

    def _refusal(self, parts: list[Part], layers: Collection[str]) -> str | None:
        part = parts[0]
        if len(parts) > 1:
            return f"PEFT has one {self.type} a module, and several deltas are here"
        if part.strength != 1:
            return f"strength {part.strength:g} has no place in PEFT's {self.type}"
        if getattr(part.params, "parts", None) is not None:
            return f"PEFT's {self.type} has no parts of a fused projection"
        return unplaced(self.out, part) or unknown_layer(self.out, part, layers, self.type)

    def keep(self, wanted: Callable[[Part], str | None]) -> None:
        """Refuse the parts for which `wanted` gives a reason."""
        for fqn, part in list(self.parts.items()):
            if reason := wanted(part):
                self.out.refuse([part], reason)
                del self.parts[fqn]

    def put(self, suffix: str, value: Callable[[Part], Tensor | None]) -> None:
        """Write a tensor of each module; None: it has none."""
        for fqn, part in self.parts.items():
            if (tensor := value(part)) is not None:
                self.out.tensors[f"{PREFIX}{fqn}.{suffix}"] = tensor

    def agreed(self, option: str, value: Callable[[Part], Value], default: Value) -> Value:
        """Return what all modules have in common; refuse those that differ, since PEFT has one for all."""
        values = {fqn: value(part) for fqn, part in self.parts.items()}
        usual = most(values, default)
        self.keep(
            lambda part: None if values[part.fqn] == usual else
            f"PEFT's {self.type} has one {option} for all modules: {usual!r}, and {values[part.fqn]!r} here"
        )  # fmt: skip
        return usual

    def largest(self, value: Callable[[Part], float]) -> float:
        """Return the largest of what matters in training alone, where PEFT has one for all modules."""
        values = [value(part) for part in self.parts.values()]
        if len(set(values)) > 1:
            self.out.remarks.append(f"dropouts differ between modules ({min(values)} to {max(values)}): PEFT has one")
        return max(values, default=0.0)

    def patterned(
        self, option: str, pattern: str, value: Callable[[Part], Any], default: Any, *, below: bool = False
    ) -> None:
        """Write an option that a pattern says for each module; `below`: with the rules of FourierFT and C3A."""
        values = {fqn: value(part) for fqn, part in self.parts.items()}
        usual = most(values, default)
        found = by_name_below(values, usual) if below else by_name(values, usual)
        if found is None:
            self.out.refuse(self.parts.values(), f"PEFT's {pattern} cannot tell these modules apart")
            return
        self.out.config |= {option: usual, pattern: found}

    def finish(self, **options: Any) -> None:
        """Write which modules these are, and the type's other options."""
        name_modules(self.out, self.parts)
        self.out.config |= {"peft_type": self.type, **options}


def left_out(ignored: list[str]) -> str | None:
    """Return what PEFT's layer leaves out of a convolution, as a reason; None where that is nothing."""
    return f"PEFT leaves out its {' and '.join(ignored)}, and runs another convolution" if ignored else None


def unplaced(out: Outgoing, part: Part) -> str | None:
    """Return why no layer of PEFT acts at a place; None where one does."""
    site = part.at.site
    if site.parameter is not None:
        return "PEFT's target_parameters are of LoRA alone, and its other layers take modules"
    if site.host is not None:
        return "PEFT acts where a module is called, and this one's weight is read without a call"
    if site.row.aliases:
        return "PEFT would replace the module under one of its names alone"
    if not part.fqn:
        return "PEFT cannot replace the model itself"
    return None


def unknown_layer(out: Outgoing, part: Part, layers: Iterable[str], type_name: str) -> str | None:
    """Return why a type of PEFT has no layer for a module; None where it has one."""
    module, row = out.base.model.get_submodule(part.fqn), part.at.site.row
    classes = tuple(LAYERS[name] for name in layers if name in LAYERS)
    if isinstance(module, classes) or (row.kind == "conv1d" and "Conv1D" in layers):
        return None
    return f"PEFT's {type_name} has no layer for {row.type}"


def name_modules(out: Outgoing, places: Collection[str], wrapped: Collection[str] = ()) -> None:
    """Write which modules an adapter is on: exactly these; `wrapped` are those whose own parameters it changes."""
    names = [name for name, _ in out.base.model.named_modules() if name]
    found = target_list(list(places), names) if places else [] if wrapped else NO_MODULES
    if isinstance(found, str) and places and out.wishes.listed:
        parts = [part for fqn in places for part in out.at(fqn)]
        out.refuse(
            parts, "no list of names tells these modules from others, and the engine takes no regular expression"
        )
    out.config["target_modules"] = found
    for fqn in hidden_by(out.config.get("modules_to_save") or (), (*places, *wrapped)):
        out.refuse(out.at(fqn), "PEFT gives no adapter to a module that modules_to_save seems to mean")
    write_all_biases(out, places)


def most(values: Mapping[str, Value], default: Value) -> Value:
    """Return the value that most modules have."""
    return Counter(values.values()).most_common(1)[0][0] if values else default
