"""Circular convolution adaptation: W + blocks of circulant matrices, one trained kernel each, applied by an FFT."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.precision import single
from deltaspec.methods.shared.weights import fold_update, refuse_weight, weight_shape

if TYPE_CHECKING:
    from torch import Generator, Tensor


class C3aParams(MethodParams):
    """Parameters of c3a."""

    block_size: Annotated[int, Field(ge=1, le=65536)] = 256
    """Width of the circulant blocks; it must divide the widths of input and output. Larger blocks, fewer values."""
    init: Literal["xavier_uniform", "kaiming_uniform", "normal", "zeros"] = "xavier_uniform"
    """How kernels start. Only with `zeros` does a fresh delta change nothing."""


class C3a(Method):
    """C3A."""

    name = "c3a"
    summary = "circulant blocks added to a weight: high rank from few values"
    paper = "Parameter-Efficient Fine-Tuning via Circular Convolution (arXiv:2407.19342)"
    Params = C3aParams
    promises = Promises(identity_at_start=False, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"block_size": 2}
    foreign = {
        "init_weights": {True: "init: zeros", "gaussian": "init: normal", "xavier_uniform": "init: xavier_uniform"}
    }

    def refuse(self, site: Site, params: C3aParams) -> Refusal | None:
        """Take linear layers whose widths the blocks fill."""
        if refusal := refuse_weight(site, "c3a", ("linear", "conv1d")):
            return refusal
        out_width, in_width = weight_shape(site)
        common = gcd(out_width, in_width)
        if common % params.block_size:
            return Refusal(
                f"block_size {params.block_size} does not divide the widths {in_width} (in) and {out_width} (out)",
                f"use block_size: {_nearest_divisor(common, params.block_size)}, in overrides for this site",
            )
        return None

    def tensors(self, site: Site, params: C3aParams) -> tuple[TensorSpec, ...]:
        """Declare the kernels, `[out / block, in / block, block]`."""
        size = params.block_size
        out_width, in_width = weight_shape(site)
        return (TensorSpec("kernels", (out_width // size, in_width // size, size), Init("normal", 1.0)),)

    def initialise(self, site: Site, params: C3aParams, weights: Weights, generator: Generator) -> Tensors:
        """Draw kernels as `init` says, by the widths of the whole weight."""
        import torch

        if params.init == "normal":
            return {}
        (spec,) = self.tensors(site, params)
        if params.init == "zeros":
            return {"kernels": torch.zeros(spec.shape)}
        out_width, in_width = weight_shape(site)
        bound = sqrt(6 / (in_width + out_width)) if params.init == "xavier_uniform" else sqrt(1 / in_width)
        return {"kernels": torch.empty(spec.shape).uniform_(-bound, bound, generator=generator)}

    def apply(self, form: Form, params: C3aParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + convolutions(x) / in."""
        return base(x) + t.call(_convolve, x, t.kernels)

    def fold(self, site: Site, params: C3aParams, t: Any, weights: Weights) -> Tensors:
        """Add the circulant blocks to the weight."""
        import torch

        _, in_width = weight_shape(site)
        unit = torch.eye(in_width, dtype=t.kernels.dtype, device=t.kernels.device)
        return fold_update(site, weights, _convolve(unit, t.kernels).t())


def _convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """Multiply x, `[…, in]`, with the circulant blocks; divided by `in`, as in the reference implementation."""
    import torch

    if not x.numel():  # which a transform does not take
        unit = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return x @ _convolve(unit, kernels)
    pieces = single(x).reshape(*x.shape[:-1], kernels.shape[1], kernels.shape[2])
    spectrum = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(pieces), torch.fft.fft(single(kernels)))
    convolved: Tensor = torch.fft.fft(spectrum).real
    return (convolved.flatten(-2) / x.shape[-1]).to(x.dtype)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
