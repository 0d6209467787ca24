"""Parameter counts that papers print, made by plans on the meta device.

READ rows quote a number from the text of the paper (not necessarily its last version), with the place where it stands.
COMPUTED rows have numbers that follow from a paper's formula and settings; that the paper prints them was not checked.
A percentage is of the backbone's parameters, or, where a row says `grown`, of those of the backbone with the delta, as
PEFT counts. Numbers are rounded, or, where a row says `cut`, cut to their digits.
"""

from __future__ import annotations

from functools import cache
from math import floor
from typing import Any

import pytest
import torch
from published import SUBLAYERS, t5_base, t5_xl, vit_base
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

import deltaspec

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
WIDE = {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 12}
FFN = {"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}
MODELS: dict[str, Any] = {
    "roberta-base": lambda: RobertaForMaskedLM(RobertaConfig(vocab_size=50265)),
    "roberta-large": lambda: RobertaForMaskedLM(RobertaConfig(vocab_size=50265, **LARGE)),
    "bert-base": lambda: BertModel(BertConfig()),
    "bert-large": lambda: BertModel(BertConfig(**LARGE)),
    "deberta-v3-base": lambda: DebertaV2Model(DebertaV2Config(vocab_size=128100, **BASE)),
    "llama-7b": lambda: LlamaForCausalLM(LlamaConfig()),
    "llama-13b": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824)
    ),
    "llama-3-8b": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=128256, num_key_value_heads=8, intermediate_size=14336)
    ),
    "vit-base": lambda: ViTModel(ViTConfig(), add_pooling_layer=False),
    "vit-large": lambda: ViTModel(ViTConfig(**LARGE), add_pooling_layer=False),
    "vit-base-100": lambda: vit_base(100),
    "bart-large": lambda: BartForConditionalGeneration(BartConfig(**WIDE, **FFN)),
    "gpt2-medium": lambda: GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "t5-base": t5_base,
    "t5-xl": t5_xl,
    "t5-xxl": lambda: T5EncoderModel(T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)),
    "linear": lambda: nn.Sequential(nn.Linear(256, 256)),
}
QV = {"role": ["attn.q", "attn.v"]}
SIX = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"]
PLAIN, LINEAR = {"role": SIX}, {"role": [*SIX, "mlp.gate"]}
BOTH = {"role": [*SIX, "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"]}
QKVUD = {"role": ["attn.q", "attn.k", "attn.v", "mlp.up", "mlp.down"]}
FEATURES = [{"role": ["embed", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"]}, {"role": "norm"}]


@cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def delta(method: str, target: Any = None, **params: Any) -> dict[str, Any]:
    found = {"method": method, "params": params}
    return found if target is None else {**found, "target": target}


def lora(rank: int, target: Any, **params: Any) -> dict[str, Any]:
    return delta("lora", target, rank=rank, **params)


NORMS = delta("norm")
READ: list[tuple[str, str, str, Any]] = [
    # (model, what is printed, where it stands, deltas)
    ("roberta-base", "0.3M", "LoRA, arXiv:2106.09685, table 2", [lora(8, QV)]),
    ("roberta-large", "0.8M", "LoRA, arXiv:2106.09685, table 2", [lora(8, QV)]),
    ("roberta-base", "294912", "FourierFT, arXiv:2405.03003, section 3.2, of LoRA", [lora(8, QV)]),
    ("vit-base", "294.9K", "VeRA, arXiv:2310.11454, table 5, of LoRA", [lora(8, QV)]),
    ("vit-large", "786.4K", "VeRA, arXiv:2310.11454, table 5, of LoRA", [lora(8, QV)]),
    ("llama-7b", "8.39M", "FourierFT, arXiv:2405.03003, table 1, of LoRA", [lora(16, QV)]),
    ("llama-13b", "52.4M", "FourierFT, arXiv:2405.03003, table 1, of LoRA", [lora(64, QV)]),
    ("llama-7b", "159.9M", "VeRA, arXiv:2310.11454, section 4.3, of LoRA", [lora(64, LINEAR)]),
    ("llama-13b", "250.3M", "VeRA, arXiv:2310.11454, section 4.3, of LoRA", [lora(64, LINEAR)]),
    ("llama-7b", "39.98M", "OFTv2, arXiv:2506.19847, table 4, of LoRA", [lora(16, LINEAR)]),
    ("bart-large", "4.33M", "OFTv2, arXiv:2506.19847, table 3, of LoRA", [lora(8, BOTH)]),
    ("deberta-v3-base", "1.33M", "AdaLoRA, arXiv:2303.10512, table 1, of LoRA", [lora(8, PLAIN)]),
    ("deberta-v3-base", "0.33M", "AdaLoRA, arXiv:2303.10512, table 1, of LoRA", [lora(2, PLAIN)]),
    ("llama-7b", "0.83% grown", "DoRA, arXiv:2402.09353, table 1, of LoRA", [lora(32, QKVUD)]),
    ("llama-7b", "0.84% grown", "DoRA, arXiv:2402.09353, table 1", [lora(32, QKVUD, use_dora=True)]),
    ("llama-7b", "0.43% grown", "DoRA, arXiv:2402.09353, table 1", [lora(16, QKVUD, use_dora=True)]),
    ("llama-13b", "0.68% grown", "DoRA, arXiv:2402.09353, table 1", [lora(32, QKVUD, use_dora=True)]),
    ("llama-3-8b", "0.70% grown", "DoRA, arXiv:2402.09353, table 1, of LoRA", [lora(32, QKVUD)]),
    ("llama-3-8b", "0.71% grown", "DoRA, arXiv:2402.09353, table 1", [lora(32, QKVUD, use_dora=True)]),
    ("roberta-base", "0.043M", "VeRA, arXiv:2310.11454, table 2", [delta("vera", QV, rank=1024)]),
    ("roberta-large", "0.061M", "VeRA, arXiv:2310.11454, table 2", [delta("vera", QV, rank=256)]),
    ("vit-base", "24.6K", "VeRA, arXiv:2310.11454, table 5", [delta("vera", QV, rank=256)]),
    ("vit-large", "61.4K", "VeRA, arXiv:2310.11454, table 5", [delta("vera", QV, rank=256)]),
    ("llama-7b", "1.6M", "VeRA, arXiv:2310.11454, section 4.3", [delta("vera", LINEAR, rank=1024)]),
    ("llama-13b", "2.4M", "VeRA, arXiv:2310.11454, section 4.3", [delta("vera", LINEAR, rank=1024)]),
    ("roberta-base", "24000", "FourierFT, arXiv:2405.03003, section 3.2", [delta("fourierft", QV, frequencies=1000)]),
    ("roberta-large", "0.048M", "FourierFT, arXiv:2405.03003, table 2", [delta("fourierft", QV, frequencies=1000)]),
    ("llama-7b", "0.064M", "FourierFT, arXiv:2405.03003, table 4", [delta("fourierft", QV, frequencies=1000)]),
    ("llama-13b", "0.08M", "FourierFT, arXiv:2405.03003, table 4", [delta("fourierft", QV, frequencies=1000)]),
    ("roberta-base", "0.018M", "C3A, arXiv:2407.19342, table 2", [delta("c3a", QV, block_size=768)]),
    ("roberta-base", "0.111M", "C3A, arXiv:2407.19342, table 2", [delta("c3a", QV, block_size=128)]),
    ("deberta-v3-base", "0.66M", "HRA, arXiv:2405.17484, table 2", [delta("hra", PLAIN, rank=8)]),
    ("llama-7b", "0.12%", "HRA, arXiv:2405.17484, table 7", [delta("hra", QV, rank=32)]),
    ("llama-7b", "87.0M", "MiSS, arXiv:2409.15371, table 5", [delta("miss", LINEAR, rank=64)]),
    ("llama-7b", "21.7M cut", "MiSS, arXiv:2409.15371, table 7", [delta("miss", LINEAR, rank=16)]),
    ("llama-7b", "43.5M", "MiSS, arXiv:2409.15371, table 7", [delta("miss", LINEAR, rank=32)]),
    ("llama-7b", "174.0M cut", "MiSS, arXiv:2409.15371, table 7", [delta("miss", LINEAR, rank=128)]),
    ("llama-7b", "17.65M", "OFTv2, arXiv:2506.19847, table 4", [delta("oft", LINEAR, block_size=32)]),
    ("llama-13b", "27.62M", "OFTv2, arXiv:2506.19847, table 4", [delta("oft", LINEAR, block_size=32)]),
    ("bart-large", "2.03M", "OFTv2, arXiv:2506.19847, table 3", [delta("oft", BOTH, block_size=16)]),
    ("bart-large", "8.52M", "OFTv2, arXiv:2506.19847, table 3", [delta("oft", BOTH, block_size=64)]),
    ("llama-7b", "0.13%", "BOFT, arXiv:2311.06243, table 2, of OFT", [delta("oft", LINEAR, block_size=16)]),
    ("t5-xl", "540K cut", "T-Few, arXiv:2205.05638, table 4", [delta("ia3")]),
    ("llama-7b", "0.031%", "ReFT, arXiv:2404.03592, table 1", [delta("reft", rank=8, first=7, last=7)]),
    ("llama-13b", "0.025%", "ReFT, arXiv:2404.03592, table 1", [delta("reft", rank=8, first=7, last=7)]),
    ("roberta-base", "0.015%", "ReFT, arXiv:2404.03592, table 4", [delta("reft", rank=1)]),
    ("roberta-base", "0.07%", "RoAd, arXiv:2409.00119, table 2", [delta("road", PLAIN, variant=1)]),
    ("roberta-large", "0.06%", "RoAd, arXiv:2409.00119, table 2", [delta("road", PLAIN, variant=1)]),
    ("roberta-base", "0.03%", "RoAd, arXiv:2409.00119, table 2", [delta("road", {"role": "mlp.up"}, variant=1)]),
    ("llama-7b", "0.02%", "RoAd, arXiv:2409.00119, table 3", [delta("road", LINEAR, variant=1)]),
    ("llama-7b", "0.04%", "RoAd, arXiv:2409.00119, table 3", [delta("road", LINEAR, variant=2)]),
    ("llama-7b", "0.08%", "RoAd, arXiv:2409.00119, table 3", [delta("road", LINEAR, variant=4)]),
    ("roberta-base", "0.08%", "RoAd, arXiv:2409.00119, table 2, of BitFit", [delta("bitfit")]),
    ("linear", "16K", "FedPara, arXiv:2108.06098, table 1", [delta("loha", "0", rank=16)]),
    ("t5-xxl", "20480", "Prompt tuning, arXiv:2104.08691, figure 2", [delta("soft_prompt", tokens=5)]),
    ("gpt2-medium", "0.1%", "Prefix tuning, arXiv:2101.00190, abstract", [delta("prefix", tokens=5)]),
    (
        "t5-base", "0.047%", "Compacter, arXiv:2106.04647, abstract",
        [delta("compacter", {"role": "mlp.down"}, reduction=32), NORMS],
    ),
    (
        "vit-base-100", "0.3M", "SSF, arXiv:2210.08823, abstract",
        [delta("ssf", FEATURES), delta("full", "classifier")],
    ),
]  # fmt: skip
COMPUTED: list[tuple[str, int, str, Any]] = [
    ("bert-base", 102_144, "BitFit, arXiv:2106.10199: every bias but the pooler's", [delta("bitfit")]),
    ("bert-large", 271_360, "BitFit, arXiv:2106.10199: every bias but the pooler's", [delta("bitfit")]),
    ("gpt2-medium", 245_760, "Prefix tuning, arXiv:2101.00190: 5 keys and values a layer", [delta("prefix", tokens=5)]),
    (
        "t5-base", 48 * (2 * 768 * 24 + 24 + 768) + 62 * 768, "Adapters in the setting of Compacter, arXiv:2106.04647",
        [delta("adapter", SUBLAYERS, reduction=32), NORMS],
    ),
    (
        "t5-base", 64 + 48 * (768 + 24 + 24 + 24 + 768 + 768) + 62 * 768, "Compacter, arXiv:2106.04647",
        [delta("compacter", SUBLAYERS, reduction=32), NORMS],
    ),
    (
        "t5-base", 48 * (2 * (768 + 24) + 24 + 768) + 62 * 768, "Low-rank adapters, arXiv:2106.04647",
        [delta("low_rank_adapter", SUBLAYERS), NORMS],
    ),
    ("roberta-base", 43_008, "VeRA, arXiv:2310.11454: the 0.043M above", [delta("vera", QV, rank=1024)]),
    ("deberta-v3-base", 663_552, "HRA, arXiv:2405.17484: the 0.66M above", [delta("hra", PLAIN, rank=8)]),
    ("t5-xl", 540_672, "T-Few, arXiv:2205.05638: the 540K above", [delta("ia3")]),
    (
        "vit-base-100", 205_824 + 76_900, "SSF, arXiv:2210.08823: the 0.3M above",
        [delta("ssf", FEATURES), delta("full", "classifier")],
    ),
    ("llama-7b", 65 * 4096, "LayerNorm tuning, arXiv:2312.11420: every gain", [NORMS]),
    ("roberta-base", 24 * 2 * 768 * 8, "HiRA, ICLR 2025: the factors of LoRA", [delta("hira", QV, rank=8)]),
    ("roberta-base", 24 * 12 * (1 + 2 * 768), "AdaLoRA, arXiv:2303.10512: P, Λ and Q", [delta("adalora", QV)]),
]  # fmt: skip


def planned(name: str, deltas: list[dict[str, Any]]) -> Any:
    entries = [{"name": f"d{number}", **entry} for number, entry in enumerate(deltas)]
    return deltaspec.plan(model(name), {"deltaspec": 1, "deltas": entries})


def as_printed(plan: Any, printed: str) -> str:
    """Write the plan's count in the form, and to the digits, of a printed one."""
    number, _, remark = printed.partition(" ")
    digits, unit = len(number.rstrip("%MK").partition(".")[2]), number[-1] if number[-1] in "%MK" else ""
    whole = plan.base_parameters + (plan.trainable if remark == "grown" else 0)
    value = plan.trainable / {"%": whole / 100, "M": 1e6, "K": 1e3, "": 1}[unit]
    if remark == "cut":
        value = floor(value * 10**digits) / 10**digits
    return f"{value:.{digits}f}{unit} {remark}".strip()


@pytest.mark.parametrize(("name", "printed", "place", "deltas"), READ, ids=lambda value: str(value)[:60])
def test_what_a_paper_prints(name: str, printed: str, place: str, deltas: list[dict[str, Any]]) -> None:
    assert as_printed(planned(name, deltas), printed) == printed, place


@pytest.mark.parametrize(("name", "count", "place", "deltas"), COMPUTED, ids=lambda value: str(value)[:60])
def test_what_a_papers_formula_gives(name: str, count: int, place: str, deltas: list[dict[str, Any]]) -> None:
    assert planned(name, deltas).trainable == count, place
