"""Batches whose rows have prefixes and prompts of their own, and each row alone."""

from typing import Any

import torch
import torch._dynamo.testing
from prompt_models import bart, bert, gpt2, llama, opt, t5, tokens
from torch import Tensor, nn

import deltaspec

MODELS = [llama, gpt2, bert, opt, t5, bart]
DELTAS: list[dict[str, Any]] = [
    {"name": "lora", "method": "lora", "target": {"any": [{"role": ["attn.q", "attn.qkv"], "optional": True}]}},
    {"name": "long", "method": "prefix", "params": {"tokens": 5}},
    {"name": "short", "method": "prefix", "params": {"tokens": 2, "reparametrisation": "mlp", "width": 8}},
    {"name": "other", "method": "prefix", "params": {"tokens": 5}},
    {"name": "soft", "method": "soft_prompt", "params": {"tokens": 4}},
    {"name": "more", "method": "soft_prompt", "params": {"tokens": 4}},
    {"name": "tuned", "method": "p_tuning", "params": {"tokens": 3, "width": 8}},
    {"name": "lstm", "method": "p_tuning", "params": {"tokens": 2, "width": 8, "encoder": "lstm"}},
]
PREFIXES = ["long", None, "short", "lora", ("long", "short"), "other"]
PROMPTS = ["soft", None, "tuned", "lora", "more", ("lora", "soft", "lstm"), ("long", "tuned")]
GENERATED = ["soft", None, ("lora", "soft", "lstm"), "long", "tuned", ("short", "more")]


def compiled(model: nn.Module, *names: str) -> Any:
    """Compile the deltas of these names (or all), with values that matter."""
    chosen = [delta for delta in DELTAS if not names or delta["name"] in names]
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": chosen})
    if "lora" in c.deltas:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in c.deltas["lora"].parameters():
                parameter.normal_(0, 0.3, generator=generator)
    return c


def masked(rows: int, side: str | None) -> tuple[Tensor, Tensor]:
    """Make ids `[rows, 7]` and a mask with as much padding in each row as its number, up to 3."""
    ids = tokens(rows, 7)
    mask = torch.ones_like(ids)
    for row in range(rows if side else 0):
        count = row % 4
        place = slice(0, count) if side == "left" else slice(7 - count, 7)
        ids[row, place], mask[row, place] = 0, 0
    return ids, mask


def inputs(make: Any, rows: int, side: str | None) -> dict[str, Any]:
    ids, mask = masked(rows, side)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if make in (t5, bart):
        torch.manual_seed(4)
        given["decoder_input_ids"] = torch.randint(3, 90, (rows, 4))
    return given


def only(c: Any, entry: Any) -> Any:
    if entry is None:
        return c.only()
    return c.only(entry) if isinstance(entry, str | dict) else c.only(*entry)


def row_of(given: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in given.items()}


def real(given: dict[str, Any], row: int, value: Tensor) -> Tensor:
    """The real tokens of a row of an output; a decoder's are all real."""
    mask = given.get("attention_mask")
    return value if mask is None or value.shape[0] != mask.shape[1] else value[mask[row] == 1]


def assert_as_alone(c: Any, given: dict[str, Any], deltas: list[Any]) -> Any:
    out = c(**given, deltas=deltas)
    for row, entry in enumerate(deltas):
        with only(c, entry):
            alone = c(**row_of(given, row))
        got, expected = real(given, row, out.logits[row]), real(given, row, alone.logits[0])
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4, msg=lambda m, r=row, e=entry: f"{r} {e}: {m}")
    return out
