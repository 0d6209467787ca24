"""The usual loss of a job: what the models compute themselves."""

import pytest
import torch
from tiny_models import BASIC, bert, gpt2, llama, t5
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training.losses import usual_loss

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
TOKENS = torch.tensor([[3, -100, 2, 1], [0, 2, -100, 1]])


def classifier(labels, problem=None):
    return BertForSequenceClassification(BertConfig(**BASIC, num_labels=labels, problem_type=problem))


@pytest.mark.parametrize(
    ("build", "labels"),
    [
        (bert, TOKENS), (gpt2, TOKENS), (llama, TOKENS), (t5, TOKENS),
        (lambda: BertForTokenClassification(BertConfig(**BASIC, num_labels=5)), TOKENS),
        (lambda: classifier(3), torch.tensor([2, 0])), (lambda: classifier(1), torch.tensor([0.5, 2.0])),
        (lambda: classifier(3), torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
        (lambda: classifier(2, "regression"), torch.tensor([[1.0, 0], [0, 3]])),
    ],
    ids=["masked", "causal", "llama", "t5", "tokens", "classes", "regression", "multi-label", "two values"],
)  # fmt: skip
def test_beside_the_models_own(build, labels):
    torch.manual_seed(0)
    model = build().eval()
    outputs = model(input_ids=IDS, labels=labels)
    loss = usual_loss(model)(outputs, {"labels": labels})
    assert loss.item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_models_without_one():
    assert usual_loss(nn.Linear(1, 1)) is None


def test_a_loss_of_routers_is_one_of_all_rows():
    model = bert()
    model.config.output_router_logits = True
    with pytest.raises(DeltaSpecError, match="DS384.*routers"):
        usual_loss(model)(model(input_ids=IDS), {"labels": TOKENS})
