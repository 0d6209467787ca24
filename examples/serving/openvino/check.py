"""OpenVINO GenAI: one pipeline, adapters named by each request, from PEFT's own safetensors."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from _common import BASE, PREFIX, Reference, Report, low_rank, references
from optimum.intel import OVModelForCausalLM
from safetensors.numpy import save_file

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_NUM_THREADS": 1,
}
"""The default precisions are lower, and change tokens."""


def convert(reference: Reference) -> Path:
    """Write the base in OpenVINO's form, with a cache, its weights as they are."""
    folder = reference.built("openvino")
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each branch; what it made is compared with the model
        model = OVModelForCausalLM.from_pretrained(str(reference.model), export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(folder)
    return folder


def adapter_of(reference: Reference, delta: str) -> genai.Adapter:
    """Write a PEFT directory's tensors with their factors folded into B, and load them.

    OpenVINO reads no adapter_config.json and applies one factor, which the request gives, to the whole file. What has
    ranks or alphas of its own in some modules would be silently wrong with any.
    """
    path = reference.built("openvino") / f"{delta}.safetensors"
    tensors = {}
    for module, (down, up) in low_rank(reference.adapter(delta)).items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up
    save_file(tensors, path, {"format": "pt"})
    return genai.Adapter(path)


def greedy(pipeline: genai.LLMPipeline, reference: Reference, *adapters: genai.Adapter) -> list[list[int]]:
    """Return the new tokens of all prompts under adapters at factor 1.

    A request that says nothing of adapters is under all that the pipeline was made with; none has to be said.
    """
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample, settings.ignore_eos = reference.new_tokens, False, True
    settings.apply_chat_template = False
    settings.adapters = genai.AdapterConfig()
    for adapter in adapters:
        settings.adapters.add(adapter, 1.0)
    asked = [ov.Tensor(np.array([prompt], np.int64)) for prompt in reference.prompts]
    return [[*map(int, pipeline.generate(prompt, settings).tokens[0])] for prompt in asked]


def check(reference: Reference, report: Report) -> None:
    """Run all deltas of one model on one pipeline, the last of them unknown to it when it was made."""
    folder = convert(reference)
    adapters = {delta: adapter_of(reference, delta) for delta in reference.deltas}
    *announced, late = reference.deltas
    known = genai.AdapterConfig()
    for delta in announced:
        known.add(adapters[delta], 1.0)
    pipeline = genai.LLMPipeline(folder, "CPU", adapters=known, **EXACT)
    for delta in announced:
        report.compare(reference, "named by the request", delta, greedy(pipeline, reference, adapters[delta]))
    report.compare(reference, "not known at the start", late, greedy(pipeline, reference, adapters[late]))
    report.compare(reference, "no adapter, said so", BASE, greedy(pipeline, reference))


if __name__ == "__main__":
    made = Report("OpenVINO GenAI")
    for each in references(sys.argv[1:]):
        check(each, made)
    made.close()
