"""A walk over a model: its modules, the names each is found under, their roles and the repeated layers they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaspec.backbone.weight_forms import sizes as sizes_of
from deltaspec.names.paths import below
from deltaspec.roles.maps import RoleMap, role_map

# A module shared at n levels has exponentially many names; nobody asks for the rest.
_MOST_NAMES = 1024
_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(slots=True)
class Node:
    """One module and its place."""

    fqn: str
    module: nn.Module
    roles: tuple[str, ...]
    stack: str | None
    """FQN of the outermost container of repeated layers it lies in."""
    layer: int | None
    aliases: list[str]
    map: RoleMap | None
    """The role map that named its roles."""
    config: object
    """The config of the architecture it is part of."""


def walk(model: nn.Module) -> tuple[list[Node], list[str], set[str]]:
    """Visit every module under every name, in `named_modules` order; a second name becomes an alias."""
    nodes: dict[int, Node] = {}
    model_types: list[str] = []
    maps: set[str] = set()
    above: set[int] = set()

    def visit(
        fqn: str,
        module: nn.Module,
        model_type: str | None,
        roles: RoleMap | None,
        config: object,
        stack: str | None,
        layer: int | None,
    ) -> None:
        if id(module) in above:  # a module that holds its own parent
            return
        own_type = model_type_of(module.__dict__["config"]) if "config" in module.__dict__ else None
        if own_type is not None and own_type != model_type:  # part of a composite has roles of its own
            model_type, roles, config = own_type, role_map(own_type), module.__dict__["config"]
            if own_type not in model_types:
                model_types.append(own_type)
            if roles is not None:
                maps.add(roles.model_type)
        node = nodes.get(id(module))
        if node is None:
            named = roles.roles_of(fqn) if roles is not None and fqn else ()
            if named and isinstance(module, nn.Identity):  # stands where a layer has nothing
                named = ()
            nodes[id(module)] = Node(fqn, module, named, stack, layer, [], roles, config)
        elif len(node.aliases) < _MOST_NAMES:
            node.aliases.append(fqn)
        else:
            return
        above.add(id(module))
        layered = stack is None and _is_stack(module, fqn, roles)
        for index, (name, child) in enumerate(own(module._modules)):
            place = (fqn, index) if layered else (stack, layer)
            visit(below(fqn, name), child, model_type, roles, config, *place)
        above.remove(id(module))

    root = getattr(model, "config", None)
    root_type = model_type_of(root)
    visit("", model, None, None if root_type is None else role_map(root_type), root, None, None)
    return list(nodes.values()), model_types, maps


def _is_stack(module: nn.Module, fqn: str, roles: RoleMap | None) -> bool:
    """Return whether a module holds the repeated layers: those with role `block`, else any list of like modules."""
    if not isinstance(module, _LISTS) or not len(module):
        return False
    if roles is not None and "block" in roles.patterns:
        return any("block" in roles.roles_of(below(fqn, name)) for name in module._modules)
    if len(module) == 1:  # a model of one layer, but not a wrapper around the real list
        return type(module) is nn.ModuleList and not any(_alike(m) for m in module.modules())
    return _alike(module)


def _alike(module: nn.Module) -> bool:
    if not isinstance(module, _LISTS) or len(module) < 2:
        return False
    first, *others = (type(child) for child in module)
    if all(kind is first for kind in others):
        return True
    # Hybrid stacks (attention and state-space layers in turn) share a base class of their own.
    bases = [base for base in first.__mro__ if base.__module__ != nn.Module.__module__ and issubclass(base, nn.Module)]
    return isinstance(module, nn.ModuleList) and any(
        all(issubclass(kind, base) for kind in others) for base in bases if not base.__module__.startswith("torch.nn.")
    )


def named(model: nn.Module, but: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `model.named_modules(remove_duplicate=False)` does, but for one module and what is in it."""
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        children = [(below(name, own_name), child) for own_name, child in own(module._modules)]
        waiting += [child for child in reversed(children) if child[0] != but]


def own(members: Any) -> list[tuple[str, Any]]:
    """Return the entries of a module's own registry (`_modules`, `_parameters`, `_buffers`) that are set."""
    return [entry for entry in members.items() if entry[1] is not None] if members else []


def model_type_of(config: object) -> str | None:
    """Return `config.model_type` of a transformers model; None for anything else."""
    found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return found if isinstance(found, str) and found else None


def subtree_sizes(nodes: list[Node], holders: dict[int, list[str]]) -> dict[int, int]:
    """Return, by the identity of a module, the number of values in all parameters at and below it, tied ones once.

    Codes count as the values that they stand for.
    """
    if sum(len(own(node.module._modules)) for node in nodes) >= len(nodes):  # a module stands in two places
        parts: dict[int, dict[int, int]] = {}
        _parts(nodes[0].module, parts)
        return {module: sum(found.values()) for module, found in parts.items()}
    sizes: dict[int, int] = {}
    tied: dict[int, dict[int, int]] = {}
    for node in reversed(nodes):  # children before their parents
        module, size, shared = node.module, 0, dict[int, int]()
        for parameter, count in sizes_of(module):
            if len(holders.get(id(parameter), ())) > 1:
                shared[id(parameter)] = count
            else:
                size += count
        for _, child in own(module._modules):
            size += sizes[id(child)] - sum(tied.get(id(child), {}).values())
            shared |= tied.get(id(child), {})
        sizes[id(module)] = size + sum(shared.values())
        if shared:
            tied[id(module)] = shared
    return sizes


def _parts(module: nn.Module, parts: dict[int, dict[int, int]]) -> dict[int, int]:
    """Fill in, for each module, the sizes of all parameters at and below it by identity."""
    if id(module) not in parts:
        found = parts[id(module)] = {id(parameter): count for parameter, count in sizes_of(module)}
        for _, child in own(module._modules):
            found.update(_parts(child, parts))
    return parts[id(module)]
