"""Prompt tuning: learned embeddings in front of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from deltaspec.methods._base import Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods._prompts import PromptMethod

if TYPE_CHECKING:
    from torch import Generator, Tensor


class SoftPromptParams(MethodParams):
    """Parameters of soft_prompt."""

    tokens: Annotated[int, Field(ge=1, le=65536)] = 100
    """Number of learned embeddings; they take as many positions of the model's context."""
    init: Literal["vocabulary", "text", "uniform"] = "vocabulary"
    """Start as rows of the embedding drawn at random, as the rows of `token_ids`, or uniform in [-0.5, 0.5]."""
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """With `init: text`: ids of the tokens to start from, repeated or cut to the number of tokens."""

    @model_validator(mode="after")
    def _text_and_ids(self) -> SoftPromptParams:
        if (self.init == "text") != bool(self.token_ids):
            raise ValueError("init: text and token_ids go together (the tokenizer gives the ids of a text)")
        return self


class SoftPrompt(PromptMethod):
    """Prompt tuning."""

    name = "soft_prompt"
    summary = "learned embeddings in front of the input"
    paper = "The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv:2104.08691)"
    Params = SoftPromptParams
    promises = Promises(identity_at_start=False, weight=None, per_row=False)
    default_roles = ("embed",)

    def refuse(self, site: Site, params: SoftPromptParams) -> Refusal | None:
        """Also refuse ids that the vocabulary does not have."""
        refusal = super().refuse(site, params)
        vocabulary = site.row.in_features or 0
        if refusal is None and params.token_ids and max(params.token_ids) >= vocabulary:
            reason = f"token id {max(params.token_ids)} is not in this embedding of {vocabulary:,} rows"
            return Refusal(reason, "give the ids of this model's own tokenizer")
        return refusal

    def tensors(self, site: Site, params: SoftPromptParams) -> tuple[TensorSpec, ...]:
        """Declare the prompt, `[tokens, width]`."""
        assert site.row.out_features is not None
        return (TensorSpec("prompt", (params.tokens, site.row.out_features), Init("normal", 1.0)),)

    def initialise(
        self, site: Site, params: SoftPromptParams, weights: Mapping[str, Tensor], generator: Generator
    ) -> Mapping[str, Tensor]:
        """Start from rows of the vocabulary, as the embedding gives them (some scale their rows), or uniform."""
        import torch

        table = weights["weight"]
        if params.init == "uniform":
            return {"prompt": torch.rand(params.tokens, table.shape[1], generator=generator) - 0.5}
        if params.init == "text":
            ids = torch.tensor([params.token_ids[i % len(params.token_ids)] for i in range(params.tokens)])
        else:
            ids = torch.randint(0, table.shape[0], (params.tokens,), generator=generator)
        assert site.row.entrance is not None
        return {"prompt": table[ids] * site.row.entrance.scale}

    def rows(self, params: SoftPromptParams, t: Any) -> Any:
        """Give the prompt."""
        return t.prompt
