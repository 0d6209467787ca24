"""onnxruntime: one graph whose LoRA factors are inputs, fed as tensors or from `.onnx_adapter` files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from _common import BASE, Reference, Report, low_rank, references, refusal
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

Factors = Mapping[str, np.ndarray]
"""LoRA factors by the names of the graph's inputs."""


class WithFactors(nn.Module):
    """A linear layer that adds a LoRA which is given to the whole model."""

    def __init__(self, base: nn.Linear, name: str, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.base, self.name, self.given = base, name, given

    def forward(self, x: Tensor) -> Tensor:
        """Compute base(x) + B A x."""
        down, up = self.given[f"{self.name}.lora_A"], self.given[f"{self.name}.lora_B"]
        return self.base(x) + F.linear(F.linear(x, down), up)


class LogitsOf(nn.Module):
    """A causal model with the LoRA of every projection as an argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.given: dict[str, Tensor] = {}
        self.names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        for name in self.names:
            model.set_submodule(name, WithFactors(model.get_submodule(name), name, self.given))
        self.model = model

    def forward(self, input_ids: Tensor, factors: dict[str, Tensor]) -> Tensor:
        """Return logits `[rows, tokens, vocabulary]`."""
        self.given.update(factors)
        return self.model(input_ids=input_ids, use_cache=False).logits


def export(reference: Reference) -> Path:
    """Write the graph, with a default for each factor: zeros of rank 1, so that those left out change nothing.

    Each module has a rank of its own. Without a default of the same name, an `.onnx_adapter` cannot set an input.
    """
    path = reference.built("onnxruntime") / "model.onnx"
    net = LogitsOf(AutoModelForCausalLM.from_pretrained(reference.model, attn_implementation="eager").eval())
    example, free = {}, {}
    rank = tokens = torch.export.Dim.DYNAMIC
    for name in net.names:
        out_width, in_width = net.model.get_submodule(name).base.weight.shape
        example |= {f"{name}.lora_A": torch.zeros(4, in_width), f"{name}.lora_B": torch.zeros(out_width, 4)}
        free |= {f"{name}.lora_A": {0: rank}, f"{name}.lora_B": {1: rank}}
    program = torch.onnx.export(
        net, (), kwargs={"input_ids": torch.ones(1, 5, dtype=torch.int64), "factors": example}, dynamo=True,
        dynamic_shapes={"input_ids": {1: tokens}, "factors": free}, input_names=["input_ids", *example],
        opset_version=20, verbose=False,
    )  # fmt: skip
    program.save(str(path), external_data=True)
    graph = onnx.load(path, load_external_data=False)
    for given in graph.graph.input[1:]:
        sizes = [size.dim_value or 1 for size in given.type.tensor_type.shape.dim]
        graph.graph.initializer.append(numpy_helper.from_array(np.zeros(sizes, np.float32), given.name))
    onnx.save(graph, path)
    return path


def inputs_of(adapter: Path) -> Factors:
    """Read a PEFT directory as inputs of the graph; there is no alpha, so it is folded into B."""
    pairs = low_rank(adapter).items()
    return {f"{name}.lora_{side}": factor for name, pair in pairs for side, factor in zip("AB", pair, strict=True)}


def adapter_file(factors: Factors, path: Path) -> ort.LoraAdapter:
    """Write an `.onnx_adapter` file and load it. The versions that it holds are checked by nobody."""
    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(f)) for name, f in factors.items()}
    form.set_parameters(values)
    form.export_adapter(str(path))
    loaded = ort.LoraAdapter()
    loaded.Load(str(path))
    return loaded


def unknown(session: ort.InferenceSession, factors: Factors) -> list[str]:
    """Return what fits no input of the graph: onnxruntime says so when it runs. A pair left out is silently zero."""
    return sorted(factors.keys() - {given.name for given in session.get_overridable_initializers()})


def greedy(
    session: ort.InferenceSession, reference: Reference, factors: Factors, active: ort.LoraAdapter | None = None
) -> list[list[int]]:
    """Return the new tokens of all prompts. The graph has no cache: every step computes the whole text."""
    options = ort.RunOptions()
    if active is not None:
        options.add_active_adapter(active)
    found = []
    for prompt in reference.prompts:
        ids = np.array([prompt])
        for _ in range(reference.new_tokens):
            (logits,) = session.run(None, {"input_ids": ids, **factors}, options)
            ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], 1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def check(reference: Reference, report: Report) -> None:
    """Run all deltas of one model in both ways, on one session."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # it warns once for each default
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(export(reference), settings, providers=["CPUExecutionProvider"])
    folder, loaded = reference.built("onnxruntime"), {}
    for delta in reference.deltas:
        factors = inputs_of(reference.adapter(delta))
        report.expect(reference, f"{delta}: names of no input", unknown(session, factors), [])
        report.compare(reference, "LoRA as inputs", delta, greedy(session, reference, factors))
        loaded[delta] = adapter_file(factors, folder / f"{delta}.onnx_adapter")
    for delta in reference.deltas:
        report.compare(reference, ".onnx_adapter", delta, greedy(session, reference, {}, loaded[delta]))
    report.compare(reference, "no adapter", BASE, greedy(session, reference, {}))
    refused: list[str] = []
    strange = {**inputs_of(reference.adapter(delta)), "nobody": np.zeros((2, 2), np.float32)}
    stray = adapter_file(strange, folder / "stray.onnx_adapter")
    with refusal(ort.capi.onnxruntime_pybind11_state.InvalidArgument, refused):
        greedy(session, reference, {}, stray)
    report.expect(reference, "an unknown name is refused", "nobody" in "".join(refused), True)


if __name__ == "__main__":
    made = Report("onnxruntime")
    for each in references(sys.argv[1:]):
        check(each, made)
    made.close()
