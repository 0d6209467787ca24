"""Extracting a full fine-tune: what restore makes of it is the fine-tune, up to the error that is said."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import base
from torch import nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.folders import extract

IDS = torch.tensor([[5, 9, 11, 30, 21]])


@torch.no_grad()
def tuned(kind, change, dtype=torch.float32):
    """Return a fine-tune of a model: `change` is given each parameter's name and shape, and a source of numbers."""
    model = copy.deepcopy(base(kind, dtype))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if (update := change(name, parameter.shape, generator)) is not None:
            parameter.add_(update.to(parameter.dtype))
    return model


def noise(*shape, generator):
    return torch.randn(*shape, generator=generator) * 0.1


def of_rank(rank):
    """Change q and v by matrices of a rank, norms and biases wholly, two rows of the table of tokens."""

    def change(name, shape, generator):
        parts = ("q_proj", "v_proj", "query", "c_attn.weight", "SelfAttention.q")
        if len(shape) == 2 and any(part in name for part in parts):
            return noise(shape[0], rank, generator=generator) @ noise(rank, shape[1], generator=generator) * 10
        if "norm" in name.lower() or "bias" in name:
            return noise(*shape, generator=generator)
        if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")):
            rows = torch.zeros(shape)
            rows[[3, 7]] = noise(2, shape[1], generator=generator)
            return rows
        return None

    return change


@torch.no_grad()
def answer(model, kind):
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}
    return model(input_ids=IDS, **more).logits


@pytest.mark.parametrize("folders", [False, True], ids=["models", "folders"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_a_change_of_a_rank_comes_out_whole(kind, folders, tmp_path):
    full, plain = tuned(kind, of_rank(2)), base(kind)
    given = [full, plain]
    if folders:
        for name, model in (("full", full), ("base", plain)):
            model.save_pretrained(tmp_path / name, max_shard_size="8KB")
        given = [tmp_path / "full", tmp_path / "base"]
    found = extract(*given, tmp_path / "out")
    low = [change for change in found.changes if change.method == "lora"]
    assert low and {change.factors.rank for change in low} == {2} and all(change.error < 1e-5 for change in low)
    rows = [change for change in found.changes if change.method == "trainable_tokens"]
    assert [change.rows for change in rows] == [(3, 7)]
    again = deltaspec.restore(plain, tmp_path / "out")
    merged, wanted = again.merge().state_dict(), full.state_dict()
    assert wanted.keys() == merged.keys()
    for key, value in wanted.items():
        assert torch.allclose(merged[key], value, atol=1e-6), key
    assert (answer(again, kind) - answer(full, kind)).abs().max() < 1e-4 * answer(full, kind).abs().max()
    card = (tmp_path / "out/README.md").read_text()
    assert all(f"- `{change}`" in card for change in found.changes)


def test_what_is_said_wholly_is_exact(tmp_path):
    full = tuned("gpt2", lambda name, shape, generator: noise(*shape, generator=generator))
    found = extract(full, base("gpt2"), tmp_path, error=0)
    assert {change.method for change in found.changes} == {"full"}  # factors of full rank would cost more
    merged = deltaspec.restore(base("gpt2"), tmp_path).merge().state_dict()
    assert all(torch.equal(merged[key], value) for key, value in full.state_dict().items())


def test_saved_deltas_are_not_replaced(tmp_path):
    full = tuned("gpt2", lambda name, shape, generator: noise(*shape, generator=generator))
    extract(full, base("gpt2"), tmp_path)
    with pytest.raises(DeltaSpecError, match="DS562.* holds saved deltas"):
        extract(full, base("gpt2"), tmp_path)


def test_half_precision_comes_out_in_its_own_bits(tmp_path):
    full = tuned("llama", of_rank(1), torch.bfloat16)
    extract(full, base("llama", torch.bfloat16), tmp_path, rank=4)
    merged = deltaspec.restore(base("llama", torch.bfloat16), tmp_path).merge().state_dict()
    for key, value in full.state_dict().items():
        assert torch.allclose(merged[key].float(), value.float(), atol=0.02), key


def test_what_a_coarser_fine_tune_rounds_alone_is_no_change(tmp_path):
    full = copy.deepcopy(base("llama")).to(torch.bfloat16)
    with pytest.raises(DeltaSpecError, match=r"DS557.*equal but for rounding"):
        extract(full, base("llama"), tmp_path / "none")
    with torch.no_grad():
        full.model.layers[1].mlp.up_proj.weight += 1
    found = extract(full, base("llama"), tmp_path / "one")
    assert [change.fqn for change in found.changes] == ["model.layers.1.mlp.up_proj"]
    assert "model.norm.weight" not in found.rounded  # ones are ones in any dtype
    assert "model.layers.0.mlp.up_proj.weight" in found.rounded and "rounded to a coarser dtype" in str(found)


@pytest.mark.parametrize("error", [0.5, 0.1, 0.02])
def test_the_rank_is_the_least_with_the_error(error, tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50)).eval()
    full = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in full:
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.add_(u @ torch.diag(2.0 ** -torch.arange(len(s))) @ v)
    found = extract(full, plain, tmp_path, error=error)
    for change, (one, other) in zip(found.changes, zip(full, plain, strict=True), strict=True):
        difference = (one.weight - other.weight).detach().double()
        values = torch.linalg.svdvals(difference)
        left = [float(values[rank:].norm() / values.norm()) for rank in range(len(values))]
        assert change.factors.rank == next(rank for rank, rest in enumerate(left) if rest <= error)
        assert change.error == pytest.approx(left[change.factors.rank], abs=1e-5)


def test_ranks_that_differ_are_overrides_and_a_limit_is_kept(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(20, 20) for _ in range(3)), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    full = copy.deepcopy(plain)
    with torch.no_grad():
        for rank, layer in enumerate(full[:3], start=1):
            layer.weight.add_(torch.randn(20, rank) @ torch.randn(rank, 20))
        full[3].weight.add_((torch.randn(6, 2) @ torch.randn(2, 36)).reshape(6, 4, 3, 3))
        full[4].running_mean.add_(1)
    found = extract(full, plain, tmp_path / "a", name="mine")
    ranks = {change.fqn: change.factors.rank for change in found.changes if change.factors}
    assert ranks == {"0": 1, "1": 2, "2": 3, "3": 2}
    spec = found.plan.specs[0]
    assert [delta.name for delta in spec.deltas] == ["mine-full", "mine"]
    assert sorted(dict(o.params)["rank"] for o in spec.deltas[1].overrides) == [1, 3]
    limited = extract(full, plain, tmp_path / "b", rank=2)
    assert {c.fqn: c.factors.rank for c in limited.changes if c.factors} == {"0": 1, "1": 2, "2": 2, "3": 2}
    assert [c.fqn for c in limited.changes if c.error > 1e-5] == ["2"]


def test_heads_that_the_fine_tune_unties_stand_alone(tmp_path):
    full = copy.deepcopy(base("gpt2"))
    full.lm_head.weight = nn.Parameter(full.lm_head.weight.detach().clone())
    with torch.no_grad():
        full.lm_head.weight += torch.randn(48, 1, generator=torch.Generator().manual_seed(1)) * 0.3
    found = extract(full, base("gpt2"), tmp_path)
    assert [(change.fqn, change.method, change.tied) for change in found.changes] == [("lm_head", "lora", "alone")]
    merged = deltaspec.restore(base("gpt2"), tmp_path).merge()
    assert torch.allclose(merged.lm_head.weight, full.lm_head.weight, atol=1e-6)
    assert torch.equal(merged.transformer.wte.weight, full.transformer.wte.weight)


def codes(raised):
    return sorted({finding.code for finding in raised.value.diagnostics})


@pytest.mark.parametrize(
    ("change", "code"),
    [("equal", "DS557"), ("shape", "DS556"), ("lacking", "DS556"), ("more", "DS556"), ("nan", "DS520"),
     ("truncated", "DS554")],
)  # fmt: skip
def test_what_cannot_be_extracted_is_refused_and_nothing_is_written(tmp_path, change, code):
    for name in ("full", "base"):
        base("llama").save_pretrained(tmp_path / name)
    file, key = tmp_path / "full/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    if change == "shape":
        tensors[key] = tensors[key][:5].clone()
    elif change == "lacking":
        del tensors[key]
    elif change == "more":
        tensors["score.weight"] = torch.ones(2, 16)
    elif change == "nan":
        tensors[key][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DeltaSpecError) as raised:
        extract(tmp_path / "full", tmp_path / "base", tmp_path / "out")
    assert codes(raised) == [code] and not (tmp_path / "out").exists()


def test_what_was_extracted_from_folders_is_as_from_models(tmp_path):
    full = tuned("llama", of_rank(2))
    full.save_pretrained(tmp_path / "full")
    base("llama").save_pretrained(tmp_path / "base")
    extract(tmp_path / "full", tmp_path / "base", tmp_path / "a")
    extract(full, base("llama"), tmp_path / "b")
    one, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert [entry["identity"] for entry in one["deltas"]] == [entry["identity"] for entry in other["deltas"]]


def test_float8_is_refused_by_name_and_float64_is_exact(tmp_path):
    tensors = {name: value.clone() for name, value in base("llama").state_dict().items()}
    base("llama").save_pretrained(tmp_path / "base")
    base("llama").save_pretrained(tmp_path / "full")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, tmp_path / "base/model.safetensors")
    with pytest.raises(DeltaSpecError) as raised:
        extract(tmp_path / "full", tmp_path / "base", tmp_path / "out")
    assert codes(raised) == ["DS557"]
    full = tuned("llama", lambda name, shape, _: torch.full(shape, 1e-12) if name == key else None, torch.float64)
    extract(full, base("llama", torch.float64), tmp_path / "out", error=0)
    restored = deltaspec.restore(base("llama", torch.float64), tmp_path / "out").merge().get_parameter(key)
    torch.testing.assert_close(restored, full.get_parameter(key), atol=1e-14, rtol=0)
