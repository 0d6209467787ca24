"""The tensors of a delta at their initial values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaspec.backbone.offload import device_of, value_of
from deltaspec.backbone.weight_forms import packed_weight, values_of
from deltaspec.deltas.defaults import usual_defaults
from deltaspec.deltas.modules import Delta, attribute_name, storage_key
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import Init, Site, TensorSpec
from deltaspec.methods.matrices import initial_values
from deltaspec.methods.registry import methods
from deltaspec.planning.planned import PlannedDelta


def build_delta(planned: PlannedDelta, seed: int, backbone: nn.Module, *, drawn: bool = True) -> Delta:
    """Make a delta's tensors at their initial values, on the device of the sites' own weights.

    The values are a function of (seed, delta name, site, tensor) alone: neither the order of the deltas, nor the
    device, nor the global random state matters, and none is advanced. `drawn=False` leaves out what depends on weights
    or a text, for a delta that gets its values from a file.
    """
    delta = Delta(planned.name)
    fallback = _first_held(backbone)
    method = methods()[planned.method]
    generator = torch.Generator()  # one for all, seeded anew for each
    for planned_site in planned.sites:
        site, params = planned_site.site, planned_site.params
        weights = _Weights(backbone, site)
        home = weights.home() or _first_held(weights.module) or fallback
        given: Mapping[str, Tensor] = {}
        if drawn and type(method).initialise is not Method.initialise and not weights.are_meta():
            _reseeded(generator, f"{seed}\0{planned.name}\0{site.fqn}")
            with usual_defaults():
                given = initial_values(method, site, params, weights, generator)
        for spec in planned_site.tensors:
            key = storage_key(site.row.fqn, spec)
            name = attribute_name(key)
            if name in delta._parameters or name in delta._buffers:
                continue
            value = _initial(spec, f"{seed}\0{planned.name}\0{key}", generator, backbone, home)
            if spec.name in given:
                value = given[spec.name].to(value).contiguous()  # as it is read from a file: kernels round by that
            if spec.buffer:
                delta._buffers[name] = value
            else:
                delta._parameters[name] = nn.Parameter(value)
    delta.train(backbone.training)
    delta.own()
    return delta


def _first_held(module: nn.Module) -> Home | None:
    """Return the place of the first parameter, or else the first buffer, at or below a module."""
    for below in module.modules():
        if (name := next((n for n, p in below._parameters.items() if p is not None), None)) is not None:
            return Home.of(below, name)
    found = next(module.buffers(), None)
    return None if found is None else Home(found.device, found.dtype)


def _owner(backbone: nn.Module, fqn: str) -> tuple[Any, str]:
    """Return the module that holds a parameter or buffer, and its own name. Raises KeyError."""
    *path, name = fqn.split(".")
    module: Any = backbone
    for part in path:
        module = module._modules[part]
    return module, name


def _tensor(backbone: nn.Module, fqn: str) -> Tensor:
    """Return a parameter or buffer by its name. Raises KeyError."""
    module, name = _owner(backbone, fqn)
    found: Tensor | None = module._parameters.get(name)
    return module._buffers[name] if found is None else found


class Home(NamedTuple):
    """The place and kind of the numbers of a site."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Home:
        """Return those of a parameter, where it is in a forward."""
        parameter = module._parameters[name]
        assert parameter is not None
        return cls(device_of(module, name, parameter), parameter.dtype)


class _Weights(Mapping[str, Tensor]):
    """A host's own parameters in float32 or finer on the CPU, each brought there when it is asked for: most are not.

    Codes give the values that they stand for, and what is computed is computed anew.
    """

    def __init__(self, backbone: nn.Module, site: Site) -> None:
        self.module = backbone.get_submodule(site.row.fqn)
        self._own = {parameter.name: parameter.fqn.rpartition(".")[2] for parameter in site.row.parameters}
        self._own |= {name: name for name in (*site.row.computed, *site.row.parametrised) if name not in self._own}

    def home(self) -> Home | None:
        """Return the device and dtype by which the site's own go; None where it has no parameter."""
        held = (name for name in self._own.values() if self.module._parameters.get(name) is not None)
        if (name := next(held, None)) is not None:
            return Home.of(self.module, name)
        packed = packed_weight(self.module)
        return None if packed is None else Home(packed[1].device, packed[1].dtype)

    def are_meta(self) -> bool:
        """Return whether a parameter has no values."""
        own = (value_of(self.module, name, p) for name, p in self.module._parameters.items() if p is not None)
        return any(value.is_meta for value in own)

    def __getitem__(self, name: str) -> Tensor:
        own = values_of(self.module, self._own[name]).detach()
        return own.to("cpu", torch.float64 if own.dtype == torch.float64 else torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def seeded(identity: str) -> torch.Generator:
    """Return a generator on the CPU, seeded by a text."""
    return _reseeded(torch.Generator(), identity)


def _reseeded(generator: torch.Generator, identity: str) -> torch.Generator:
    digest = hashlib.sha256(identity.encode()).digest()
    return generator.manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _initial(
    spec: TensorSpec, identity: str, generator: torch.Generator, backbone: nn.Module, home: Home | None
) -> Tensor:
    """Make one tensor. Drawn in float32 on the CPU, whatever the target, so that every machine draws the same."""
    if spec.init.kind == "copy":
        assert spec.init.source is not None
        held, (module, name) = _tensor(backbone, spec.init.source), _owner(backbone, spec.init.source)
        source, place = value_of(module, name, held).detach(), device_of(module, name, held)
        if spec.init.rows is None:
            dtype = _dtype(spec, Home(place, source.dtype)) if source.is_floating_point() else source.dtype
            return source.to(place, dtype, copy=True)
        return source[list(spec.init.rows)].to(place, _dtype(spec, home))
    device = torch.device("cpu") if home is None else home.device
    dtype = _dtype(spec, home)
    if device.type == "meta" or spec.init.kind == "zeros":
        return torch.zeros(spec.shape, device=device, dtype=dtype)
    if spec.init.kind in ("ones", "constant"):
        return torch.full(spec.shape, 1.0 if spec.init.kind == "ones" else spec.init.value, device=device, dtype=dtype)
    _reseeded(generator, identity)
    if spec.stack:  # each by its own widths
        drawn = torch.stack([draw(spec.init, spec.shape[1:], generator) for _ in range(spec.stack)])
    else:
        drawn = draw(spec.init, spec.shape, generator)
    return drawn.to(device=device, dtype=dtype)


def draw(init: Init, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a random initial tensor, float32 on the CPU."""
    empty = torch.empty(shape, dtype=torch.float32, device="cpu")
    if init.kind == "normal":
        return empty.normal_(0.0, init.value, generator=generator)
    if init.kind == "xavier_uniform":
        bound = math.sqrt(6.0 / (shape[-2] + shape[-1]))
        return empty.uniform_(-bound, bound, generator=generator)
    # He et al. (arXiv:1502.01852) with fan-in: bound = gain * sqrt(3 / fan_in), gain = sqrt(2 / (1 + slope^2)).
    fan_in = math.prod(shape[1:]) or 1  # a layer of width zero has nothing to draw
    bound = math.sqrt(6.0 / ((1.0 + init.value**2) * fan_in))
    return empty.uniform_(-bound, bound, generator=generator)


def _dtype(spec: TensorSpec, home: Home | None) -> torch.dtype:
    if spec.dtype is not None:
        found: torch.dtype = getattr(torch, spec.dtype)
        return found
    if home is not None and home.dtype in (torch.float32, torch.float64):
        return home.dtype
    # Half precision and quantised backbones are trained through float32 deltas: updates below half precision's step
    # vanish.
    return torch.float32
