"""The fate of what leaves a module: whether anything that a model gives was computed from it, and with gradients.

The graph that autograd keeps of one forward tells. What it does not follow (indices, comparisons, values that Python
looks at, tensors that modules keep) counts as used, so a module is called idle only where nothing took up its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from deltaspec.backbone.random_state import random_state_kept

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, nn.Module)
_REGISTRIES = nn.Module().__dict__.keys() - {"_buffers"}
_MOST = 100_000
"""Objects that are looked through for tensors."""

METADATA = frozenset(
    "__get__ __set__ __len__ size dim numel stride element_size data_ptr is_contiguous is_floating_point".split()
)
"""Functions that look at a tensor's form, not at its values."""

Fate = Literal["used", "idle", "still"]
"""Fate of a module's output: something was computed from it; nothing was; the module gives it no gradients."""


def followed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], around: AbstractContextManager[Any] | None = None
) -> tuple[Any, dict[str, Fate]]:
    """Run a copy of a model, whose parameters all get gradients, inside `around`.

    Returns (its output, what became of modules' outputs, by name); modules that are not named are used as usual.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad = True
    flow = _Flow()
    handles = [module.register_forward_hook(flow.leave) for module in model.modules()]
    try:
        with (
            around or nullcontext(),
            # A model whose methods carry `torch.compile` is run as it is written. It acts from when it is made.
            torch.compiler.set_stance("force_eager"),
            random_state_kept(model.parameters()),
            torch.enable_grad(),
            flow,
        ):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    kept = [{n: v for n, v in m.__dict__.items() if n not in _REGISTRIES} for m in model.modules()]
    found = flow.fates([output, kept])
    named = model.named_modules(remove_duplicate=False)
    return output, {fqn: found[id(module)] for fqn, module in named if id(module) in found}


class _Flow(TorchFunctionMode):
    """Follows one forward of a model, in which gradients are kept."""

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[int, list[Any]] = {}
        """Nodes of autograd's graph that gave what left each module, by the module's identity."""
        self._untold: set[int] = set()
        """Modules whose output autograd did not follow."""
        self._still: dict[int, bool] = {}
        """Whether all that left a module with parameters was without gradients."""
        self._used: list[Any] = []
        """Nodes whose values something took that autograd does not follow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            return result
        results = list(tree_iter(result))
        tensors = [value for value in results if isinstance(value, Tensor)]
        looks = getattr(func, "__name__", "") in METADATA
        followed = all(tensor.requires_grad for tensor in tensors)
        if not (followed and (looks or len(tensors) == len(results) > 0)):
            given = tree_iter((args, kwargs or {}))
            self._used += [v.grad_fn for v in given if isinstance(v, Tensor) and v.grad_fn is not None]
        return result

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note what leaves a module: a forward hook."""
        tensors, complete = _tensors(output)
        nodes = [tensor.grad_fn for tensor in tensors]
        if not complete or not nodes or None in nodes:
            self._untold.add(id(module))
        # Where the caller keeps none, as a reversible layer does, it may run the module once more for its backward.
        learns = any(p is not None and p.requires_grad for p in module._parameters.values()) and torch.is_grad_enabled()
        if tensors and learns:
            still = all(tensor.is_floating_point() and not tensor.requires_grad for tensor in tensors)
            self._still[id(module)] = still and self._still.get(id(module), True)
        # Writing into a view puts another node in the place of its own one.
        bases = [tensor._base.grad_fn for tensor in tensors if tensor._base is not None]
        self._left.setdefault(id(module), []).extend((*nodes, *bases))

    def fates(self, given: Any) -> dict[int, Fate]:
        """Return what became of modules' outputs, by identity of the modules; the others' are used in what is given."""
        tensors, complete = _tensors(given)
        waiting = [*self._used, *(tensor.grad_fn for tensor in tensors)]
        if not complete or all(node is None for node in waiting):
            return {}
        seen = set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions]
        found: dict[int, Fate] = {key: "still" for key, still in self._still.items() if still}
        idle = (key for key, nodes in self._left.items() if key not in self._untold and seen.isdisjoint(nodes))
        return found | dict.fromkeys(idle, "idle")


def _tensors(value: Any) -> tuple[list[Tensor], bool]:
    """Return the tensors in a value, through containers and the attributes of objects; and whether these are all."""
    found: list[Tensor] = []
    waiting: list[Any] = [value]
    known: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif not isinstance(value, _PLAIN) and id(value) not in known:
            known[id(value)] = value
            if len(known) > _MOST:
                return found, False
            if isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list | tuple | set | frozenset):
                waiting += value
            else:
                slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
                waiting += [*getattr(value, "__dict__", {}).values(), *(getattr(value, n, None) for n in slots)]
    return found, True
