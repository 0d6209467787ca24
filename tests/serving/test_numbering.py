"""How a model numbers positions: those that are given, and a numbering of its own, which is refused."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from prompt_models import bert, build, gpt2, llama, opt, roberta
from prompt_rows import GENERATED, assert_as_alone, compiled, inputs
from transformers import GPT2Model

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.serving.numbering import Numbering, numbering_of


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2, opt, bert, roberta])
def test_positions_and_embeddings_given(make: Any) -> None:
    model = build(make)
    c = compiled(model)
    given = inputs(make, len(GENERATED), "left")
    given["position_ids"] = (given["attention_mask"].cumsum(1) + 4).clamp(max=40)
    assert_as_alone(c, given, GENERATED)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    assert_as_alone(c, given, GENERATED)


class Sparse(GPT2Model):
    """Numbers its positions by even numbers, unless it is told numbers."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        if position_ids is None:
            position_ids = torch.arange(0, 2 * input_ids.shape[1], 2)[None]
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)


@torch.no_grad()
def test_a_numbering_of_its_own_is_refused_where_it_matters() -> None:
    model = build(gpt2)
    model.transformer.__class__ = Sparse
    c, given = compiled(model, "soft", "lora"), inputs(gpt2, 2, "left")
    assert numbering_of(model.transformer, model.transformer.forward) is Numbering.UNKNOWN
    with pytest.raises(DeltaSpecError, match="DS447"):
        c(**given, use_cache=True, deltas=["soft", None])
    assert_as_alone(c, given | {"position_ids": torch.arange(7).expand(2, -1)}, ["soft", None])
