"""The demo's model: a pretrained sentence encoder and one linear head a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltaspec.backbone.random_state import seeded_on_cpu
from deltaspec.demo import data

HEADS: Mapping[str, int] = {"tweets": 2, "topics": len(data.TOPICS)}
MAX_TOKENS = 64


class SentenceClassifier(nn.Module):
    """Mean-pooled sentence embeddings, and a linear head for each task on top of them."""

    main_input_name = "input_ids"  # as in transformers: lets the plan try one forward by itself

    def __init__(self, encoder: PreTrainedModel, heads: Mapping[str, int]) -> None:
        super().__init__()
        self.config = encoder.config  # deltaspec takes the role map by config.model_type
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.config.hidden_size, n) for name, n in heads.items()})

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Average the last hidden states over each text's own tokens: `[batch, hidden]`."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = present.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Compute every head's logits `[batch, classes]`, by task."""
        embedding = self.embed(input_ids, attention_mask)
        return {name: head(embedding) for name, head in self.heads.items()}


def build() -> SentenceClassifier:
    """Load the pretrained encoder and put fresh heads on it: the untouched backbone, the same one each time."""
    encoder = AutoModel.from_pretrained(data.weights_dir())
    with seeded_on_cpu(0):
        return SentenceClassifier(encoder, HEADS).eval()


def tokenizer() -> PreTrainedTokenizerBase:
    """Load the encoder's tokenizer."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(data.weights_dir())
    return loaded


def encode(tokens: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenise a batch: `input_ids` and `attention_mask`, `[batch, tokens]`, padded to the longest text."""
    batch = tokens(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
