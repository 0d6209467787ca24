"""Discrete Fourier adaptation: W + scale · the inverse 2-d transform of a spectrum at a few fixed random places."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.precision import single
from deltaspec.methods.shared.weights import fold_update, refuse_weight, weight_shape

if TYPE_CHECKING:
    from torch import Generator, Tensor


class FourierftParams(MethodParams):
    """Parameters of fourierft."""

    frequencies: Annotated[int, Field(ge=1, le=1 << 24)] = 1000
    """Number of trained spectral coefficients a site, at most as many as its weight has entries."""
    scale: Annotated[float, Field(gt=0, le=1e9)] = 150.0
    """Factor in front of the update; 100 to 300 in the paper."""
    frequency_seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 777
    """Seed of the choice of frequencies: sites of one shape share them."""
    init: Literal["normal", "zeros"] = "normal"
    """How coefficients start: `normal` as in the paper, so that a fresh delta changes the output a little; `zeros` for
    one that changes nothing."""


class Fourierft(Method):
    """FourierFT."""

    name = "fourierft"
    summary = "a few trained coefficients of the Fourier spectrum of a weight's update"
    paper = "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (arXiv:2405.03003)"
    Params = FourierftParams
    promises = Promises(identity_at_start=False, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"frequencies": 20}
    foreign = {
        "n_frequency": "frequencies",
        "random_loc_seed": "frequency_seed",
        "init_weights": {True: "init: zeros", False: "init: normal"},
    }

    def refuse(self, site: Site, params: FourierftParams) -> Refusal | None:
        """Take linear layers."""
        if refusal := refuse_weight(site, "fourierft", ("linear", "conv1d")):
            return refusal
        out_width, in_width = weight_shape(site)
        if params.frequencies > out_width * in_width:
            return Refusal(
                f"a weight of {out_width} × {in_width} has no {params.frequencies} frequencies",
                f"use frequencies: {out_width * in_width} or less, in overrides for this site",
            )
        return None

    def tensors(self, site: Site, params: FourierftParams) -> tuple[TensorSpec, ...]:
        """Declare the coefficients `[n]` and their places in the flat spectrum, frozen, shared by sites of a shape."""
        out_width, in_width = weight_shape(site)
        count, seed = params.frequencies, params.frequency_seed
        start = Init("normal", 1.0) if params.init == "normal" else Init("zeros")
        key = f"shared.frequencies.{out_width}x{in_width}.{count}.{seed}"
        return (
            TensorSpec("coefficients", (count,), start),
            TensorSpec("frequencies", (count,), buffer=True, dtype="int64", key=key),
        )

    def initialise(self, site: Site, params: FourierftParams, weights: Weights, generator: Generator) -> Tensors:
        """Choose the frequencies: a function of their seed and the weight's shape alone."""
        import torch

        out_width, in_width = weight_shape(site)
        seeded = torch.Generator().manual_seed(params.frequency_seed)
        return {"frequencies": torch.randperm(out_width * in_width, generator=seeded)[: params.frequencies].clone()}

    def apply(self, form: Form, params: FourierftParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + ΔW x."""
        from torch.nn import functional as F

        y = base(x)
        return y + F.linear(x, t.call(_update, t.coefficients, t.frequencies, y.shape[-1], x.shape[-1], params.scale))

    def fold(self, site: Site, params: FourierftParams, t: Any, weights: Weights) -> Tensors:
        """Add ΔW to the weight."""
        out_width, in_width = weight_shape(site)
        return fold_update(site, weights, _update(t.coefficients, t.frequencies, out_width, in_width, params.scale))


def _update(coefficients: Tensor, frequencies: Tensor, out_width: int, in_width: int, scale: float) -> Tensor:
    import torch

    wide = single(coefficients)
    spectrum = wide.new_zeros(out_width * in_width).index_put((frequencies,), wide)
    update: Tensor = torch.fft.ifft2(spectrum.reshape(out_width, in_width)).real
    return (update * scale).to(coefficients.dtype)
