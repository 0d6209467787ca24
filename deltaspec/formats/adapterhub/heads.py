"""The head that AdapterHub saves beside an adapter: the model's own, or a flexible one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltaspec.formats.adapterhub.adapter import Adapter, names_of
from deltaspec.formats.adapterhub.flexible import LANGUAGE, REMARKS, Form, Head, forms_of, head_in
from deltaspec.formats.adapterhub.invertible import EMBEDDINGS, read_inverse
from deltaspec.formats.options import Options
from deltaspec.formats.unread import Unread
from deltaspec.names.folding import shown

CONFIG = "head_config.json"
WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
_DRAWN = "LABEL_"
"""Beginning of the names of labels that nobody named."""


def read_head(adapter: Adapter) -> None:
    """Add the head in full, where the file's differs from the model's; refuse one that the model has no place for."""
    if not (adapter.folder / CONFIG).exists():
        return
    config = adapter.json(CONFIG)
    own, file, adapter.weights = adapter.weights, adapter.file, {}
    adapter.load(WEIGHTS)
    flexible = config.get("config")
    if flexible is None:
        _static(adapter, config)
    elif isinstance(flexible, dict):
        _flexible(adapter, config, flexible)
    else:
        adapter.find("DS544", f"config: {flexible!r} is not a mapping", "save the adapter again", CONFIG)
    _same_labels(adapter, flexible if isinstance(flexible, dict) else config)
    left = adapter.weights
    adapter.weights, adapter.file = own | left, file


def class_of(unread: Unread, config: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Return the class of transformers that has a flexible head, and its number of labels, as far as one is known."""
    flexible, kind = config.get("config"), config.get("model_type")
    if not isinstance(flexible, dict) or not isinstance(kind, str):
        return None, None
    head = head_in(Options(unread, flexible, CONFIG))
    forms = forms_of(head, kind, head.activation)
    return (forms[0].kind, head.labels) if forms else (None, None)


def _static(adapter: Adapter, config: Mapping[str, Any]) -> None:
    keys = adapter.owned(adapter.weights)
    if lost := [key for key in adapter.weights if key not in keys]:
        kind = adapter.base.table.model_class
        message = f"has a head of {names_of(config)}, and this {kind} has no {shown(lost)}"
        adapter.find("DS523", message, f"load {names_of(config)}; or {_without(adapter)}", adapter.file)
        return
    adapter.in_full("head", keys)


def _flexible(adapter: Adapter, config: Mapping[str, Any], flexible: Mapping[str, Any]) -> None:
    """Add a flexible head to the layers of the model's own head that compute the same."""
    head = head_in(Options(adapter, flexible, CONFIG))
    if adapter.findings:
        return
    here, kind = adapter.base.table.model_class, adapter.base.table.model_type
    forms = forms_of(head, kind, getattr(adapter.base.config, "hidden_act", None))
    form = next((form for form in forms if form.kind == here), None)
    whose = f"has a flexible head ({head}) of {names_of(config)}"
    if not forms:
        message = f"{whose}, and no class of transformers for {kind} has one of the same function"
        adapter.find("DS549", message, f"{_without(adapter)} to read the adapter without its head", adapter.file)
    elif form is None:
        message = f"{whose}, and this {here} has none of the same function"
        classes = " or ".join(dict.fromkeys(form.kind for form in forms))
        many = f" with num_labels={head.labels}" if head.labels is not None else ""
        adapter.find("DS523", message, f"load {classes}{many}; or {_without(adapter)}", adapter.file)
    else:
        _replace(adapter, head, form, str(config.get("name")))
        _remark(adapter, head, form)


def _replace(adapter: Adapter, head: Head, form: Form, name: str) -> None:
    """Put the layers of a flexible head in place of the model's own."""
    places: dict[str, tuple[str, str]] = {}
    for layer, fqn in zip(head.keys(name), form.places, strict=True):
        row = adapter.base.rows[fqn]
        for own in (parameter.name for parameter in row.parameters):
            key = f"{layer}.{own}"
            places[key] = row.fqn, own
            weight = adapter.weights.get(f"{layer}.weight")
            if own == "bias" and not head.bias and layer == head.keys(name)[-1] and weight is not None:
                adapter.weights[key] = torch.zeros(row.shape_of(own), dtype=weight.dtype)
            elif key not in adapter.weights:
                adapter.find("DS543", f"has no {key}", "the file was cut: save the adapter again", adapter.file)
    if head.labels is not None and (row := adapter.base.rows[form.places[-1]]).shape_of("weight")[0] != head.labels:
        message = f"its head has {head.labels} labels, and this {form.kind} has {row.shape_of('weight')[0]}"
        adapter.find("DS526", message, f"load it with num_labels={head.labels}", adapter.file)
    if more := [key for key in adapter.weights if key not in places]:
        message = f"holds {shown(more)}, which the head of {form.kind} has no place for"
        adapter.find("DS549", message, f"{_without(adapter)} to read the adapter without its head", adapter.file)
    if form.zero is not None:
        _refuse_more(adapter, form.zero, form.kind)
    if adapter.findings:
        return
    adapter.in_full("head", places)
    if head.kind in LANGUAGE and any(domain == EMBEDDINGS for domain in adapter.domains.values()):
        read_inverse(adapter, form.inverse, form.kind)


def _refuse_more(adapter: Adapter, buffer: str, kind: str) -> None:
    """Refuse a model whose head adds something that AdapterHub's has not."""
    value = adapter.base.tensor(buffer)
    if value.is_meta:
        message = f"has a flexible head without the {buffer} of {kind}, whose values are not here"
        adapter.find("DS542", message, "load the base model with its weights", adapter.file)
    elif value.any():
        message = f"has a flexible head without a bias, and this {kind} adds its {buffer}"
        adapter.find("DS549", message, f"{_without(adapter)} to read the adapter without its head", adapter.file)


def _remark(adapter: Adapter, head: Head, form: Form) -> None:
    if form.remark is not None:
        adapter.remark(REMARKS[form.remark])
    if head.kind not in LANGUAGE:
        adapter.remark(
            f"its head is that of {form.kind}: in further training the dropouts there are those of that class, where "
            "AdapterHub has one in front of each layer"
        )


def _same_labels(adapter: Adapter, saved: Mapping[str, Any]) -> None:
    """Compare the names of labels with the model's: two orders of the same are a finding, missing ones a remark."""
    given, here = saved.get("label2id"), getattr(adapter.base.config, "label2id", None)
    if not isinstance(given, dict) or not isinstance(here, dict) or given == here or adapter.findings:
        return
    if all(str(label).startswith(_DRAWN) for label in given):
        return
    names = {number: label for label, number in given.items()}
    if len(given) == len(here) and all(str(label).startswith(_DRAWN) for label in here):
        adapter.remark(f"its head has names of labels, which the model has not: set config.id2label to {names}")
        return
    message = f"label2id: its head has the labels {given}, and the base model {here}"
    adapter.find("DS587", message, f"load the base model with id2label={names}", CONFIG)


def _without(adapter: Adapter) -> str:
    return f"take {CONFIG} and {adapter.file} out of the directory"
