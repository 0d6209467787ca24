"""llama.cpp's server: the base and the deltas as GGUF files; each request names its delta and its strength."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import numpy as np
import xllamacpp
from _common import BASE, Reference, Report, low_rank, references, refusal
from safetensors.numpy import load_file

ARCHITECTURE = "llama"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
"""GGUF's names of modules: of those in a layer, and of the others."""
ADAPTER = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}
AT_ONCE = 4
"""Requests that are computed together."""


def gguf_name(module: str) -> str:
    """Return what GGUF calls a module of transformers' Llama."""
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def in_pairs(rows: np.ndarray, module: str, config: Mapping[str, Any]) -> np.ndarray:
    """Put the rows of q and k into GGUF's order, where the two halves of a head's rotation alternate."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
    if heads is None:
        return rows
    return rows.reshape(config[heads], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> Path:
    """Write a GGUF file of the Llama architecture."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for name, value in fields.items():
        kinds[type(value)](name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_base(reference: Reference) -> Path:
    """Write the base in float32, with numbers as its vocabulary: prompts are tokens, and so are answers.

    A quantised base leaves the tokens of the float32 one by itself.
    """
    config = reference.config
    heads, width = config["num_attention_heads"], config["hidden_size"]
    fields = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": width,
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.rope.dimension_count": config.get("head_dim") or width // heads,
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [str(token) for token in range(config["vocab_size"])],
        "tokenizer.ggml.token_type": [gguf.TokenType.NORMAL] * config["vocab_size"],
        "tokenizer.ggml.merges": ["1 0"],
    }
    tensors = {}
    for key, weight in load_file(reference.model / "model.safetensors").items():
        module = key.removesuffix(".weight")
        tensors[gguf_name(module)] = in_pairs(weight, module, config)
    return write(reference.built("llama.cpp") / "base.gguf", tensors, fields)


def write_adapter(reference: Reference, delta: str, *, permuted: bool = True) -> Path:
    """Write a PEFT directory as a GGUF adapter.

    There is one alpha a file, and each factor is alpha / rank of its tensor; alpha 0 means 1, so all is folded into B.
    """
    tensors = {}
    for module, (down, up) in low_rank(reference.adapter(delta)).items():
        tensors[f"{gguf_name(module)}.lora_a"] = down
        tensors[f"{gguf_name(module)}.lora_b"] = in_pairs(up, module, reference.config) if permuted else up
    ending = "" if permuted else "-not-permuted"
    return write(reference.built("llama.cpp") / f"{delta}{ending}.gguf", tensors, ADAPTER)


class Server:
    """llama.cpp's server on a free port of the loopback, in a thread of its own."""

    def __init__(self, base: Path, adapters: Sequence[Path]) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(base)
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        settings.n_ctx, settings.n_parallel, settings.warmup = 128 * AT_ONCE, AT_ONCE, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.verbosity = -1
        self.hosted = xllamacpp.Server(settings)

    def complete(self, prompt: Sequence[int], count: int, strengths: Mapping[int, float]) -> list[int]:
        """Return the new tokens of a prompt. Adapters, by their place, that a request leaves out are at strength 0."""
        wanted = {
            "prompt": prompt, "n_predict": count, "temperature": 0.0, "ignore_eos": True, "return_tokens": True,
            "cache_prompt": False, "lora": [{"id": place, "scale": scale} for place, scale in strengths.items()],
        }  # fmt: skip
        request = Request(f"{self.hosted.listening_address}/completion", json.dumps(wanted).encode())
        with urlopen(request) as answer:
            tokens: list[int] = json.load(answer)["tokens"]
        return tokens

    def greedy(self, reference: Reference, strengths: Mapping[int, float]) -> list[list[int]]:
        """Return the new tokens of all prompts, which are asked for at once."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ask = lambda prompt: self.complete(prompt, reference.new_tokens, strengths)  # noqa: E731
            return [*pool.map(ask, reference.prompts)]


def check(reference: Reference, report: Report) -> None:
    """Run all deltas of one model on one server, and see two faults: one that is silent, one that is refused."""
    base = write_base(reference)
    adapters = [write_adapter(reference, delta) for delta in reference.deltas]
    faulty = [write_adapter(reference, delta, permuted=False) for delta in reference.deltas]
    server = Server(base, [*adapters, *faulty])
    for place, delta in enumerate(reference.deltas):
        report.compare(reference, "GGUF adapter", delta, server.greedy(reference, {place: 1.0}))
    report.compare(reference, "no adapter", BASE, server.greedy(reference, {}))
    report.compare(reference, "adapter at strength 0", BASE, server.greedy(reference, {0: 0.0}))
    mixed(reference, report, server)
    answers = [server.greedy(reference, {len(adapters) + place: 1.0}) for place in range(len(faulty))]
    unlike = [new != reference.tokens[delta] for delta, new in zip(reference.deltas, answers, strict=True)]
    report.expect(reference, "q and k not permuted: other tokens", any(unlike), True)
    del server
    zeros = np.zeros((2, 2))
    stray = {"blk.77.attn_q.weight.lora_a": zeros, "blk.77.attn_q.weight.lora_b": zeros}
    path = write(reference.built("llama.cpp") / "stray.gguf", stray, ADAPTER)
    refused: list[str] = []
    with refusal(Exception, refused):
        Server(base, [path])
    report.expect(reference, "a layer that is not there is refused", len(refused), 1)


def mixed(reference: Reference, report: Report, server: Server) -> None:
    """Ask for all prompts under all deltas, and under none, at once."""
    names = [*reference.deltas, BASE]
    asked = [(name, prompt) for prompt in reference.prompts for name in names]

    def ask(pair: tuple[str, list[int]]) -> list[int]:
        name, prompt = pair
        strengths = {} if name == BASE else {reference.deltas.index(name): 1.0}
        return server.complete(prompt, reference.new_tokens, strengths)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = [*pool.map(ask, asked)]
    for name in names:
        tokens = [new for (of, _), new in zip(asked, answers, strict=True) if of == name]
        report.compare(reference, "all at once", name, tokens)


if __name__ == "__main__":
    made = Report("llama.cpp")
    for each in references(sys.argv[1:]):
        check(each, made)
    made.close()
