"""One step of training on tensors without values: what autograd keeps, what is alive at the fullest moment, FLOPs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from deltaspec.backbone.reserved import RESERVED
from deltaspec.backbone.storages import identity


@dataclass(frozen=True)
class Step:
    """What one forward and its backward took, in bytes, beside the model's own parameters and buffers."""

    kept: int
    """Bytes that autograd keeps from the forward for the backward, each storage once."""
    peak: int
    """Bytes alive at the fullest moment: what is kept, gradients, and what is in work."""
    forward_flops: int
    backward_flops: int
    places: Mapping[str, int]
    """Bytes kept by the module, by FQN, in whose forward they came up."""


def run_step(model: nn.Module, forward: Callable[[], Any]) -> Step:
    """Run a forward of a model and its backward, as training does, and count.

    Raises whatever the forward raises.
    """
    own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    stack: list[str] = [""]
    kept: dict[int, tuple[str, torch.UntypedStorage]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (key := _key(tensor)) not in own and key not in kept:
            kept[key] = stack[-1], tensor.untyped_storage()
        return tensor

    alive = _Alive(own)
    with alive:
        with _names(model, stack), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = _loss(forward())
        places = Counter[str]()
        for place, storage in kept.values():
            places[place] += storage.nbytes()
        kept.clear()  # the graph alone holds them, and lets go of them one by one
        done = alive.flops
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
    return Step(places.total(), alive.most, done, alive.flops - done, dict(places))


def _loss(output: Any) -> Tensor | None:
    """Return what a step goes backward from: the loss, or the sum of all numbers that depend on what is trained."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor) and found.requires_grad:
        return found.sum()
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    sums = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return sum(sums[1:], sums[0]) if sums else None


def _key(tensor: Tensor) -> int:
    return identity(tensor.untyped_storage())


@contextmanager
def _names(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep on the stack which modules are in their forward.

    The hooks are those of all modules: passes leave a module alone that has hooks of its own.
    """
    # What a delta keeps is kept by its site.
    names = {id(module): name for name, module in model.named_modules() if RESERVED not in name.split(".")}

    def entering(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            stack.append(names[id(module)])

    def leaving(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            stack.pop()

    with ExitStack() as handles:
        handles.callback(register_module_forward_pre_hook(entering).remove)
        handles.callback(register_module_forward_hook(leaving, always_call=True).remove)
        yield


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make, until they are let go of, and the operations.

    torch's FlopCounterMode does the latter, but what is computed again under it stays alive until it is collected.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.flops = 0
        self._known: dict[int, Any] = dict.fromkeys(own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = getattr(func, "overloadpacket", func)
        formula: Any = _FLOPS.get(kind) or flop_registry.get(kind)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = identity(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = gradient.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_FLOPS = {
    getattr(torch.ops.aten, _ON_CPU): _attention,
    getattr(torch.ops.aten, f"{_ON_CPU}_backward"): _attention_backward,
}
"""Attention on the CPU, which torch's counter does not know."""
