"""Trained embeddings of some tokens: rows of the embedding table, or of a head, tied to it or not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from deltaspec.backbone.table import Row
from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Init, MethodParams, Promises, Refusal, Site, TensorSpec


class TrainableTokensParams(MethodParams):
    """Parameters of trainable_tokens."""

    token_ids: tuple[Annotated[int, Field(ge=0, le=1 << 31)], ...] = Field(min_length=1, max_length=1 << 16)
    """Ids of the tokens whose embeddings are trained; each once."""
    tied: Literal["together", "alone"] = "together"
    """Where the table is tied to another place (a head): train the rows for all places, or `alone` for this one."""

    @field_validator("token_ids")
    @classmethod
    def _distinct(cls, ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"token id {twice} is there twice")
        return ids


class TrainableTokens(Method):
    """Training of some rows of an embedding table."""

    name = "trainable_tokens"
    summary = "trained embeddings of some tokens, tied heads included"
    paper = "plain fine-tuning, of some rows of the embedding table"
    Params = TrainableTokensParams
    promises = Promises(identity_at_start=True, weight="replace", per_row=True)
    example = {"token_ids": (0, 1)}
    strength = "weight"
    default_roles = ("embed",)
    small = {"token_ids": [4, 15, 26, 39]}
    foreign = {"token_indices": "token_ids"}

    def is_default(self, row: Row, params: TrainableTokensParams) -> bool:
        """Take the table of input embeddings, and not those of positions and segments."""
        return row.vocabulary

    def refuse(self, site: Site, params: TrainableTokensParams) -> Refusal | None:
        """Take embedding tables, heads, and linear layers that share their weight with a table."""
        if site.parameter not in (None, "weight"):
            return Refusal(f"trainable_tokens trains an embedding table, not {site.parameter!r}", "select the module")
        if site.kind in ("linear", "embedding") and not site.row.has_parameter("weight"):
            return Refusal(f"this {site.row.type} has no weight", "select the embedding table")
        if site.kind == "linear" and not self._weight(site).tied and "head" not in site.row.roles:
            return Refusal(
                f"the rows of this {site.row.type} are no embeddings: it is no head, and tied to no table",
                "select the embedding, or use method full",
            )
        if site.kind not in ("embedding", "linear"):
            return Refusal(f"trainable_tokens needs an embedding, not {site.row.type}", "select the embedding table")
        rows = self._weight(site).shape[0]
        if (most := max(params.token_ids)) >= rows:
            return Refusal(
                f"token id {most} is outside of the table of {rows} rows",
                "use ids that the table has, or resize the model's embeddings before compiling",
            )
        return None

    @staticmethod
    def _weight(site: Site) -> Any:
        return next(p for p in site.row.parameters if p.name == "weight")

    def tensors(self, site: Site, params: TrainableTokensParams) -> tuple[TensorSpec, ...]:
        """Declare the rows that stand in for the table's, `[tokens, width]`, from the table's values."""
        weight = self._weight(site)
        shared = min((weight.fqn, *weight.tied)) if weight.tied and params.tied == "together" else None
        start = Init("copy", source=weight.fqn, rows=params.token_ids)
        return (TensorSpec("weight", (len(params.token_ids), weight.shape[1]), start, key=shared),)

    def lowers(self, site: Site, params: TrainableTokensParams) -> bool:
        """Run the host's own code on the changed table: it may scale, and treat a padding id apart."""
        return True

    def fold(self, site: Site, params: TrainableTokensParams, t: Any, weights: Weights) -> Tensors:
        """Put the rows in place."""
        import torch

        table = weights["weight"]
        index = torch.tensor(params.token_ids, device=table.device)
        return {"weight": table.index_copy(0, index, t.weight.to(table.dtype))}
