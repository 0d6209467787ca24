"""What the methods share that change a weight: the sites they take, and how a change of the weight reaches the output.

*Canonical* is the layout `[out, in]`: transformers' Conv1D stores the transpose, an Embedding stores `[rows, width]`,
whose canonical form is `[width, rows]`. A convolution's canonical layout is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.wording import counted
from deltaspec.methods.declarations import Form, Refusal, Site

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {"linear": "Linear", "conv1d": "Conv1D", "embedding": "Embedding", "conv": "Conv"}


def refuse_weight(
    site: Site, method: str, kinds: tuple[str, ...] = ("linear", "conv1d", "embedding", "conv"), dropout: float = 0.0
) -> Refusal | None:
    """Return why a method that changes the weight of these kinds of module cannot take a site; None where it can."""
    row = site.row
    if site.parameter is not None and site.stack is None:
        return refuse_parameter(site, method)
    if site.stack is not None and not site.is_read("weight"):
        return Refusal(
            f"no forward reads {site.fqn}, so a change of it would do nothing",
            "leave it out, or pass example_inputs that reach it",
        )
    if site.kind not in kinds:
        names = [_NAMES[kind] for kind in kinds]
        wanted = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
        article = "an" if wanted[0] in "AEIOU" else "a"
        return Refusal(
            f"{method} needs {article} {wanted} module, not {row.type}",
            _inside(site) if site.kind in ("other", "norm") else "leave this module out, or use method lora on it",
        )
    if row.conv is not None and row.conv.transposed:
        return Refusal(f"{method} has no form for the transposed convolution {row.type}", "use method full")
    if site.host is not None and dropout:
        return Refusal(
            f"{reader(site)} reads this weight by itself, so dropout on its input has no place",
            "set dropout: 0 for this site in overrides",
        )
    return None


def _inside(site: Site) -> str:
    """Suggest what to select in place of a module that is no layer: its own matrices, or the layers inside it."""
    matrices = [p.name for p in site.row.parameters if len(p.shape) in (2, 3) and min(p.shape[-2:]) > 1]
    if site.kind != "other" or not matrices:
        return "select the linear layers inside it, or use method adapter for a whole block"
    named = matrices[0] if len(matrices) == 1 else f"[{', '.join(matrices)}]"
    also = " (and the layers inside it by themselves)" if site.row.children else ""
    return f"select its own matrices: {{type: {site.row.type}, parameter: {named}}}{also}"


def reader(site: Site) -> str:
    """Return the name of the module whose forward reads the weight of a site in its own way."""
    return "its own forward" if site.host == site.row.fqn and site.stack is None else site.host or "the model"


def refuse_parameter(site: Site, method: str) -> Refusal:
    """Return why a single parameter cannot be taken."""
    assert site.parameter is not None
    shape = site.row.shape_of(site.parameter)
    if site.kind in ("conv", "norm") or len(shape) in (2, 3):
        return Refusal(
            f"{method} does not change the single parameter {site.parameter!r} of this {site.row.type}",
            "select the module (path:, role: or type:), or use method full for the parameter",
        )
    return Refusal(
        f"{method} changes matrices and stacks of them, and this parameter of a {site.row.type} has "
        f"{counted(len(shape), 'dimension')}: {list(shape)}",
        "use method full for it",
    )


def weight_shape(site: Site) -> tuple[int, ...]:
    """Return the canonical shape of a site's weight."""
    if site.kind == "conv":
        return site.row.shape_of("weight")
    assert site.row.in_features is not None and site.row.out_features is not None
    return site.row.out_features, site.row.in_features


def wasted_rank(site: Site, rank: int, groups: int = 1) -> str | None:
    """Tell of a rank above that of the weight: it costs parameters, and no update has more than the weight's.

    `groups`: an update falls into that many, whose ranks add up.
    """
    rows, *inner = weight_shape(site)
    most = groups * min(rows // groups, prod(inner))
    return f"rank {rank} is more than the {most} that this {site.row.type} can use" if rank > most else None


def canonical(kind: str, weight: Any) -> Any:
    """Turn a weight of a module of this kind from its own layout to the canonical one, or back."""
    return weight.t() if kind in ("conv1d", "embedding") else weight


def own_layout(kind: str, weight: Tensor) -> Tensor:
    """Turn a canonical weight to the layout of a module of this kind, in memory too: kernels round by that."""
    turned: Tensor = canonical(kind, weight)
    return turned.contiguous()


def add_update(form: Form, y: Any, x: Any, update: Any, base: Callable[..., Any]) -> Any:
    """Add to `y` what a canonical change of the weight makes of `x`; other kinds than linear layers substitute."""
    from torch.nn import functional as F

    if form.kind == "conv":
        return y + base(x, weight=update, bias=None)
    if form.kind == "embedding":
        return y + base(x, weight=update.t())
    return y + F.linear(x, update)


def substitutes_update(site: Site) -> bool:
    """Return whether `add_update` runs the host's own code on the update at this site."""
    return site.kind in ("conv", "embedding")


def fold_update(site: Site, weights: Mapping[str, Tensor], update: Tensor) -> dict[str, Tensor]:
    """Add a canonical change to the weight, in the host's own layout."""
    return {"weight": weights["weight"] + canonical(site.kind, update)}


def host_bias(form: Form, base: Callable[..., Any], like: Any) -> Any:
    """Return a linear host's own bias as `[1, out]` (zeros where it has none); `like` is any `[out]` vector.

    The host is run on one zero of width one: its weight then adds nothing, at no cost.
    """
    zeros = like.detach().mul(0).reshape(1, -1)
    return base(zeros[:, :1], weight=zeros if form.kind == "conv1d" else zeros.t())


def without_bias(form: Form, base: Callable[..., Any], x: Any, like: Any) -> Any:
    """Return a linear host's output on `x` without its bias; `like` is any `[out]` vector."""
    # Conv1D's addmm needs a bias to add.
    return base(x, bias=like.detach().mul(0) if form.kind == "conv1d" else None)


def scale_outputs(weight: Tensor, scale: Tensor, site: Site) -> Tensor:
    """Scale a weight, in the host's own layout, by `[out]` so that every output is scaled."""
    if site.kind in ("conv1d", "embedding", "norm"):  # a LayerNorm's may have more dimensions than the last
        return weight * scale
    return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))


def shift_outputs(weights: Mapping[str, Tensor], shift: Tensor, site: Site) -> Tensor:
    """Return the bias that adds `[out]` to what leaves a module, which may have no bias yet."""
    if "bias" in weights:
        return weights["bias"] + shift
    return shift.expand_as(weights["weight"]) if site.kind == "norm" and "weight" in weights else shift


def scale_inputs(weight: Tensor, scale: Tensor, site: Site) -> Tensor:
    """Scale a weight, in the host's own layout, by `[in]` so that every input is scaled."""
    if site.kind == "conv1d":
        return weight * scale[:, None]
    if site.kind == "linear":
        return weight * scale
    # A group of a convolution sees its own slice of the input channels.
    out_channels, in_per_group, *kernel = weight.shape
    groups = site.row.conv_groups
    per_group = scale.reshape(groups, 1, in_per_group, *(1 for _ in kernel))
    return (weight.reshape(groups, out_channels // groups, in_per_group, *kernel) * per_group).reshape(weight.shape)
