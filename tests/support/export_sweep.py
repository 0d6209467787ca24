"""Random deltas written as PEFT adapters, beside PEFT's reading and ours: `python tests/support/export_sweep.py 0 300`.

A slice of it is a test. Run by hand, it prints what differs, and how often each reason to refuse was met.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import peft
import torch
from as_peft import stirred
from peft_bases import IDS, base
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import deltaspec

MODELS = ("llama", "gpt2", "bert", "t5", "mixtral", "tied", "vit")
METHODS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"scaling": "rslora"}, {"use_dora": True}, {"bias": True}, {"init": "pissa"}, {"init": "olora"},
             {"init": "orthogonal"}, {"dropout": 0.1}, {"parts": ["q", "v"]}],
    "adalora": [{"initial_rank": 4}],
    "boft": [{"block_size": 4}, {"block_size": 2}],
    "c3a": [{"block_size": 4}, {"block_size": 8}],
    "delora": [{}, {"init": "zeros"}, {"boundary": 9.0}],
    "fourierft": [{"frequencies": 20}],
    "hira": [{}],
    "hra": [{}],
    "ia3": [{}, {"position": "before"}],
    "loha": [{}, {"alpha": 5}],
    "lokr": [{"factor": 2}, {"factor": 4, "alpha": 3}],
    "miss": [{"rank": 4}, {"rank": 4, "variant": "bat"}, {"rank": 4, "variant": "mini", "width": 2}],
    "oft": [{"block_size": 4}, {"block_size": 4, "shared_blocks": True}, {"block_size": 8, "transform": "cayley"}],
    "road": [{"group_size": 2}, {"group_size": 4, "variant": 2}, {"group_size": 4, "variant": 4}],
    "vera": [{}],
}  # fmt: skip
"""Methods that PEFT has, and parameters of each, beside its rank."""
RANKED = ("lora", "adalora", "delora", "hira", "hra", "loha", "lokr", "vera")
BESIDE = ("full", "bitfit", "norm", "trainable_tokens")


@cache
def model_of(name: str) -> nn.Module:
    if name != "vit":
        return base(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).eval()


@torch.no_grad()
def run(name: str, model: Any) -> Tensor:
    if name == "vit":
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        found: Tensor = model(pixel_values=images).logits
    else:
        found = model(input_ids=IDS, **({"decoder_input_ids": IDS} if name == "t5" else {})).logits
    return found


def selector(random: Random, name: str, experts: bool) -> Any:
    """Draw which modules a delta is on: by role, path or regex, cut by layers, with an exception."""
    rows = [row for row in table(name).rows if row.kind in ("linear", "conv1d", "embedding", "conv")]
    row = random.choice(rows)
    ends = row.fqn.split(".")
    ways: list[Any] = [
        {"path": "**." + ends[-1]} if len(ends) > 1 else {"path": ends[0]},
        {"path": row.fqn},
        {"regex": r".*" + ends[-1]},
        {"path": sorted({random.choice(rows).fqn for _ in range(3)})},
    ]
    if roles := [role for role in row.roles if role != "expert"]:
        ways += [{"role": roles[0]}] * 3
    if experts and name == "mixtral" and random.random() < 0.5:
        return {"path": "**.experts", "parameter": random.choice(["down_proj", ["gate_up_proj", "down_proj"]])}
    found = random.choice(ways)
    if row.layer is not None and random.random() < 0.3:
        found = {**found, "layers": random.choice([{"first": 1}, {"last": 1}, {"every": 2}])}
    if random.random() < 0.2:
        return {"any": [found], "not": {"path": random.choice(rows).fqn, "optional": True}}
    return found


@cache
def table(name: str) -> Any:
    from deltaspec.backbone.tabulate import tabulate

    return tabulate(model_of(name))


def delta(random: Random, name: str, called: str, method: str) -> dict[str, Any]:
    """Draw one delta of a method."""
    params = dict(random.choice(METHODS[method]))
    if method in RANKED:
        params["rank"] = random.choice([1, 2, 3, 4])
    found = {"name": called, "method": method, "params": params, "target": selector(random, name, method == "lora")}
    if method in RANKED and random.random() < 0.4:
        other = {
            "match": selector(random, name, False) | {"optional": True},
            "params": {"rank": random.choice([1, 2, 5])},
        }
        found["overrides"] = [other]
    return found


def beside(random: Random, name: str, called: str) -> dict[str, Any]:
    """Draw one delta of a method that PEFT keeps beside its types."""
    method = random.choice(BESIDE)
    found: dict[str, Any] = {"name": called, "method": method}
    heads = {"bert": "classifier", "vit": "classifier"}
    if method == "full":
        tied = {"params": {"tied": random.choice(["together", "alone"])}} if name in ("gpt2", "t5", "tied") else {}
        return found | {"target": {"path": heads.get(name, "lm_head")}, **tied}
    if method == "trainable_tokens":
        return found | {"params": {"token_ids": random.sample(range(20), 3)}}
    if method == "bitfit":
        return found | {"target": selector(random, name, False)}
    return found


def draw(seed: int) -> tuple[str, list[dict[str, Any]], dict[str, float], dict[str, Any]]:
    """Return a model's name, deltas for it, their strengths, and how they are written."""
    random = Random(seed)
    name = random.choice(MODELS)
    kind = random.random()
    wishes: dict[str, Any] = {}
    if kind < 0.35:  # several that are low-rank, at strengths
        methods = [random.choice(["lora", "lora", "vera", "adalora", "delora"]) for _ in range(random.choice([2, 3]))]
        deltas = [delta(random, name, "abc"[index], method) for index, method in enumerate(methods)]
        strengths = {one["name"]: random.choice([1.0, 0.5, -1.0, 2.0]) for one in deltas}
        wishes = {"uniform": random.random() < 0.3}
    else:
        deltas = [delta(random, name, "a", random.choice(["lora", *METHODS]))]
        strengths = {"a": 1.0}
        if kind > 0.85:
            wishes = {"approximate": 30}
    if random.random() < 0.4:
        deltas.append(beside(random, name, "z"))
        strengths["z"] = 1.0
    return name, deltas, strengths, wishes


def differs(seed: int, folder: Path) -> str | None:
    """Return what is wrong with what was written for a seed, or, after `refused: `, why nothing was."""
    name, deltas, strengths, wishes = draw(seed)
    model = model_of(name)
    try:
        compiled = stirred(model, *deltas)
        compiled.only(strengths)
    except deltaspec.DeltaSpecError as error:
        return f"refused: plan: {error.diagnostics[0].code}"
    try:
        compiled.save_as("peft", folder, **wishes)
    except deltaspec.DeltaSpecError as error:
        return f"refused: {error.diagnostics[0].message}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    back = deltaspec.restore(model, folder)
    expected = run(name, compiled)
    scale = max(1.0, float(expected.abs().max())) * (1e-4 if "approximate" in wishes else 1e-5)
    wrong = [f"{who} {float((run(name, other) - expected).abs().max()):.1e}"
             for who, other in (("PEFT", theirs), ("restore", back))
             if not torch.allclose(run(name, other), expected, atol=scale, rtol=scale)]  # fmt: skip
    return f"{', '.join(wrong)}" if wrong else None


def main(first: int, last: int) -> None:
    reasons: Counter[str] = Counter()
    for seed in range(first, last):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = differs(seed, Path(folder) / "out")
            except Exception as error:  # whatever it is, the sweep says it and goes on
                found = f"{type(error).__name__}: {str(error)[:300]}"
        if found is not None and found.startswith("refused"):
            reasons[f"{'+'.join(one['method'] for one in draw(seed)[1])}: {found}"[:200]] += 1
        elif found is not None:
            sys.stdout.write(f"{seed} {found} {draw(seed)}\n")
        else:
            reasons["agree"] += 1
    for reason, count in reasons.most_common():
        sys.stdout.write(f"{count} {reason}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
