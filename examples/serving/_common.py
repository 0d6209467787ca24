"""What every engine's check needs: the reference to compare with, adapters as plain pairs of matrices, a table.

Runs in the environments of the engines, which have neither deltaspec nor, some of them, torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

OUTPUT = Path(__file__).parents[2] / "serving-output"
"""Where `reference.py` writes, and where engines put what they build."""
MODELS = ("tiny", "smol")
BASE = "base"
PREFIX = "base_model.model."

Tokens = list[list[int]]
"""New tokens of each prompt."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What deltaspec computes for one model."""

    name: str
    folder: Path
    prompts: Tokens
    new_tokens: int
    tokens: dict[str, Tokens]
    """New tokens by delta, and those of the base."""

    @classmethod
    def read(cls, name: str) -> Reference:
        """Read what `reference.py` wrote for a model."""
        folder = OUTPUT / name
        if not (folder / "reference.json").exists():
            sys.exit(f"there is no {folder}/reference.json: run examples/serving/reference.py {name} first")
        return cls(name, folder, **json.loads((folder / "reference.json").read_text(encoding="utf-8")))

    @property
    def model(self) -> Path:
        """Directory of the base, in transformers' form."""
        return self.folder / "model"

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the base."""
        config: dict[str, Any] = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        return config

    @property
    def deltas(self) -> list[str]:
        """Names of the deltas."""
        return [name for name in self.tokens if name != BASE]

    def adapter(self, delta: str) -> Path:
        """Return the PEFT directory of a delta."""
        return self.folder / "adapters" / delta

    def saved(self, delta: str) -> Path:
        """Return the directory in which deltaspec saved it."""
        return self.folder / "saved" / delta

    def built(self, engine: str) -> Path:
        """Return the folder for what an engine builds of this model, and make it."""
        folder = self.folder / engine
        folder.mkdir(exist_ok=True)
        return folder


@dataclass(slots=True)
class Report:
    """A table with a line for each delta in each way of serving, printed as it grows."""

    engine: str
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _line("engine", "model", "way", "delta", "equal ours", "unlike base")

    def compare(self, reference: Reference, way: str, delta: str, tokens: Tokens) -> None:
        """Compare the tokens of all prompts with deltaspec's and, but for the base's own, with the base's."""
        ours, base, count = reference.tokens[delta], reference.tokens[BASE], len(reference.prompts)
        equal = sum(map(list.__eq__, tokens, ours))
        unlike = sum(map(list.__ne__, tokens, base))
        _line(self.engine, reference.name, way, delta, f"{equal}/{count}", "" if delta == BASE else f"{unlike}/{count}")
        if equal < count:
            self.failures.append(f"{reference.name}, {way}, {delta}: {tokens} instead of {ours}")
        elif delta != BASE and unlike < count:
            self.failures.append(f"{reference.name}, {way}, {delta}: tokens of the base")

    def expect(self, reference: Reference, what: str, found: object, wanted: object) -> None:
        """Compare what an engine did in a case that is not about a delta's tokens."""
        right = found == wanted
        _line(self.engine, reference.name, what, "", "as expected" if right else "NO", "")
        if not right:
            self.failures.append(f"{reference.name}, {what}: {found!r} instead of {wanted!r}")

    def close(self) -> None:
        """Leave with status 1 if anything differed."""
        for failure in self.failures:
            print(f"differs: {failure}", file=sys.stderr)
        sys.exit(1 if self.failures else 0)


def _line(*cells: str) -> None:
    print("".join(f"{cell:<{width}}" for cell, width in zip(cells, (20, 7, 40, 9, 13, 11), strict=True)), flush=True)


def references(arguments: list[str]) -> list[Reference]:
    """Read the references of the models that the command line names; of all, where it names none."""
    if unknown := set(arguments) - set(MODELS):
        sys.exit(f"no model {', '.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    return [Reference.read(name) for name in arguments or MODELS]


@contextmanager
def refusal(kind: type[Exception], found: list[str]) -> Iterator[None]:
    """Note the message of an error that is expected."""
    try:
        yield
    except kind as error:
        found.append(str(error))


def low_rank(adapter: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a PEFT directory's LoRA as A `[r, in]` and B `[out, r]` by module, the factor of each folded into its B."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    pairs = {}
    for key in sorted(tensors):
        module, kind, ending = key.removeprefix(PREFIX).rpartition(".lora_A.weight")
        if not kind:
            if not key.endswith(".lora_B.weight"):
                raise ValueError(f"{adapter}: {key} is no factor of a LoRA")
            continue
        if ending or not key.startswith(PREFIX):
            raise ValueError(f"{adapter}: {key} is no key that PEFT writes")
        down, up = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
        pairs[module] = down, up * np.float32(_factor(config, module, len(down)))
    if 2 * len(pairs) < len(tensors):
        raise ValueError(f"{adapter}: there is a B without its A")
    return pairs


def _factor(config: dict[str, Any], module: str, rank: int) -> float:
    declared = _for_module(config.get("rank_pattern"), module, config["r"])
    if declared != rank:
        raise ValueError(f"{module}: the rank is {declared} in the configuration and {rank} in the tensors")
    alpha = _for_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _for_module(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first key that its name ends with."""
    found = (value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(found, default)
