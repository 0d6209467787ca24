"""Answers of the real PEFT: of what `save_as("peft", …)` writes for it, or of a directory of its own."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from deltaspec.backbone.inputs import dummy_inputs, moved_to
from deltaspec.compiler.answers import Answers, compared, dtype_of
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.compiler.restore import restore
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.serving.trial import evaluating
from deltaspec.storage.agreement import Verification
from deltaspec.storage.golden import Golden, answer_of, given
from deltaspec.verification.packages import loaded

_TOKENS = 8


class PeftAnswers:
    """Runs the PEFT form of deltas on a copy of the model."""

    def __init__(self, compiled: CompiledModel, model: nn.Module) -> None:
        self._compiled, self._model = compiled.view(), model

    def of(self, inputs: Mapping[str, Tensor], attached: Mapping[str, float]) -> Tensor:
        """Return PEFT's answer. Raises DeltaSpecError where PEFT cannot say these deltas, or is not installed."""
        self._compiled.only(dict(attached))
        with tempfile.TemporaryDirectory() as folder:
            self._compiled.save_as("peft", folder, *attached)
            return peft_answer(self._model, folder, inputs)


def peft_answer(model: nn.Module, folder: str | PathLike[str], inputs: Mapping[str, Tensor]) -> Tensor:
    """Load a directory of PEFT onto a copy of a model by PEFT itself, and return its answer. Raises DeltaSpecError."""
    tuned = loaded("peft", "peft").PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    args, kwargs = given(moved_to(dict(inputs), str(tuned.device)))
    with evaluating(tuned):
        return answer_of(tuned(*args, **kwargs)).detach().cpu()


def verify_peft(
    directory: str | PathLike[str], model: nn.Module, tolerance: float | None, dtype: str | None
) -> Verification:
    """Compare what `restore` makes of a directory of PEFT with what PEFT gives, on tokens of the model's own."""
    inputs = _inputs(model)
    expected = peft_answer(model, directory, inputs)
    compiled = restore(model, directory)
    answers = Answers(compiled.view())
    golden = Golden(inputs, dict(compiled.strengths), expected, answers.of(inputs, {}))
    found = answers.of(inputs, golden.attached)
    return Verification([compared(golden, found, dtype or dtype_of(model), tolerance)])


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return inputs for a transformers model: the same tokens each time, other ones at each position."""
    inputs, config = dummy_inputs(model), getattr(model, "config", None)
    if inputs is None:
        message = "nothing says which inputs this model takes"
        hint = "restore the directory, and compare with inputs of your own: c.save(dir, golden=inputs)"
        raise DeltaSpecError([Diagnostic("DS553", message, file="<model>", suggestion=hint)])
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int):
        ids = torch.arange(_TOKENS)[None] * 7919 % size
        inputs = {key: ids if value.dtype == torch.long else value for key, value in inputs.items()}
        inputs |= {"attention_mask": torch.ones_like(ids)} if "input_ids" in inputs else {}
    return {key: torch.ones_like(value) if value.is_floating_point() else value for key, value in inputs.items()}
