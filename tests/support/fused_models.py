"""A model for every layout of every role map with `parts`, and what its own code makes of each output row."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.tabulate import tabulate

IDS = torch.tensor([[5, 3, 9, 17, 4, 8], [1, 2, 30, 4, 22, 6]])
SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attn_implementation="eager"
)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")
    )


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, intermediate_size=48))


def phi3() -> nn.Module:
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=48, pad_token_id=0)
    return transformers.Phi3ForCausalLM(config)


def bloom() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4, attn_implementation="eager")
    return transformers.BloomForCausalLM(config)


def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(**SIZES, intermediate_size=48, pad_token_id=0)
    return transformers.ModernBertForMaskedLM(config)


def falcon(**layout: Any) -> Any:
    return lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES, **layout))


def gpt2_cross() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config)


FUSED: dict[str, Any] = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "phi3": phi3,
    "bloom": bloom,
    "modernbert": modernbert,
    "falcon": falcon(new_decoder_architecture=False, multi_query=False),
    "falcon multi-query": falcon(new_decoder_architecture=False, multi_query=True),
    "falcon grouped": falcon(new_decoder_architecture=True, num_kv_heads=2),
    "gpt2 cross": gpt2_cross,
}
"""A model for every layout of every role map with `parts`: a new one needs a builder and a line here. Each is told
by its config's `model_type`; attention is `eager` where a model would not give its weights otherwise.

What its parts are is then seen in the model's own code (see `observed`)."""


def observed(model: nn.Module, role: str, fqn: str) -> list[str]:
    """Name the part that each output row of a fused projection feeds, by what a change of it does in the model.

    One sequence of a batch for each row: there, the row is changed at one position. Of attention, q then moves the
    attention weights of that position alone, k also those of later ones, and v none. Of a gated feed-forward, what
    leaves follows up in proportion, and gate by the activation function.
    """
    module = model.get_submodule(fqn)
    width = next(row.out_features for row in tabulate(model).rows if row.fqn == fqn)
    at, found = 2, {}
    given: dict[str, Any] = {"input_ids": IDS[:1].repeat(width, 1)}
    if role == "cross_attn.kv":
        given["encoder_hidden_states"] = torch.randn(1, 6, 32).repeat(width, 1, 1)
    down = next((row.fqn for row in tabulate(model).rows if "mlp.down" in row.roles), None)

    def run(size: float) -> Tensor:
        def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[:, at] += size * torch.eye(width) + 0.5 * (role == "mlp.gate_up")  # where activations bend
            return changed

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found["inner"] = inputs[0]

        handles = [module.register_forward_hook(change)]
        if role == "mlp.gate_up":
            handles.append(model.get_submodule(down).register_forward_pre_hook(see))
            model(**given)
        else:
            output = model(**given, output_attentions=True)
            found["inner"] = (output.cross_attentions if role == "cross_attn.kv" else output.attentions)[0]
        for handle in handles:
            handle.remove()
        return found["inner"]

    plain, once, twice = run(0.0), run(0.5), run(1.0)
    moved = (once - plain).abs()
    if role == "mlp.gate_up":
        bent = (twice - plain - 2 * (once - plain)).abs().flatten(1).amax(1)
        assert moved.flatten(1).amax(1).min() > 0.05
        return ["gate" if one > 1e-3 else "up" for one in bent.tolist()]
    if role == "cross_attn.kv":
        return ["k" if one > 1e-6 else "v" for one in moved.flatten(1).amax(1).tolist()]
    queries = moved.amax((1, 3))  # [row, position of the query]
    later, here = queries[:, at + 1 :].amax(1).tolist(), queries[:, at].tolist()
    return ["k" if after > 1e-6 else "q" if now > 1e-6 else "v" for after, now in zip(later, here, strict=True)]


def rows_of(name: str, part: str) -> list[int]:
    """Return the output rows of a part of the first fused attention projection, as the model's own code has them."""
    return [row for row, seen in enumerate(attention_rows(name)) if seen == part]


@cache
def attention_rows(name: str) -> list[str]:
    model = made(name)
    fqn = next(row.fqn for row in tabulate(model).rows if "attn.qkv" in row.roles)
    return observed(model, "attn.qkv", fqn)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FUSED[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.05)
    return model


def spec(method: str, **params: Any) -> dict[str, Any]:
    return {"deltaspec": 1, "deltas": [
        {"name": "d", "method": method, "params": params, "target": {"role": "attn.qkv"}}
    ]}  # fmt: skip


def compiled(model: nn.Module, method: str, **params: Any) -> deltaspec.CompiledModel:
    c = deltaspec.compile(model, spec(method, **params))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in c.deltas["d"].parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return c


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits
