"""What saved deltas depend on: the backbone but for what they replace, in whatever dtype, class and vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import packed_bases
import pytest
import torch
from encoders import HEAD, INPUTS, LORA, encoder, logits, notes, saved, trained
from packed_bases import UNREADABLE, Offered
from quantised_weights import quantised
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(*args, **options)
    assert caught.value.diagnostics[0].code == "DS523"
    return str(caught.value.diagnostics[0])


def test_a_head_that_is_drawn_anew_at_each_load(tmp_path):
    source = trained(encoder(BertForSequenceClassification, head=1), LORA, HEAD)
    wanted, folder = logits(source), saved(tmp_path, source)
    other = encoder(BertForSequenceClassification, head=2)
    assert not torch.equal(logits(other), logits(source.detach()))
    assert torch.equal(logits(deltaspec.restore(other, folder)), wanted)
    assert torch.equal(logits(trained(other, LORA, HEAD, number=5).load(folder)), wanted)
    library = trained(other, {"name": "own", "method": "bitfit", "attached": False})
    library.library(folder)
    with library.only("lora", "head"):
        assert torch.equal(logits(library), wanted)


def test_a_head_that_was_not_saved_is_named(tmp_path):
    folder = saved(tmp_path, trained(encoder(BertForSequenceClassification, head=1), LORA))
    said = refusal(encoder(BertForSequenceClassification, head=2), folder)
    assert "other weights: classifier.weight differs (1 of the 41 tensors" in said  # its bias starts at zero
    assert "method full" in said


def test_what_one_delta_replaces_another_may_work_on(tmp_path):
    before = {"name": "low", "method": "lora", "params": {"rank": 1}, "target": "classifier", "attached": False}
    after = before | {"name": "behind"}
    folder = saved(tmp_path, trained(encoder(BertForSequenceClassification, head=1), before, HEAD, after))
    other = encoder(BertForSequenceClassification, head=2)
    assert "low: was saved for a backbone" in refusal(other, folder)
    assert deltaspec.restore(other, folder, "head", "behind").attached == ("head",)


def test_new_rows_that_are_trained_are_no_part_of_it(tmp_path):
    def grown(seed: int) -> nn.Module:
        model = encoder(BertForMaskedLM)
        torch.manual_seed(seed)
        model.resize_token_embeddings(44, mean_resizing=False)
        return model

    tokens = {"name": "new", "method": "trainable_tokens", "target": "bert.embeddings.word_embeddings"}
    tokens["params"] = {"token_ids": [40, 41, 42, 43], "tied": "together"}
    source = trained(grown(1), LORA, tokens)
    folder = saved(tmp_path, source)
    assert torch.equal(logits(deltaspec.restore(grown(2), folder)), logits(source))
    assert "word_embeddings.weight" in refusal(grown(2), saved(tmp_path / "b", trained(grown(1), LORA)))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(torch.float16),
        lambda m: m.to(torch.bfloat16).float(),
        lambda m: m.to(torch.float16).to(torch.bfloat16),
        lambda m: m.double(),
    ],
    ids=["bfloat16", "float16", "through bfloat16", "through both", "float64"],
)
@pytest.mark.parametrize("back", [False, True])
def test_casts_of_the_same_weights_agree(tmp_path, cast, back):
    plain, other = encoder(), cast(encoder())
    before, now = (other, plain) if back else (plain, other)
    folder = saved(tmp_path, trained(before, LORA | {"dtype": "float32"}))
    assert "the weights are" in notes(deltaspec.restore(now, folder))
    with torch.no_grad():  # a step of bfloat16 is 1/128 at most: this is beyond it
        now.encoder.layer[1].output.dense.weight.mul_(1 + 1 / 32)
    assert "encoder.layer.1.output.dense.weight differs" in refusal(now, folder)


def test_a_small_change_of_the_same_type_is_seen(tmp_path):
    folder = saved(tmp_path, trained(encoder(), LORA))
    other = encoder()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(1 + 1e-6)
        other.pooler.dense.bias[3] += 1e-4
        other.embeddings.LayerNorm.weight[0] += 1e-3
    assert "LayerNorm.weight, encoder.layer.0.output.dense.weight, pooler.dense.bias differ (3 of" in refusal(
        other, folder
    )


@pytest.mark.parametrize(
    "before, now, target",
    [
        (BertModel, BertForSequenceClassification, None),
        (BertModel, BertForTokenClassification, "deep"),
        (BertForSequenceClassification, BertModel, {"path": "**.layer.*.attention.self.query"}),
        (BertForSequenceClassification, BertModel, "deep"),
        (BertForMaskedLM, BertForSequenceClassification, None),
        (BertForMaskedLM, lambda config: nn.Sequential(BertModel(config)), "deep"),
    ],
)
def test_the_same_encoder_in_another_class(tmp_path, before, now, target):
    if target == "deep":  # a name that means nothing elsewhere
        prefix = "" if before is BertModel else "bert."
        target = {"path": f"{prefix}encoder.layer.1.attention.self.value"}
    overrides = [{"match": {"layers": [1]}, "params": {"rank": 3}}]
    delta = LORA | {"overrides": overrides} | ({"target": target} if target else {})
    source = trained(encoder(before), delta)
    folder = saved(tmp_path / "a", source)
    model = encoder(now) if isinstance(now, type) else now(encoder().config)
    core = model[0] if isinstance(model, nn.Sequential) else getattr(model, "bert", model)
    core.load_state_dict(encoder().state_dict(), strict=False)
    core.eval()
    back = deltaspec.restore(model, folder)
    inside = back.backbone[0] if isinstance(model, nn.Sequential) else getattr(back.backbone, "bert", back.backbone)
    wanted = getattr(source.backbone, "bert", source.backbone)
    with torch.no_grad():
        assert torch.equal(inside(**INPUTS).last_hidden_state, wanted(**INPUTS).last_hidden_state)
    assert not torch.equal(core(**INPUTS).last_hidden_state, wanted(**INPUTS).last_hidden_state)
    same_names = before is not BertModel and isinstance(now, type) and now is not BertModel
    assert ("of the saved model is" in notes(back)) is not same_names
    back.save(tmp_path / "b")  # and what is saved there is of that class
    assert torch.equal(
        next(deltaspec.restore(model, tmp_path / "b").deltas["lora"].parameters()),
        next(back.deltas["lora"].parameters()),
    )
    known = trained(model, {"name": "own", "method": "bitfit", "target": "**.key", "attached": False})
    known.library(folder, preload=True)
    for key, tensor in back.deltas["lora"].tensors():
        assert torch.equal(known.deltas["lora"].tensor(key), tensor)
    with torch.no_grad():
        core.embeddings.LayerNorm.weight[0] += 1
    assert "embeddings.LayerNorm.weight differs" in refusal(model, folder)


def test_a_model_that_holds_the_encoder_twice(tmp_path):
    folder = saved(tmp_path, trained(encoder(), LORA))
    two = nn.ModuleDict({"left": encoder(), "right": encoder()})
    with pytest.raises(DeltaSpecError, match=r"DS537.*'left', 'right'"):
        deltaspec.restore(two, folder)
    with torch.no_grad():
        two["left"].embeddings.LayerNorm.weight[0] += 1
    assert all(site.fqn.startswith("right.") for site in deltaspec.restore(two, folder).plan.sites)


def test_a_head_and_a_vocabulary_that_came_later(tmp_path):
    source = trained(encoder(), LORA)
    folder = saved(tmp_path, source)
    model = encoder()
    model.head = nn.Linear(16, 3)
    model.resize_token_embeddings(48)
    assert torch.equal(logits(deltaspec.restore(model, folder)), logits(source))
    smaller = encoder()
    smaller.resize_token_embeddings(30)
    assert torch.equal(logits(deltaspec.restore(smaller, folder)), logits(source))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[:40] += 0.5
    assert "word_embeddings.weight differs" in refusal(model, folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: setattr(m.encoder.layer[1], "output", nn.Identity()), "encoder.layer.1.output.{"),
        (lambda m: m.encoder.layer.append(copy.deepcopy(m.encoder.layer[0])), "encoder.layer.2 is new"),
        (lambda m: setattr(m.encoder.layer[0].output, "dense", nn.Linear(24, 16, bias=False)), "dense.bias is missing"),
        (lambda m: setattr(m.encoder.layer[0].intermediate, "intermediate_act_fn", nn.ReLU()), "is a ReLU, was a GELU"),
        (lambda m: setattr(m.embeddings.LayerNorm, "more", nn.Parameter(torch.ones(2))), "LayerNorm.more is new"),
        (lambda m: setattr(m.embeddings, "LayerNorm", nn.LayerNorm(8)), "LayerNorm.weight is [8], was [16]"),
    ],
)
def test_another_structure_names_the_modules(tmp_path, change, said):
    folder = saved(tmp_path, trained(encoder(), LORA))
    model = encoder()
    change(model)
    message = refusal(model, folder)
    assert "whose structure differs" in message and said in message


class Net(nn.Module):
    """A module whose output nothing uses, and one that is never called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.end = nn.Linear(4, 4), nn.Linear(4, 2)
        torch.manual_seed(seed)
        self.aside, self.aux = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.aside(x)
        return self.end(x)


def test_what_the_output_does_not_use_is_no_part_of_it(tmp_path):
    x = torch.ones(2, 4)
    delta = {"name": "low", "method": "lora", "params": {"rank": 1}, "target": "body"}
    source = trained(Net(1), delta, example_inputs=x)
    folder = saved(tmp_path, source)
    back = deltaspec.restore(Net(2), folder, example_inputs=x)
    assert torch.equal(back(x), source(x)) and "nothing that the model gives depends on" in notes(back)
    assert torch.equal(trained(Net(3), delta, example_inputs=x, number=4).load(folder)(x), source(x))
    other = Net(2)
    with torch.no_grad():
        other.end.weight.add_(1)
    with pytest.raises(DeltaSpecError, match=r"other weights: end\.weight differs"):
        deltaspec.restore(other, folder, example_inputs=x)


def test_batch_norm_that_is_synchronised_is_the_same(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    delta = {"name": "low", "method": "lora", "params": {"rank": 1}, "target": "0"}
    folder = saved(tmp_path, trained(model, delta))
    assert deltaspec.restore(nn.SyncBatchNorm.convert_sync_batchnorm(model), folder).attached == ("low",)


def _library(model: nn.Module, folder: Any, **options: Any) -> Any:
    return trained(model, {"name": "own", "method": "bitfit", "attached": False}).library(folder, **options)


@pytest.mark.parametrize(
    "read",
    [
        deltaspec.restore,
        lambda model, folder, **options: trained(model, LORA).load(folder, **options),
        lambda model, folder, **options: _library(model, folder, preload=True, **options),
    ],
    ids=["restore", "load", "library"],
)
def test_match_lets_more_pass_and_says_so(tmp_path, read: Callable[..., Any]):
    folder = saved(tmp_path / "a", trained(encoder(), LORA))
    other, short = encoder(), encoder(hidden_act="relu")
    with torch.no_grad():
        other.encoder.layer[1].output.dense.bias.add_(1)
    for model, enough, names in ((other, "structure", "output.dense.bias"), (short, "sites", "intermediate_act_fn")):
        with pytest.raises(DeltaSpecError, match="DS523"):
            read(model, folder)
        if enough == "sites":
            with pytest.raises(DeltaSpecError, match='match="sites"'):
                read(model, folder, match="structure")
        found = read(model, folder, match=enough)
        report = str(dict(found.let_pass)) if hasattr(found, "let_pass") else str(found.plan)
        assert f'match="{enough}" let pass' in report.replace("\n", " ") and names in report
        if not hasattr(found, "let_pass"):
            found.save(tmp_path / "b")
            assert names in next((tmp_path / "b").glob("*.lock.json")).read_text()
    with pytest.raises(ValueError, match="match is"):
        read(encoder(), folder, match="nothing")


def test_quantised_forms_of_the_same_weights_agree(tmp_path):
    plain, codes = encoder(), encoder()
    for fqn, module in codes.named_modules():
        if isinstance(module, nn.Linear) and "output" in fqn:
            quantised(module)
    folder = saved(tmp_path / "a", trained(plain, LORA))
    back = deltaspec.restore(codes, folder)
    assert "as far as quantised values allow" in notes(back)
    back.save(tmp_path / "b")  # and so the other way round
    for model in (plain, codes):
        assert deltaspec.restore(model, tmp_path / "b").attached == ("lora",)
    other = encoder()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.copy_(torch.randn(16, 24) * 0.02)
    quantised(other.encoder.layer[0].output.dense)
    assert "layer.0.output.dense.weight differs" in refusal(other, folder)


@pytest.mark.parametrize("form", [*UNREADABLE.values(), Offered])
def test_deltas_on_codes_load_onto_the_same_codes_and_onto_their_values(form, tmp_path):
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"path": ["a", "b"]}}]}
    compiled = deltaspec.compile(packed_bases.net(form), spec, example_inputs=packed_bases.inputs())
    compiled.save(tmp_path)
    given = {"example_inputs": packed_bases.inputs()}
    back = deltaspec.restore(packed_bases.net(form), tmp_path, **given)
    assert torch.equal(back(packed_bases.inputs()), compiled(packed_bases.inputs()))
    other = packed_bases.net(form)
    with torch.no_grad():
        other.out.weight.neg_()
    assert "out.weight" in refusal(other, tmp_path, **given)
    if form is not UNREADABLE["float8"]:
        deltaspec.restore(packed_bases.net(), tmp_path, **given)  # before they were packed
