"""The biases that PEFT writes with `bias: all`: every one of the base, under the names that its wrappers give them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.aside import PREFIX
from deltaspec.formats.peft.naming import saved_by
from deltaspec.names.paths import below, is_inside

_OWN = "bias"


def write_all_biases(out: Outgoing, places: Collection[str]) -> None:
    """Write the base's biases that no delta changes beside those that some do, if the adapter has any.

    `places` are the modules that the adapter is on. Read in `_get_learnable_bias_state_dict` of PEFT 0.21: whatever is
    called so in a state dict, buffers and second names of tied ones too; a saved module's come under three names.
    """
    if out.config.get("bias") != "all":
        return
    held = out.base.model.state_dict(keep_vars=True)
    own = {name: value.detach() for name, value in held.items() if name.rpartition(".")[2] == _OWN}
    changed = {name: value for name in own if (value := out.tensors.pop(PREFIX + name, None)) is not None}
    for name in list(changed):
        changed |= {twin: changed[name] for twin in _twins(out, name) if twin not in changed}
    saved = _saved(out)
    for name, value in own.items():
        top = next((fqn for fqn in saved if is_inside(name, fqn)), None)
        new = changed.get(name, value)
        if top is not None:
            inner = name.removeprefix(top)
            out.tensors |= {
                f"{PREFIX}{top}.original_module{inner}": value,
                f"{PREFIX}{top}.modules_to_save{inner}": new,
            }
            out.tensors[PREFIX + name] = new
        else:
            owner = name.rpartition(".")[0]
            out.tensors[f"{PREFIX}{below(owner, 'base_layer') if owner in places else owner}.{_OWN}"] = new


def _twins(out: Outgoing, name: str) -> Iterator[str]:
    """Yield the other names of a tied parameter."""
    owner, _, own = name.rpartition(".")
    for parameter in out.base.rows[owner].parameters:
        if parameter.name == own:
            yield from parameter.tied


def _saved(out: Outgoing) -> list[str]:
    """Return the FQNs of the modules that `modules_to_save` means."""
    names = (name for name, _ in out.base.model.named_modules(remove_duplicate=False))
    return saved_by(out.config.get("modules_to_save") or (), names)
