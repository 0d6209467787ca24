"""The verbs of PEFT, and of its integration in transformers: what does here what they do there."""

from __future__ import annotations

from collections.abc import Mapping

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

ADAPTERS: Mapping[str, str] = {
    "add_adapter": "a delta is named in a spec, c.add(spec) adds it",
    "load_adapter": "deltaspec.restore(model, dir) reads saved deltas, c.library(dir) names many of them",
    "set_adapter": "c.only(name) attaches exactly one delta, c.attach(name) one more",
    "enable_adapters": "c.attach() attaches all deltas",
    "disable_adapters": "c.detach() detaches all deltas, `with c.detached():` for a while",
    "active_adapters": "c.attached are the names of the attached deltas",
    "get_adapter_state_dict": "c.deltas[name].state_dict() are the tensors of a delta",
    "delete_adapter": "c.remove(name) takes a delta out for good, c.detach(name) out of the forward",
    "enable_peft_hotswap": "c.only(name) switches between deltas without recompilation of what was compiled for them",
    "print_trainable_parameters": "print(c.plan) shows and counts what is trained",
    "merge_and_unload": "c.merge() is a new plain model with the attached deltas in its weights",
    "unload": "the model that was compiled is as it was; c.detach() detaches all deltas",
    "get_base_model": "c.backbone is the model with the deltas, `with c.detached():` without",
    "disable_adapter": "`with c.detached():` detaches all deltas for a while",
}
"""Verbs of PEFT, and of its integration in transformers: what does it here."""


class AdapterVerbError(DeltaSpecError, AttributeError):
    """A verb of PEFT, which a compiled model does not have."""


def adapter_verb(name: str) -> AdapterVerbError:
    """Return the error that says what stands for a verb of PEFT."""
    message = f"a compiled model has no {name}: its deltas are no layers of PEFT"
    return AdapterVerbError([Diagnostic("DS475", message, "<model>", suggestion=ADAPTERS[name])])
