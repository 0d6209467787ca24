"""The module table: every module and parameter of a model as plain data (real or meta weights alike)."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from deltaspec.backbone.attention import is_routable
from deltaspec.backbone.entrances import entrances, part_of
from deltaspec.backbone.faithful import is_faithful
from deltaspec.backbone.forwards import arguments_of, foreign_forward
from deltaspec.backbone.positions import positions
from deltaspec.backbone.table import ConvInfo, Entrance, ModuleTable, Packed, ParameterInfo, Positions, Row
from deltaspec.backbone.walk import Node, model_type_of, own, subtree_sizes, walk
from deltaspec.backbone.weight_forms import packed_form, packed_weight, shape_of_values, unpacked_class
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.names.paths import below

_NORM_CLASSES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_WIDTHS = {
    "linear": ("in_features", "out_features"), "conv1d": ("nx", "nf"), "embedding": ("num_embeddings", "embedding_dim"),
    "conv": ("in_channels", "out_channels"),
}  # fmt: skip
"""Names under which modules of a kind hold their widths."""
_IN_OUT = frozenset({"Llama4TextExperts"})
"""Classes whose stacked parameters are `[experts, in, out]` though nothing on them says so."""
_NORM_NAME = re.compile(r".*Norm(\dd)?")


def tabulate(model: nn.Module) -> ModuleTable:
    """Describe every module of a model once, with real or meta weights; nothing is run or changed.

    Raises DeltaSpecError for lazy modules, which have no shapes before their first forward, and for scripted or traced
    ones (torch.jit), whose forward cannot be changed.
    """
    nodes, model_types, maps = walk(model)
    if scripted := [node.fqn for node in nodes if isinstance(node.module, torch.jit.ScriptModule)]:
        message = f"{scripted[0] or 'the model'} is a torch.jit.ScriptModule, whose forward cannot be changed"
        raise DeltaSpecError([Diagnostic("DS311", message, "<model>", suggestion="give the module it was made of")])
    holders: dict[int, list[str]] = {}
    for node in nodes:
        for name, parameter in own(node.module._parameters):
            holders.setdefault(id(parameter), []).append(below(node.fqn, name))
    sizes = subtree_sizes(nodes, holders)
    classes: dict[type, tuple[tuple[str, ...], str]] = {}
    vocabulary = part_of(model, "get_input_embeddings")
    named = [(node.fqn, node.module) for node in nodes]
    doors, told = entrances(named), positions(named)
    rows = tuple(
        [
            _row(n, holders, sizes, classes, n.module is vocabulary, doors.get(id(n.module)), told.get(id(n.module)))
            for n in nodes
        ]
    )
    root_type = model_type_of(getattr(model, "config", None)) or (model_types[0] if len(model_types) == 1 else None)
    return ModuleTable(
        rows,
        class_of(model).__name__,
        class_of(model).__module__,
        root_type,
        rows[0].subtree_parameters,
        tuple(sorted(maps)),
    )


def _row(
    node: Node,
    holders: dict[int, list[str]],
    sizes: dict[int, int],
    classes: dict[type, tuple[tuple[str, ...], str]],
    vocabulary: bool,
    entrance: Entrance | None,
    told: Positions | None,
) -> Row:
    module, kind_of = node.module, class_of(node.module)
    if kind_of not in classes:
        classes[kind_of] = _bases(kind_of), _kind(kind_of)
    bases, kind = classes[kind_of]
    parameters: tuple[ParameterInfo, ...] = ()
    buffers: tuple[ParameterInfo, ...] = ()
    if module._parameters:
        parameters = tuple([_info(name, node.fqn, p, holders[id(p)]) for name, p in own(module._parameters)])
    packed = packed_weight(module)
    if packed is not None:  # scales and the like are part of the codes
        parameters = (_packed(node.fqn, module, *packed, holders), *(p for p in parameters if p.name == "bias"))
        kind = "linear" if kind == "other" and isinstance(module.__dict__.get("in_features"), int) else kind
    if module._buffers:
        transient = module._non_persistent_buffers_set
        buffers = tuple([_info(name, node.fqn, b, []) for name, b in own(module._buffers) if name not in transient])
    if kind == "norm?":
        one = any(p.name == "weight" and len(p.shape) == 1 for p in (*parameters, *buffers))
        kind = "norm" if one else "other"
    attributes = vars(module).items() if module._forward_pre_hooks else ()
    known = kind in ("linear", "conv1d", "norm")
    faithful = not known or is_faithful(module, kind)
    wide: Any = module
    into, out = (getattr(module, name) for name in _WIDTHS[kind]) if kind in _WIDTHS else (None, None)
    return Row(
        fqn=node.fqn,
        type=kind_of.__name__,
        bases=bases,
        kind=kind,
        roles=node.roles,
        stack=node.stack,
        layer=node.layer,
        parameters=parameters,
        buffers=buffers,
        subtree_parameters=sizes[id(module)],
        children=len(module._modules),
        in_features=into,
        out_features=out,
        conv=ConvInfo(wide.groups, isinstance(module, _ConvTransposeNd)) if kind == "conv" else None,
        aliases=tuple(node.aliases),
        attends="config" in module.__dict__ and is_routable(module),
        entrance=entrance,
        positions=told,
        computed=tuple(name for name, value in attributes if isinstance(value, Tensor)),
        arguments=_arguments(kind_of.forward),
        transposed=not _IN_OUT.isdisjoint(bases)
        or (module.__dict__.get("is_transposed") or getattr(kind_of, "is_transposed", None)) is True,
        parts=None if node.map is None or out is None else node.map.parts_of(node.roles, node.config, out),
        faithful=faithful,
        fixed=not (known and faithful) and foreign_forward(module) is not None,
        vocabulary=vocabulary,
        parametrised=tuple(getattr(module._modules.get("parametrizations"), "_modules", ())),
        unpacked=None if packed is None else unpacked_class(module).__name__,
    )


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class; that which it had before FSDP2 put one of its own in front."""
    kind = type(module)
    return kind.__mro__[2] if len(kind.__mro__) > 2 and kind.__mro__[1].__name__ == "FSDPModule" else kind


@cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in arguments_of(forward) if p.kind not in stars)


def _kind(kind: type) -> str:
    # Conv1D without importing transformers: a model can hold one only where it is loaded.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    for name, classes in (("linear", nn.Linear), ("conv1d", conv1d), ("embedding", nn.Embedding), ("conv", _ConvNd)):
        if issubclass(kind, classes):
            return name
    if issubclass(kind, _NORM_CLASSES):
        return "norm"
    return "norm?" if any(_NORM_NAME.fullmatch(base) for base in _bases(kind)) else "other"


def _packed(fqn: str, module: nn.Module, form: Packed, codes: Tensor, holders: dict[int, list[str]]) -> ParameterInfo:
    """Describe the weight that codes stand for."""
    info = _info("weight", fqn, codes, holders.get(id(codes), []))
    return replace(info, shape=shape_of_values(module, form, codes), packed=form)


def _bases(kind: type) -> tuple[str, ...]:
    return tuple(base.__name__ for base in kind.__mro__ if base not in (nn.Module, object))


def _info(name: str, fqn: str, tensor: torch.Tensor, holders: list[str]) -> ParameterInfo:
    place = below(fqn, name)
    if is_lazy(tensor):
        message = f"{place} is lazy: it has no shape before the first forward"
        raise DeltaSpecError([Diagnostic("DS310", message, "<model>", suggestion="run the model once on real inputs")])
    tied = tuple(other for other in holders if other != place) if len(holders) > 1 else ()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return ParameterInfo(name, place, tuple(tensor.shape), dtype, tied, packed_form(tensor))
