"""onnxruntime-genai: its builder's graph with LoRA factors made inputs, set by `.onnx_adapter` files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
from _common import BASE, PREFIX, Reference, Report, low_rank, references, refusal
from check import Factors, adapter_file
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

RANK = 4
"""Any rank that the builder may see: what it builds takes all."""


def everywhere(reference: Reference) -> Path:
    """Write a LoRA of zeros on every projection, for the builder: it makes places for the factors that it is given."""
    folder = reference.built("onnxruntime-genai") / "everywhere"
    folder.mkdir()
    found = {}
    for key, weight in load_file(reference.model / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if module.endswith("_proj"):
            found[f"{PREFIX}{module}.lora_A.weight"] = np.zeros((RANK, weight.shape[1]), np.float32)
            found[f"{PREFIX}{module}.lora_B.weight"] = np.zeros((weight.shape[0], RANK), np.float32)
    modules = sorted({key.split(".")[-3] for key in found})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def build(reference: Reference) -> Path:
    """Run the builder, then make inputs of the factors, of any rank, with zeros of rank 1 as defaults."""
    folder = reference.built("onnxruntime-genai")
    shutil.rmtree(folder)
    built, made = reference.built("onnxruntime-genai") / "built", folder / "model"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", reference.model, "-o", built]
    options = ["-p", "fp32", "-e", "cpu", "--extra_options", f"adapter_path={everywhere(reference)}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the builder failed:\n{done.stdout}{done.stderr}")
    model = onnx.load(built / "model.onnx")
    graph = model.graph
    for factor in graph.initializer:
        if ".lora_" in factor.name:
            sizes, free = [*factor.dims], 1 if ".lora_A." in factor.name else 0
            named: list[int | str] = [*sizes]
            named[free], sizes[free] = f"rank of {factor.name.partition('.lora_')[0]}", 1
            graph.input.append(helper.make_tensor_value_info(factor.name, TensorProto.FLOAT, named))
            factor.CopyFrom(numpy_helper.from_array(np.zeros(sizes, np.float32), factor.name))
    # The builder noted the shapes of what is between the factors, with the rank that it saw.
    for value in [value for value in graph.value_info if "lora_A" in value.name]:
        graph.value_info.remove(value)
    shutil.copytree(built, made, ignore=shutil.ignore_patterns("model.onnx*"))
    onnx.save(model, made / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    shutil.rmtree(built)
    return made


def inputs_of(adapter: Path) -> Factors:
    """Read a PEFT directory under the builder's names; its factors are transposed."""
    pairs = low_rank(adapter).items()
    return {
        f"{name.replace('self_attn', 'attn')}.lora_{side}.MatMul.weight": factor.T
        for name, pair in pairs
        for side, factor in zip("AB", pair, strict=True)
    }


def greedy(model: og.Model, reference: Reference, adapters: og.Adapters, delta: str) -> list[list[int]]:
    """Return the new tokens of all prompts, under a delta or none. Generation stops at an end of text, unsaid."""
    found = []
    for prompt in reference.prompts:
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + reference.new_tokens, do_sample=False)
        generator = og.Generator(model, settings)
        if delta != BASE:
            generator.set_active_adapter(adapters, delta)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
    return found


def check(reference: Reference, report: Report) -> None:
    """Run all deltas of one model on one session."""
    folder = build(reference)
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    known = {given.name for given in onnx.load(folder / "model.onnx", load_external_data=False).graph.input}
    for delta in reference.deltas:
        factors = inputs_of(reference.adapter(delta))
        report.expect(reference, f"{delta}: names of no input", sorted(factors.keys() - known), [])
        path = folder / f"{delta}.onnx_adapter"
        adapter_file(factors, path)
        adapters.load(str(path), delta)
    for delta in (BASE, *reference.deltas, BASE):
        report.compare(reference, ".onnx_adapter", delta, greedy(model, reference, adapters, delta))
    refused: list[str] = []
    with refusal(Exception, refused):  # the binding has no class of its own
        greedy(model, reference, adapters, "nobody")
    report.expect(reference, "an unknown adapter is refused", "not found" in "".join(refused), True)


if __name__ == "__main__":
    made = Report("onnxruntime-genai")
    for each in references(sys.argv[1:]):
        check(each, made)
    made.close()
