"""Forwards on meta tensors: what they show of a model's modules, in each of the ways to call it that are known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from deltaspec.backbone.attention import AttentionShape, record_shapes
from deltaspec.backbone.clone import clone, hollow
from deltaspec.backbone.flow import Fate, followed
from deltaspec.backbone.inputs import Call, call_arguments, dummy_inputs, moved_to, one_token, other_calls
from deltaspec.backbone.offload import unhook
from deltaspec.backbone.random_state import random_state_kept
from deltaspec.backbone.recorder import Observation, Recorder, common
from deltaspec.backbone.writes import OwnOnWrite, is_published
from deltaspec.names.paths import below, is_inside

_MOST_HOLLOW = 2_000_000_000
"""Parameters up to which a model without values is run on zeros: a few seconds on a CPU."""


def observe(model: nn.Module, example_inputs: Any = None) -> tuple[dict[str, Observation], str | None]:
    """Run the model once on meta tensors, in evaluation mode, on a copy of its structure.

    Returns (observation by FQN, None), or (static knowledge about torch's own modules, why nothing could be run). Where
    the forward looks at values, which meta tensors do not have, it is run once on the model's own weights instead, or
    on zeros where it has none. More runs tell which weights are read without a call in training mode, with labels and
    in a step after a cache, and one in which gradients are kept, which outputs are used; where one fails, nothing is
    known of that. Of published code, the first one is that in which gradients are kept. `example_inputs`: a mapping of
    keywords, a tuple or list of positional arguments, or one
    tensor; without them a transformers model is given its own dummy inputs. Nothing of the model is written; the global
    random state stays.
    """
    known = _static(model)
    if example_inputs is None:
        example_inputs = dummy_inputs(model)
        if example_inputs is None:
            return known, "no example inputs"
    failures = []
    bare = any(p.is_meta for p in model.parameters())
    for device in ("meta", "cpu" if bare else None):
        if device == "cpu" and sum(p.numel() for p in model.parameters()) > _MOST_HOLLOW:
            break
        try:
            seen, known_fates = _run(model, example_inputs, device)
        except Exception as error:
            # Whatever a stranger's forward raises: the plan then says that nothing could be observed.
            failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            for fqn, observation in known.items():
                found = seen.get(fqn, Observation(True))
                seen[fqn] = replace(found, called=False, host=observation.host, reads=None)
            for fqn, found in seen.items() if known_fates else ():
                if fate := known_fates.get(fqn if found.host is None else found.host):
                    seen[fqn] = replace(found, fate=fate)
            return seen, None
    return known, failures[-1]


def _static(model: nn.Module) -> dict[str, Observation]:
    """Find modules that torch's own classes read without calling, at least in evaluation mode."""
    found: dict[str, Observation] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for fqn, module in modules.items():
        if type(module).forward is nn.TransformerEncoderLayer.forward:
            # Its fast path reads every parameter below it in one kernel call.
            inside = [name for name in modules if is_inside(name, fqn) and name != fqn]
            found |= {name: Observation(False, host=fqn) for name in inside}
        elif isinstance(module, nn.MultiheadAttention) and fqn not in found:
            found[below(fqn, "out_proj")] = Observation(False, host=fqn)
        elif isinstance(module, nn.ParameterList | nn.ParameterDict):
            found[fqn] = Observation(False, host=fqn.rpartition(".")[0])
    return found


def _run(model: nn.Module, example_inputs: Any, device: str | None) -> tuple[dict[str, Observation], dict[str, Fate]]:
    """Return what forwards showed of modules, and the fates of what leaves them."""
    if device == "meta" and all(map(is_published, model.modules())):
        try:
            return _at_once(model, example_inputs, device)
        except Exception:  # gradients may be what its forward is not made for: one without them tells
            pass
    twin, args, kwargs = _prepared(model, example_inputs, device)
    shapes = record_shapes(twin)
    own = OwnOnWrite(list(twin.modules())) if device is None else nullcontext()
    with torch.no_grad(), random_state_kept(twin.parameters()), own:
        seen, output = _recorded(twin, args, kwargs)
        seen = _completed(model, twin, args, kwargs, output, seen, shapes)
    return seen, _fates(model, example_inputs, device)


def _at_once(model: nn.Module, example_inputs: Any, device: str) -> tuple[dict[str, Observation], dict[str, Fate]]:
    """Return both from one forward: with gradients and without, code that is published runs the same modules."""
    twin, args, kwargs = _prepared(model, example_inputs, device)
    shapes = record_shapes(twin)
    recorder = Recorder(twin)
    output, known = followed(twin, args, kwargs, recorder.recording())
    with torch.no_grad(), random_state_kept():
        return _completed(model, twin, args, kwargs, output, recorder.result(), shapes), known


def _completed(
    model: nn.Module,
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    seen: dict[str, Observation],
    shapes: dict[str, AttentionShape],
) -> dict[str, Observation]:
    """Return what was seen, with the shapes of attention and what other ways to call the model show."""
    seen = seen | {fqn: replace(seen[fqn], attention=shape) for fqn, shape in shapes.items()}
    for forms in _more_calls(model, twin, args, kwargs, output):
        others = _first_that_runs(twin, forms)
        seen = {fqn: _with(found, others.get(fqn, found)) for fqn, found in seen.items()}
    return seen


def _more_calls(
    model: nn.Module, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Iterator[list[Call]]:
    """Yield the other ways to call a model that may show something: those of transformers read no weight of a layer
    but in steps of a convolution's state.
    """
    if not all(map(is_published, model.modules())):
        yield from other_calls(twin, args, kwargs, output)
    elif any(isinstance(module, _ConvNd) for module in model.modules()):
        yield [(False, *step) for step in one_token(args, kwargs, output)]


def _first_that_runs(twin: nn.Module, forms: list[Call]) -> dict[str, Observation]:
    for training, args, kwargs in forms:
        for module in twin.modules():
            module.training = training
        try:
            return _recorded(twin, args, kwargs)[0]
        except Exception:  # whatever a stranger's forward raises: this way of calling it stays unknown
            continue
    return {}


def _recorded(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Observation], Any]:
    recorder = Recorder(twin)
    with recorder.recording():
        output = twin(*args, **kwargs)
    return recorder.result(), output


def _with(found: Observation, other: Observation) -> Observation:
    """Return what was seen of a module, with what another way of calling the model showed of it."""
    bypass = next((one.host for one in (found, other) if not one.called and one.host is not None), None)
    if bypass is not None and (found.called or other.called):
        found = replace(found, bypass=bypass)
    if not found.called and other.called:
        found = replace(other, host=found.host, reads=None, bypass=found.bypass)
    hosts = [host for host in (found.host, other.host) if host is not None]
    if not hosts:
        return found
    reads = None if found.called else tuple(sorted({*(found.reads or ()), *(other.reads or ())}))
    return replace(found, host=common(hosts), reads=reads)


def _fates(model: nn.Module, example_inputs: Any, device: str | None) -> dict[str, Fate]:
    """Return the modules, by name, whose output the model uses in no way, or without gradients."""
    twin, args, kwargs = _prepared(model, example_inputs, device)
    try:
        return followed(twin, args, kwargs)[1]
    except Exception:  # a stranger's forward may not be made for gradients
        return {}


def _prepared(
    model: nn.Module, example_inputs: Any, device: str | None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a copy of the model that can be run, and its arguments."""
    twin = hollow(model) if device == "cpu" else clone(model, device=device)
    if device is not None:
        unhook(twin)
    for module in twin.modules():
        module.training = False
    choose_experts: Any = getattr(twin, "set_experts_implementation", None)
    if device == "meta" and choose_experts is not None:
        choose_experts("batched_mm")  # the others look at values, or are for half precision only
    return twin, *call_arguments(example_inputs if device is None else moved_to(example_inputs, device))
