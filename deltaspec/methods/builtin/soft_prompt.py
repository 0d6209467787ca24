"""Prompt tuning: learned embeddings in front of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.methods.base import Tensors, Weights
from deltaspec.methods.declarations import Init, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.prompts import PromptMethod, PromptParams
from deltaspec.methods.shared.text import TextError, ids_of

if TYPE_CHECKING:
    from torch import Generator

TOKENS = 100
"""Number of learned embeddings where none is given."""


class SoftPromptParams(PromptParams):
    """Parameters of soft_prompt."""

    tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Number of learned embeddings; they take as many positions of the model's context. Left out: 100, or as many as
    the text has, for which the plan needs the tokenizer."""
    init: Literal["vocabulary", "text", "uniform"] = "vocabulary"
    """Start as rows of the embedding drawn at random, as those of a text (`text` and `tokenizer`, or `token_ids`), or
    uniform in [-0.5, 0.5]."""
    text: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """With `init: text`: the text to start from; its tokens, special ones included, are repeated or cut to `tokens`."""
    tokenizer: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Tokenizer of the text, for transformers' AutoTokenizer: a directory (relative to the current one) or an id on the
    hub. Read when the delta is made, not when it is restored."""
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """With `init: text`, in place of text and tokenizer: the ids of the tokens to start from."""

    @model_validator(mode="after")
    def _one_text(self) -> SoftPromptParams:
        if self.text is not None and self.token_ids:
            raise ValueError("text and token_ids say the same twice: give one of them")
        given = self.text is not None or bool(self.token_ids)
        if self.init != "text" and (given or self.tokenizer is not None):
            raise ValueError(f"text, tokenizer and token_ids are for init: text, and init is {self.init}")
        if self.init == "text" and not given:
            raise ValueError("init: text needs a text and its tokenizer, or token_ids")
        if (self.text is None) != (self.tokenizer is None):
            raise ValueError("text and tokenizer go together: the tokenizer makes tokens of the text")
        return self


class SoftPrompt(PromptMethod):
    """Prompt tuning."""

    name = "soft_prompt"
    summary = "learned embeddings in front of the input"
    paper = "The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv:2104.08691)"
    Params = SoftPromptParams
    promises = Promises(identity_at_start=False, weight=None, per_row=True)
    start = frozenset({"init", "text", "tokenizer", "token_ids"})
    default_roles = ("embed",)
    small = {"tokens": 2}
    foreign = {
        **dict.fromkeys(("num_virtual_tokens", "soft_token_num", "prompt_length"), "tokens"),
        "prompt_tuning_init": {"TEXT": "init: text", "SAMPLE_VOCAB": "init: vocabulary", "RANDOM": "init: uniform"},
        "prompt_tuning_init_text": "text",
        "tokenizer_name_or_path": "tokenizer",
        "tokenizer_kwargs": None,
    }

    def virtual_tokens(self, params: SoftPromptParams) -> int:
        """Return the number of rows; a plan's params always have one."""
        return params.tokens or TOKENS

    def settle(self, params: SoftPromptParams) -> SoftPromptParams | Refusal:
        """Put the number of tokens in, where it is left out."""
        if params.tokens is not None:
            return params
        if params.init != "text":
            return params.model_copy(update={"tokens": TOKENS})
        try:
            return params.model_copy(update={"tokens": len(_text_ids(params))})
        except TextError as error:
            return Refusal(error.reason, f"{error.suggestion}; with tokens: the plan needs no tokenizer")

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
        return (TensorSpec("prompt", (self.virtual_tokens(params), site.row.out_features), Init("normal", 1.0)),)

    def initialise(self, site: Site, params: SoftPromptParams, weights: Weights, generator: Generator) -> Tensors:
        """Start from rows of the vocabulary, as the embedding gives them (some scale their rows), or uniform.

        Raises DeltaSpecError (DS410) where the tokenizer cannot be used, or is another model's.
        """
        import torch

        table, tokens = weights["weight"], self.virtual_tokens(params)
        if params.init == "uniform":
            return {"prompt": torch.rand(tokens, table.shape[1], generator=generator) - 0.5}
        if params.init == "text":
            text = _vocabulary_ids(params, table.shape[0])
            ids = torch.tensor([text[i % len(text)] for i in range(tokens)])
        else:
            ids = torch.randint(0, table.shape[0], (tokens,), generator=generator)
        assert site.row.entrance is not None
        return {"prompt": table[ids] * site.row.entrance.scale}

    def rows(self, params: SoftPromptParams, t: Any) -> Any:
        """Return the prompt."""
        return t.prompt


def _text_ids(params: SoftPromptParams) -> Sequence[int]:
    if params.text is None or params.tokenizer is None:
        return params.token_ids
    return ids_of(params.text, params.tokenizer)


def _vocabulary_ids(params: SoftPromptParams, rows: int) -> Sequence[int]:
    """Return the ids of the text, all of them in a vocabulary of this size. Raises DeltaSpecError."""
    try:
        ids = _text_ids(params)
        if max(ids) >= rows:
            reason = f"the tokenizer {params.tokenizer!r} gives the id {max(ids)}, and the embedding has {rows:,} rows"
            raise TextError(reason, "name the tokenizer of this very model")
    except TextError as error:
        raise DeltaSpecError([Diagnostic("DS410", error.reason, suggestion=error.suggestion)]) from error
    return ids
