"""P-tuning of PEFT: embeddings in front of the input, of which it saves what its encoder made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.peft.prompts import add_soft_prompt

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

_ENCODER = ("encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
"""Options of the encoder, which is not in the file."""


def read(adapter: Adapter) -> None:
    """Add the delta of a p-tuning adapter: its prompt as it is without the encoder that it was trained by."""
    adapter.ignore(*_ENCODER)
    adapter.options.word("encoder_reparameterization_type", "MLP", ("MLP", "LSTM"))
    add_soft_prompt(adapter)
    adapter.remark("it is a soft_prompt here: PEFT saves the embeddings that p-tuning's encoder gave, not the encoder")
