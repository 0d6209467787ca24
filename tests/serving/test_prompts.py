"""Virtual tokens row by row: every row of a mixed batch is what it is alone."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from prompt_models import bart, bert, build, gemma3, gpt2, llama, opt, roberta, t5, tokens
from prompt_rows import (
    DELTAS,
    GENERATED,
    MODELS,
    PREFIXES,
    PROMPTS,
    assert_as_alone,
    compiled,
    inputs,
    only,
    real,
    row_of,
)
from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError


@torch.no_grad()
@pytest.mark.parametrize("cached", [None, False])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("make", [*MODELS, gemma3, roberta])
def test_prompts(make: Any, side: str | None, cached: bool | None) -> None:
    c = compiled(build(make))
    given = inputs(make, len(PROMPTS), side) | ({} if cached is None else {"use_cache": cached})
    out = assert_as_alone(c, given, PROMPTS)
    assert out.logits.shape[1] == (4 if make in (t5, bart) else 7)
    if side is None:
        del given["attention_mask"]
        assert_as_alone(c, given, PROMPTS)


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize("make", [llama, gpt2, opt, gemma3, t5, bart])
def test_generation(make: Any, how: dict[str, Any]) -> None:
    c = compiled(build(make))
    given = inputs(make, len(GENERATED), "left")
    given.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **how}
    together = c.generate(**given, **settings, deltas=GENERATED)
    for row, entry in enumerate(GENERATED):
        with only(c, entry):
            assert torch.equal(c.generate(**row_of(given, row), **settings), together[row : row + 1]), entry


def test_generation_expands_rows_and_samples() -> None:
    c = compiled(build(gpt2))
    given = inputs(gpt2, 3, "left")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    deltas = ["soft", None, ("long", "tuned")]
    beams = c.generate(**given, **settings, num_beams=4, num_return_sequences=2, do_sample=False, deltas=deltas)
    repeated = {name: value.repeat_interleave(2, 0) for name, value in given.items()}
    found = []
    for inner, rows in ((given, deltas), (repeated, [entry for entry in deltas for _ in range(2)])):
        torch.manual_seed(7)
        more = {"num_return_sequences": 2} if inner is given else {}
        found.append(c.generate(**inner, **settings, do_sample=True, deltas=rows, **more))
    assert torch.equal(found[0], found[1])
    for row, entry in enumerate(deltas):
        with only(c, entry):
            alone = c.generate(**row_of(given, row), **settings, num_beams=4, num_return_sequences=2, do_sample=False)
        assert torch.equal(alone, beams[2 * row : 2 * row + 2])


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2, opt, gemma3])
@pytest.mark.parametrize("side", [None, "left"])
def test_going_on_from_a_cache(make: Any, side: str | None) -> None:
    c = compiled(build(make))
    given = inputs(make, len(GENERATED), side)
    more = tokens(len(GENERATED), 9)[:, 7:]
    longer = torch.cat([given["attention_mask"], torch.ones_like(more)], dim=1)
    masks: list[dict[str, Any]] = [{"attention_mask": given["attention_mask"]}, {"attention_mask": longer}]
    for first, second in [masks, [{}, {}]] if side is None else [masks]:
        cache = c(input_ids=given["input_ids"], **first, deltas=GENERATED, use_cache=True).past_key_values
        out = c(input_ids=more, past_key_values=cache, **second, deltas=GENERATED)
        for row, entry in enumerate(GENERATED):
            with only(c, entry):
                alone = c(input_ids=given["input_ids"][row : row + 1], **row_of(first, row)).past_key_values
                again = c(input_ids=more[row : row + 1], past_key_values=alone, **row_of(second, row))
            torch.testing.assert_close(out.logits[row], again.logits[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("cached", [None, False])
def test_outputs_are_those_of_the_tokens(make: Any, cached: bool | None) -> None:
    model = build(make)
    model.set_attn_implementation("eager")
    c = compiled(model)
    given = inputs(make, len(PROMPTS), "left") | {"output_hidden_states": True, "output_attentions": True}
    if make is llama and cached is not None:
        given["use_cache"] = cached
    out = c(**given, deltas=PROMPTS)
    for row, entry in enumerate(PROMPTS):
        seen = given["attention_mask"][row] == 1
        with only(c, entry):
            alone = c(**row_of(given, row))
        for name in ("hidden_states", "attentions"):
            for got, expected in zip(out[name], alone[name], strict=True):
                assert got[row].shape == expected[0].shape
                got, expected = got[row][..., seen, :], expected[0][..., seen, :]
                if name == "attentions":
                    got, expected = got[..., seen], expected[..., seen]
                torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    pair = c(**given, deltas=PROMPTS, return_dict=False)
    assert torch.equal(pair[0], out.logits)


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5, bart])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_backward_gives_each_delta_its_own_gradient(make: Any, side: str) -> None:
    c = compiled(build(make))
    deltas = [*PROMPTS, *PREFIXES]
    given = inputs(make, len(deltas), side)
    weights = torch.randn(len(deltas), 4 if make in (t5, bart) else 7, 1)
    if make not in (t5, bart):
        weights = weights * given["attention_mask"][:, :, None]

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad for n, p in c.named_parameters() if p.grad is not None}
        for parameter in c.parameters():
            parameter.grad = None
        return found

    (c(**given, deltas=deltas).logits * weights).sum().backward()
    together = gradients()
    for row, entry in enumerate(deltas):
        if entry is not None:
            with only(c, entry):
                (c(**row_of(given, row)).logits * weights[row]).sum().backward()
    alone = {n: p.grad for n, p in c.named_parameters() if p.grad is not None}
    assert set(together) == set(alone)
    assert {name.split("deltaspec.")[1].split(".")[0] for name in alone} == {delta["name"] for delta in DELTAS}
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, atol=3e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_prompts_have_no_strength() -> None:
    c = compiled(build(llama))
    with pytest.raises(DeltaSpecError, match="DS446"):
        c(input_ids=tokens(2), deltas=[{"soft": 0.5}, None])
    with pytest.raises(DeltaSpecError, match="DS446"):
        c.rows([{"tuned": 0.5, "lora": 0.5}, None])
    assert c(input_ids=tokens(2), deltas=[{"soft": 1.0}, None]).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("make", [gpt2, t5])
def test_what_is_attached_is_no_part_of_rows(make: Any) -> None:
    c = compiled(build(make))
    assert c.attached == tuple(delta["name"] for delta in DELTAS)
    given = inputs(make, 2, "left")
    for deltas in (["lora", None], ["soft", None], [None, "long"]):
        before = c(**given).logits
        assert_as_alone(c, given, deltas)
        assert torch.equal(c(**given).logits, before)


@torch.no_grad()
def test_in_half_precision() -> None:
    model = build(llama).to(torch.bfloat16)
    c = compiled(model)
    given = inputs(llama, len(PROMPTS), "left")
    out = c(**given, deltas=PROMPTS).logits
    assert out.dtype == torch.bfloat16
    for row, entry in enumerate(PROMPTS):
        with only(c, entry):
            alone = c(**row_of(given, row)).logits
        torch.testing.assert_close(real(given, row, out[row]), real(given, row, alone[0]), atol=0.05, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("make", [t5, bart])
def test_an_encoder_that_ran_before(make: Any) -> None:
    c = compiled(build(make))
    given = inputs(make, len(PROMPTS), "right")
    out = c(**given, deltas=PROMPTS)
    assert out.encoder_last_hidden_state.shape[1] == 7 + 6
    states = {"encoder_outputs": (out.encoder_last_hidden_state,), "decoder_input_ids": given["decoder_input_ids"]}
    again = c(**states, attention_mask=given["attention_mask"], deltas=PROMPTS)
    torch.testing.assert_close(again.logits, out.logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(DeltaSpecError, match="DS447"):
        c(**states, deltas=PROMPTS)


ASSIGNED: list[list[Any]] = [
    [("long", "soft"), None, "long", "tuned"],
    [("other", "more"), "other", None, None],
    ["tuned", {"long": 0.5}, "short", ("other", "soft")],
    ["more", "lstm", ("long", "more"), "short"],
]


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, t5])
def test_torch_compile_makes_one_graph_for_all_assignments(make: Any) -> None:
    c = compiled(build(make), "long", "short", "other", "soft", "more", "tuned", "lstm")
    c.detach()
    given = inputs(make, 4, "left")
    expected = [c(**given, deltas=deltas).logits for deltas in ASSIGNED]
    prepared = [c.rows(deltas, among=["long", "short", "soft", "tuned", "lstm"]) for deltas in ASSIGNED]
    assert len({rows.kinds for rows in prepared}) == 1
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(c, fullgraph=True, backend=count)
    for rows, wanted in zip(prepared, expected, strict=True):
        got = fast(**given, use_cache=False, deltas=rows).logits
        for row in range(4):
            torch.testing.assert_close(real(given, row, got[row]), real(given, row, wanted[row]), atol=2e-5, rtol=1e-4)
    assert count.frame_count == 1
    cached = fast(**given, use_cache=True, deltas=prepared[0]).logits
    torch.testing.assert_close(real(given, 0, cached[0]), real(given, 0, expected[0][0]), atol=2e-5, rtol=1e-4)
