"""Batches put together: padding, masks, what does not fit; outputs cut apart."""

from collections import namedtuple

import pytest
import torch
from tiny_models import bert, gpt2, t5
from torch import nn

import deltaspec
from deltaspec.training.mixing import Signature, mixed, parts

NAMES = ("one", "two")


def tokens(rows, length, **more):
    return {"input_ids": torch.ones(rows, length, dtype=torch.long), **more}


def test_rows_are_filled_up_behind_a_mask():
    signature = Signature.of(bert(), {})
    first = tokens(2, 3, labels=torch.full((2, 3), 7), id="a")
    second = tokens(1, 5, labels=torch.full((1, 5), 8), id="b")
    batch = mixed(signature, NAMES, [first, second])
    assert batch.sizes == (2, 1) and batch.kwargs.keys() == {"input_ids", "attention_mask"} and batch.args == ()
    assert batch.kwargs["input_ids"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    assert batch.kwargs["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    one, two = batch.targets({"logits": torch.zeros(3, 5, 9)})
    assert one["labels"].tolist() == [[7, 7, 7, -100, -100]] * 2 and two["id"] == "b"
    one, _ = batch.targets({"logits": torch.zeros(3, 3)})  # of classes, as many as its tokens by chance
    assert one["labels"].tolist() == [[7, 7, 7]] * 2
    same = mixed(signature, NAMES, [tokens(2, 3), tokens(1, 3)])
    assert same.kwargs.keys() == {"input_ids"}  # as each alone
    pairs = [tokens(1, n, attention_mask=torch.zeros(1, 1, n, n)) for n in (2, 3)]
    with pytest.raises(deltaspec.DeltaSpecError, match="DS383.*'attention_mask' have different shapes"):
        mixed(signature, NAMES, pairs)  # a 0 may mean yes there, or no
    own = tokens(1, 3, attention_mask=torch.tensor([[1, 1, 0]]))
    assert mixed(signature, NAMES, [own, tokens(1, 3)]).kwargs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_labels_go_to_a_model_that_makes_a_decoders_input_of_them():
    batches = [tokens(1, 2, labels=torch.full((1, n), 3)) for n in (2, 4)]
    batch = mixed(Signature.of(t5(), {}), NAMES, batches)
    assert batch.kwargs["labels"].tolist() == [[3, 3, -100, -100], [3, 3, 3, 3]]
    assert torch.equal(batch.targets({})[0]["labels"], batch.kwargs["labels"][:1])
    given = [{**one, "decoder_input_ids": torch.ones_like(one["labels"])} for one in batches]
    batch = mixed(Signature.of(t5(), {}), NAMES, given)
    one, two = batch.targets({"logits": torch.zeros(2, 4, 9)})
    assert one["labels"].tolist() == [[3, 3, -100, -100]] and two["labels"].tolist() == [[3] * 4]
    assert "labels" not in mixed(Signature.of(gpt2(), {}), NAMES, batches).kwargs


class Images(nn.Module):
    def forward(self, image, scale=1.0, extra=None):
        return image * scale


def test_what_does_not_fit_is_told_at_once():
    signature = Signature.of(Images(), {})
    image = torch.zeros(2, 3)
    assert mixed(signature, NAMES, [{"image": image}] * 2).kwargs["image"].shape == (4, 3)
    assert mixed(signature, NAMES, [(image, 1), [image, 2]]).targets(image) == (1, 2)
    assert len(mixed(signature, ["one"], [((image, image), 1)]).args) == 2
    padded = Signature.of(Images(), {"image": -1})
    both = mixed(padded, NAMES, [{"image": image}, {"image": torch.zeros(1, 4)}]).kwargs["image"]
    assert both.tolist() == [[0, 0, 0, -1]] * 2 + [[0] * 4]
    for batches, message in (
        ([{"image": image}, {"image": torch.zeros(2, 4)}], r"different shapes: \[3\] \(one\), \[4\] \(two\)"),
        ([{"image": image}, {"image": image, "extra": image}], "'two' have 'extra', those of 'one' do not"),
        ([{"image": image, "scale": 1.0}, {"image": image, "scale": 2.0}], "'scale' differs among jobs"),
        ([{"image": image, "extra": torch.zeros(3, 1)}, {"image": image}], "inputs of 2 and 3 rows"),
        ([{"picture": image}, {"image": image}], "batch of the job 'one' has no rows"),
    ):
        with pytest.raises(deltaspec.DeltaSpecError, match=f"DS383.*{message}"):
            mixed(signature, NAMES, batches)


def test_outputs_are_cut_by_rows():
    pair = namedtuple("pair", "a b")
    outputs = {"x": torch.arange(5), "loss": torch.tensor(1.0), "more": pair(torch.ones(5, 2), [torch.zeros(3)])}
    one, two = parts(outputs, (2, 3))
    assert one["x"].tolist() == [0, 1] and two["x"].tolist() == [2, 3, 4] and one["loss"] is None
    assert two["more"].a.shape == (3, 2) and two["more"].b == [None]
    whole = bert().eval()(input_ids=torch.ones(3, 4, dtype=torch.long))
    assert type(parts(whole, (1, 2))[1]) is type(whole) and parts(whole, (1, 2))[1].logits.shape == (2, 4, 48)
