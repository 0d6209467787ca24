"""One forward on meta tensors: which modules a model calls, how wide their hidden states are, and whose weights it reads
without calling them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from deltaspec.clone import clone


@dataclass(frozen=True, slots=True)
class Observation:
    """What one forward showed of one module."""

    called: bool
    in_width: int | None = None
    """Last dimension of the hidden state that entered."""
    width: int | None = None
    """Last dimension of the hidden state that left."""
    host: str | None = None
    """FQN of the module whose forward read this one's parameters without calling it."""


@dataclass(slots=True)
class Observations:
    """What one forward showed of all modules, by FQN; and why there is nothing, if the forward could not run."""

    by_fqn: dict[str, Observation] = field(default_factory=dict)
    ran: bool = False
    reason: str | None = None

    def of(self, fqn: str) -> Observation | None:
        """Give what is known of a module; None where no forward ran."""
        return self.by_fqn.get(fqn)


class _Reads(TorchFunctionMode):
    """Notes which parameters functions take, and in whose forward."""

    def __init__(self, owners: dict[int, list[tuple[str, str]]], stack: list[str]) -> None:
        super().__init__()
        self.owners, self.stack = owners, stack
        self.readers: dict[str, set[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("__get__", "__set__", "size", "dim"):
            for value in tree_iter((args, kwargs or {})):
                if isinstance(value, nn.Parameter):
                    for owner, _ in self.owners.get(id(value), ()):
                        self.readers.setdefault(owner, set()).add(self.stack[-1] if self.stack else "")
        return func(*args, **(kwargs or {}))


def observe(model: nn.Module, example_inputs: Any = None) -> Observations:
    """Run the model once on meta tensors, in evaluation mode and without gradients, on a copy of its structure.

    `example_inputs` are what the model's forward takes: a mapping of keywords, a tuple or list of positional arguments, or one
    tensor; without them a transformers model is given its own dummy inputs. No weight is read, no buffer written, no random number
    drawn. Static knowledge about torch's own modules is in the result even where nothing could be run.
    """
    known = _static(model)
    if example_inputs is None:
        example_inputs = dummy_inputs(model)
        if example_inputs is None:
            return Observations(known, False, "no example inputs")
    try:
        seen = _run(model, example_inputs)
    except Exception as error:  # whatever a stranger's forward raises on meta tensors; the plan says that it could not look
        return Observations(known, False, f"{type(error).__name__}: {error}".splitlines()[0])
    for fqn, observation in known.items():
        found = seen.get(fqn)
        seen[fqn] = Observation(
            True, found.in_width if found else None, found.width if found else None, observation.host
        )
    return Observations(seen, True)


def _static(model: nn.Module) -> dict[str, Observation]:
    """Modules that torch's own classes read without calling, at least in evaluation mode."""
    found: dict[str, Observation] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for fqn, module in modules.items():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path reads every parameter below it in one kernel call.
            inside = [name for name in modules if name.startswith(fqn + "." if fqn else "") and name != fqn]
            found |= {name: Observation(True, host=fqn) for name in inside}
        elif isinstance(module, nn.MultiheadAttention) and fqn not in found:
            name = f"{fqn}.out_proj" if fqn else "out_proj"
            found[name] = Observation(True, host=fqn)
        elif isinstance(module, nn.ParameterList | nn.ParameterDict):
            found[fqn] = Observation(True, host=fqn.rpartition(".")[0])
    return found


def _run(model: nn.Module, example_inputs: Any) -> dict[str, Observation]:
    twin = clone(model, device="meta")
    for module in twin.modules():
        module.training = False
        module.__dict__.pop("forward", None)
    stack: list[str] = []
    seen: dict[str, Observation] = {}
    names = {id(module): fqn for fqn, module in reversed(list(twin.named_modules(remove_duplicate=False)))}
    owners: dict[int, list[tuple[str, str]]] = {}
    for fqn, module in twin.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((fqn, name))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fqn = names[id(module)]
        stack.append(fqn)
        width = _width(args[0] if args else next(iter(kwargs.values()), None))
        before = seen.get(fqn)
        seen[fqn] = Observation(True, before.in_width if before else width, before.width if before else None)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        fqn = stack.pop()
        seen[fqn] = Observation(True, seen[fqn].in_width, _width(output))

    for module in twin.modules():
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(leave, with_kwargs=True)
    args, kwargs = call_arguments(_to_meta(example_inputs))
    reads = _Reads(owners, stack)
    with torch.no_grad(), reads, _dynamo_off():
        twin(*args, **kwargs)
    result: dict[str, Observation] = {}
    for fqn, module in twin.named_modules(remove_duplicate=False):
        name = names[id(module)]
        found = seen.get(name, Observation(False))
        outside = {reader for reader in reads.readers.get(name, ()) if reader != name}
        tied_elsewhere = {o for p in module._parameters.values() if p is not None for o, _ in owners[id(p)]} - {name}
        outside -= tied_elsewhere
        if outside and not found.called:
            found = Observation(True, found.in_width, found.width, host=sorted(outside)[0])
        result[fqn] = found
    return result


@contextmanager
def _dynamo_off() -> Iterator[None]:
    """Keep a model whose methods carry `torch.compile` from being compiled on meta tensors."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _width(value: Any) -> int | None:
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    elif isinstance(value, tuple | list):
        value = value[0] if value else None
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point() else None


def _to_meta(inputs: Any) -> Any:
    return tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, inputs)


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments of the model's forward."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def dummy_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Give small inputs for a transformers model, by the names its forward takes; None for other models."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        return None
    names = set(inspect.signature(model.forward).parameters)
    ids = torch.zeros(1, 4, dtype=torch.long)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = ids
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in names and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        inputs["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width)
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else 100
        inputs["input_features"] = torch.zeros(1, config.num_mel_bins, frames)
    return inputs or None
