"""vLLM's OpenAI server on a CPU: adapters loaded at run time, resolved by name and by content, in mixed batches."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _common import BASE, Reference, Report, references
from deltaspec_vllm.held import identity_of
from safetensors.numpy import load_file, save_file
from server import Server, serving

Tensors = dict[str, np.ndarray]


def same(tensors: Tensors) -> Tensors:
    """Leave tensors as they are."""
    return tensors


def elsewhere(tensors: Tensors) -> Tensors:
    """Put tensors where the model has no modules: vLLM would serve the base."""
    return {key.replace("model.layers", "transformer.h"): tensor for key, tensor in tensors.items()}


def short(tensors: Tensors) -> Tensors:
    """Cut a row of one B: vLLM would serve it."""
    cut = next(key for key in tensors if "lora_B" in key)
    return {**tensors, cut: tensors[cut][:-1]}


SPOILT: Mapping[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "dora": ({"use_dora": True}, same),
    "rank": ({"r": 2}, same),
    "elsewhere": ({}, elsewhere),
    "short": ({}, short),
}
"""Copies of an adapter that must be refused: what is changed in the configuration, and in the tensors."""


def library_of(reference: Reference) -> Path:
    """Make the folder that the resolver serves: the deltas, spoilt copies of one, and ways out of the folder."""
    folder = reference.built("vllm") / "library"
    shutil.rmtree(folder, ignore_errors=True)
    for delta in reference.deltas:
        shutil.copytree(reference.adapter(delta), folder / delta)
        shutil.copytree(reference.saved(delta), folder / f"saved-{delta}")
    good = reference.adapter(reference.deltas[0])
    for name, (changed, change) in SPOILT.items():
        shutil.copytree(good, folder / name)
        config = json.loads((good / "adapter_config.json").read_text(encoding="utf-8"))
        (folder / name / "adapter_config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")
        tensors = change(load_file(good / "adapter_model.safetensors"))
        spoilt = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        save_file(spoilt, folder / name / "adapter_model.safetensors", {"format": "pt"})
    (folder / "link").symlink_to(good)
    return folder


def at_once(server: Server, reference: Reference, names: Mapping[str, str]) -> dict[str, list[list[int]]]:
    """Ask for all prompts under all these models at once; return their tokens by name."""
    asked = [(name, prompt) for prompt in reference.prompts for name in names]

    def ask(pair: tuple[str, Sequence[int]]) -> list[int]:
        name, prompt = pair
        return server.complete(names[name], prompt, reference.new_tokens)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [*pool.map(ask, asked)]
    return {name: [new for (of, _), new in zip(asked, answers, strict=True) if of == name] for name in names}


def check(reference: Reference, report: Report) -> None:
    """Run all deltas of one model on one server."""
    library = library_of(reference)
    # All deltas are loaded four times, under names of four kinds. On CPUs, rows without an adapter get what is in the
    # last slot, so one slot more than there are adapters stays empty.
    slots = 4 * len(reference.deltas) + 1
    with serving(reference.model, slots, library, reference.built("vllm") / "server.log") as server:
        report.compare(reference, "no adapter", BASE, at_once(server, reference, {BASE: server.model})[BASE])
        ways = {
            "loaded at run time": {delta: f"loaded-{delta}" for delta in reference.deltas},
            "resolved by name": {delta: delta for delta in reference.deltas},
            "resolved by content": {delta: identity_of(library / delta) for delta in reference.deltas},
            "exported at the first request": {delta: f"saved-{delta}" for delta in reference.deltas},
        }
        for delta, name in ways["loaded at run time"].items():
            wanted = {"lora_name": name, "lora_path": str(reference.adapter(delta))}
            status, text = server.post("/v1/load_lora_adapter", wanted)
            report.expect(reference, f"load {delta}", (status, status == 200 or text), (200, True))
        for way, names in ways.items():
            for name, tokens in at_once(server, reference, {**names, BASE: server.model}).items():
                report.compare(reference, f"{way}, mixed", name, tokens)
        refusals(server, reference, report)


def refusals(server: Server, reference: Reference, report: Report) -> None:
    """Ask for what must not be served: 400 with deltaspec's reason, or 404."""
    prompt = reference.prompts[0]
    for name in SPOILT:
        status, text = server.ask(name, prompt, 1)
        print(f"    {name}: {status} {text[:400]}")
        report.expect(reference, f"{name}: refused with a reason", (status, "[DS" in text), (400, True))
    for name in ("link", "../adapters/every", "nobody", f"content:{'0' * 64}"):
        status, _ = server.ask(name, prompt, 1)
        report.expect(reference, f"{name[:20]}: not found", status, 404)


if __name__ == "__main__":
    made = Report("vLLM")
    for each in references(sys.argv[1:]):
        check(each, made)
    made.close()
