"""LN tuning of PEFT: trained copies of norms, or of whatever else is targeted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.aside import PREFIX, write_aside
from deltaspec.formats.peft.single import name_modules, unplaced
from deltaspec.formats.peft.targets import check_targets
from deltaspec.names.folding import shown
from deltaspec.names.paths import below

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"norm"})
"""Methods that are written so."""
_MARK = "ln_tuning_layers"


def read(adapter: Adapter) -> None:
    """Add the delta of an LN tuning adapter: `norm` where all of it is norms' scales and shifts, else `full`."""
    keys = {key: _split(key) for key in adapter.weights if _MARK in key.split(".")}
    if inside := sorted({target for target, inner, _ in keys.values() if inner}):
        message = f"has copies of {shown(inside)} with modules inside, whose keys PEFT itself does not find again"
        adapter.find("DS543", message, "name the modules inside as target_modules, and train it again", adapter.file)
        adapter.settle()
    targets = adapter.places(dict.fromkeys(target for target, _, _ in keys.values()))
    check_targets(adapter, targets, kinds=("norm", "linear", "conv1d", "conv", "embedding"))
    copies: dict[str, dict[str, Tensor]] = {}
    for key, (target, _, name) in keys.items():
        if target not in targets:
            continue
        fqn = targets[target]
        value = adapter.take(key, f"{below(fqn, name)}, in full")
        assert value is not None
        copies.setdefault(fqn, {})[name] = value
    rows = adapter.base.rows
    for fqn, own in copies.items():
        held = {tensor.name for tensor in (*rows[fqn].parameters, *rows[fqn].buffers)}
        if other := sorted(held ^ own.keys()):
            message = f"has a copy of {fqn}, and {' and '.join(other)} {'is' if len(other) == 1 else 'are'} only in one"
            adapter.find("DS543", message, "the file was cut, or is for another model", adapter.file)
    norms = all(rows[fqn].kind == "norm" and set(own) <= {"weight", "bias"} for fqn, own in copies.items())
    tied = any(parameter.tied for fqn in copies for parameter in rows[fqn].parameters)
    params = {"tied": "alone"} if tied and not norms else {}
    adapter.add("norm" if norms else "full", params, [IncomingSite(fqn, own) for fqn, own in copies.items()])


def _split(key: str) -> tuple[str, str, str]:
    """Return the module that is copied, the module inside it that owns a tensor (often none), the tensor's own name."""
    segments = key.split(".")
    at = segments.index(_MARK)
    return ".".join(segments[:at]), ".".join(segments[at + 1 : -1]), segments[-1]


def write(out: Outgoing) -> None:
    """Write copies of norms."""
    found = out.take(lambda part: part.method in METHODS)
    write_aside(out, "LN_TUNING", biases=False)
    for fqn, parts in found.items():
        if reason := unplaced(out, parts[0]):
            out.refuse(parts, reason)
            continue
        changed = out.folded(fqn, parts)
        for name, value in out.base.model.get_submodule(fqn).state_dict().items():
            if name not in changed and value.is_meta:
                out.lacks_weights(parts, f"{name} must be written too")
            out.tensors[f"{PREFIX}{fqn}.{_MARK}.{name}"] = changed.get(name, value)
    name_modules(out, list(found))
    out.config["peft_type"] = "LN_TUNING"
