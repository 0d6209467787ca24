"""The head that AdapterHub saves beside an adapter: the model's own, or a flexible one."""

from __future__ import annotations

from deltaspec.formats.adapterhub.adapter import Adapter, names_of
from deltaspec.names.folding import shown

CONFIG = "head_config.json"
WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")


def read_head(adapter: Adapter) -> None:
    """Add the model's own head in full, where the file's differs from it; refuse others."""
    if not (adapter.folder / CONFIG).exists():
        return
    config = adapter.json(CONFIG)
    own, file, adapter.weights = adapter.weights, adapter.file, {}
    adapter.load(WEIGHTS)
    head, head_file = adapter.weights, adapter.file
    adapter.weights, adapter.file = own, file
    flexible = config.get("config")
    if flexible is not None:
        kind = flexible.get("head_type") if isinstance(flexible, dict) else flexible
        here = adapter.base.table.model_class
        message = f"has a flexible head ({kind}) of {names_of(config)}, and {here} has no place for it"
        hint = f"take {CONFIG} and {head_file} out of the directory to read the adapter without its head"
        adapter.find("DS549", message, hint, head_file)
        return
    keys = adapter.owned(head)
    if lost := [key for key in head if key not in keys]:
        kind = adapter.base.table.model_class
        message = f"has a head of {names_of(config)}, and this {kind} has no {shown(lost)}"
        hint = f"load {names_of(config)}; or take {CONFIG} and {head_file} out of the directory"
        adapter.find("DS523", message, hint, head_file)
        return
    adapter.weights, adapter.file = head, head_file
    adapter.in_full("head", list(head))
    adapter.weights, adapter.file = own, file
