"""Prefix tuning: learned keys and values in front of those that a site attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.backbone.table import Row
from deltaspec.methods.base import Method, Tensors
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class PrefixParams(MethodParams):
    """Parameters of prefix."""

    tokens: Annotated[int, Field(ge=1, le=65536)] = 6
    """Number of learned keys and values at each site."""
    reparametrisation: Literal["none", "mlp"] = "none"
    """`mlp` computes keys and values from one prefix that all sites share: stabler training, and it folds away."""
    width: Annotated[int, Field(ge=1, le=65536)] = 512
    """Hidden width of the reparametrisation."""
    positions: Literal["none", "counted"] = "none"
    """`none`: they take no positions of the model's context, so that every token keeps its own. `counted`: they take
    the first positions, and the tokens those behind them, as with a key-value cache that was there before (PEFT)."""


class Prefix(Method):
    """Prefix tuning."""

    name = "prefix"
    summary = "learned keys and values in front of what attention sees"
    paper = "Prefix-Tuning: Optimizing Continuous Prompts for Generation (arXiv:2101.00190)"
    Params = PrefixParams
    promises = Promises(identity_at_start=False, weight=None, per_row=True)
    default_roles = ("attn", "cross_attn")
    descends = True
    attends = True
    strength = "attention"
    small = {"tokens": 2}
    foreign = {
        **dict.fromkeys(("prefix_token_num", "prefix_length"), "tokens"),
        "mid_dim": "width",
        "prefix_projection": {True: "reparametrisation: mlp", False: "reparametrisation: none"},
        "flat": {True: "reparametrisation: none", False: "reparametrisation: mlp"},
        **dict.fromkeys(("cross_prefix", "encoder_prefix")),
    }

    def roles(self, params: PrefixParams) -> tuple[str, ...]:
        """Leave out what attends to an encoder's output, where positions of tokens are counted."""
        return self.default_roles if params.positions == "none" else self.default_roles[:1]

    def counted_tokens(self, params: PrefixParams) -> int:
        """Return the number of tokens, where they take positions."""
        return params.tokens if params.positions == "counted" else 0

    def scales(self, params: PrefixParams) -> bool:
        """Act wholly or not at all where positions are counted: those of the tokens do not move in part."""
        return params.positions == "none"

    def descends_to(self, row: Row) -> bool:
        """Stand for the modules that call the attention function; a block may hold them further down."""
        return row.attends

    def refuse(self, site: Site, params: PrefixParams) -> Refusal | None:
        """Take the modules that call transformers' attention function."""
        way_out = "use soft_prompt, or lora on the projections"
        if site.parameter is not None:
            return Refusal(f"prefix works in an attention module, not on the parameter {site.parameter!r}", way_out)
        if not site.row.attends:
            return Refusal(
                f"{site.row.type} does not call transformers' attention function, so keys have no way into it",
                f"select attention modules (role: attn); where a model computes attention itself, {way_out}",
            )
        if site.attention is None:
            return Refusal(
                f"no forward pass reached the attention function of this {site.row.type}; it must be sdpa or eager",
                'call model.set_attn_implementation("sdpa"), pass example_inputs, or leave this module out',
            )
        if params.reparametrisation == "mlp" and site.in_width is None:
            return Refusal(f"the width of what enters this {site.row.type} is not known", "set reparametrisation: none")
        return None if params.positions == "none" else self._uncounted(site, params)

    def _uncounted(self, site: Site, params: PrefixParams) -> Refusal | None:
        """Say why no positions can be taken in front of the tokens that a site attends to."""
        told, way_out = site.row.positions, "set positions: none, or leave this module out"
        if told is None:
            reason = "no model of transformers that takes input_ids and attention_mask has this module in it"
            return Refusal(f"{reason}, so there are no positions to count", way_out)
        problem = told.problem
        if problem is None and "cross_attn" in site.row.roles:
            problem = "it attends to what an encoder gives"
        if problem is not None:
            return Refusal(f"positions: counted cannot be at this {site.row.type}: {problem}", way_out)
        if told.places is not None and params.tokens >= told.places:
            reason = f"{params.tokens:,} tokens leave no room in the {told.places:,} positions of this model"
            return Refusal(reason, "set fewer tokens, or positions: none")
        return None

    def agree(self, sites: Sequence[tuple[Site, PrefixParams]]) -> Refusal | None:
        """Ask for as many positions at all modules of one model; for all of them where they share a bias."""
        models: dict[str, dict[str, int]] = {}
        for site, params in sites:
            if (told := site.row.positions) is not None:
                models.setdefault(told.fqn, {})[site.row.fqn] = self.counted_tokens(params)
        for site, _ in sites:
            told = site.row.positions
            counts = {} if told is None else models[told.fqn]
            if told is None or not any(counts.values()):
                continue
            own = set(counts.values())
            lacking = set(told.together) - set(counts)
            if len(own) > 1 or lacking:
                where = f"{told.fqn or 'the model'} has one count of positions"
                reason = f"{where}, and its modules have {' and '.join(map(str, sorted(own)))} tokens in front"
                if lacking:
                    reason = f"{where}, in a bias that its modules share, and {', '.join(sorted(lacking))} takes none"
                return Refusal(reason, "give all modules of a model the same tokens, or set positions: none")
        return None

    def tensors(self, site: Site, params: PrefixParams) -> tuple[TensorSpec, ...]:
        """Declare K and V `[tokens, heads * width]`, or the shared prefix, its projection, and one layer to K and V."""
        assert site.attention is not None
        widths = {"key": site.attention.key_width, "value": site.attention.value_width}
        sizes = {name: site.attention.heads * width for name, width in widths.items()}
        if params.reparametrisation == "none":
            return tuple(TensorSpec(name, (params.tokens, size), Init("normal", 1.0)) for name, size in sizes.items())
        hidden, inner = site.in_width, params.width
        assert hidden is not None
        start = Init("kaiming_uniform", sqrt(5))
        # Sites of one width share these, as the paper's one MLP serves all layers.
        shared = f"prefix_{params.tokens}x{hidden}x{inner}"
        specs = [
            TensorSpec("prefix", (params.tokens, hidden), Init("normal", 1.0), key=shared),
            TensorSpec("down", (inner, hidden), start, key=f"{shared}.down"),
            TensorSpec("down_bias", (inner,), Init("zeros"), key=f"{shared}.down_bias"),
        ]
        for name, size in sizes.items():
            specs += [TensorSpec(f"{name}_up", (size, inner), start), TensorSpec(f"{name}_bias", (size,))]
        return tuple(specs)

    def attend(self, form: Form, params: PrefixParams, t: Any, q: Any, k: Any, v: Any, base: Callable[..., Any]) -> Any:
        """Attend to [K; k] and [V; v]."""
        import torch

        key, value = (self._in_front(own, of) for own, of in zip(self._rows(params, t), (k, v), strict=True))
        return base(q, torch.cat([key, k], dim=2), torch.cat([value, v], dim=2))

    def _rows(self, params: PrefixParams, t: Any) -> tuple[Tensor, Tensor]:
        import torch
        from torch.nn import functional as F

        if params.reparametrisation == "none":
            return t.key, t.value
        inner = torch.tanh(F.linear(t.prefix, t.down, t.down_bias))
        return F.linear(inner, t.key_up, t.key_bias), F.linear(inner, t.value_up, t.value_bias)

    @staticmethod
    def _in_front(rows: Tensor, of: Tensor) -> Tensor:
        """Shape `[tokens, heads * width]` rows like keys or values `[batch, heads, positions, width]`.

        They may be `[batch, tokens, heads * width]`, too.
        """
        heads = rows.to(of.dtype).reshape(*rows.shape[:-1], of.shape[1], of.shape[3]).transpose(-3, -2)
        return heads.expand(of.shape[0], *heads.shape[-3:])

    def simpler(self, params: PrefixParams) -> tuple[str, dict[str, Any]] | None:
        """Return the plain method: what is left without the reparametrisation."""
        plain = params.model_dump(include={"tokens", "positions"}, exclude_defaults=True)
        return None if params.reparametrisation == "none" else (self.name, {"tokens": params.tokens} | plain)

    def simplified(self, site: Site, params: PrefixParams, t: Any) -> Tensors:
        """Keep the keys and values that the reparametrisation gives."""
        key, value = self._rows(params, t)
        return {"key": key, "value": value}
