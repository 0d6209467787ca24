"""Answers of ONNX Runtime: the model is exported with the deltas attached, and run there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaspec.backbone.inputs import moved_to
from deltaspec.compiler.answers import dtype_of
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.serving.trial import evaluating
from deltaspec.storage.golden import answer_of, given
from deltaspec.verification.packages import loaded


class _Answer(nn.Module):
    """A model whose output is the answer alone, called with tensors in order."""

    def __init__(self, backbone: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.backbone, self.names = backbone, names

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = given(dict(zip(self.names, tensors, strict=True)))
        return answer_of(self.backbone(*args, **kwargs))


class OnnxAnswers:
    """Exports a compiled model once for each set of deltas, and runs that."""

    def __init__(self, compiled: CompiledModel) -> None:
        self._runtime = loaded("onnx", "onnxruntime", "onnx", "onnxscript")
        self._view = compiled.view()
        if dtype_of(self._view.backbone) == "bfloat16":
            message, hint = "ONNX Runtime computes no bfloat16 on the CPU", "load the model in float32"
            raise DeltaSpecError([Diagnostic("DS553", message, file="<model>", suggestion=hint)])

    def of(self, inputs: Mapping[str, Tensor], attached: Mapping[str, float]) -> Tensor:
        """Return ONNX Runtime's answer, on the CPU. Raises DeltaSpecError (DS553) where torch cannot export this."""
        self._view.only(dict(attached))
        backbone = self._view.backbone
        module = _Answer(backbone, tuple(inputs))
        device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
        there = moved_to(dict(inputs), str(device))
        with tempfile.TemporaryDirectory() as folder, evaluating(module):
            file = str(Path(folder) / "model.onnx")
            try:
                program = torch.onnx.export(module, tuple(there.values()), dynamo=True, verbose=False)
            except torch.onnx.OnnxExporterError as error:
                message = f"torch cannot export this model to ONNX: {' '.join(str(error).split())[:300]}"
                hint = "torch.onnx.export(c.backbone, …, dynamo=True, report=True) says more"
                raise DeltaSpecError([Diagnostic("DS553", message, file="<model>", suggestion=hint)]) from error
            assert program is not None
            program.save(file)
            session = self._runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
            named = zip((given.name for given in session.get_inputs()), inputs.values(), strict=True)
            [answer] = session.run(None, {name: tensor.numpy() for name, tensor in named})
        return torch.from_numpy(answer)
