"""The contract's clauses on deltas that act in part, and on single rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaspec.backbone.clone import clone
from deltaspec.backbone.inputs import call_arguments
from deltaspec.contract.trial import Case, Outputs, floats, require, same
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods


def strength(case: Case) -> None:
    """Check that a delta at strength 0 is not there, to the bit, at 1 wholly, and in between neither; or is refused."""
    compiled = case.compile()
    # torch picks kernels by requires_grad, so the measure is the model out of training.
    bare = case.run(clone(case.model).requires_grad_(False))
    compiled.only("one")
    whole = case.run(compiled)
    try:
        compiled.only({"one": 0.0})
    except DeltaSpecError as error:
        codes = {finding.code for finding in error.diagnostics}
        refuses = methods()[case.method].strength is None
        require(refuses and codes == {"DS446"}, f"strength 0 was refused: {error}")
        require(compiled.attached == ("one",), "a refused strength changed what is attached")
        return
    require(same(case.run(compiled), bare), "at strength 0 the output is not the bare backbone's")
    compiled.only({"one": 0.5})
    half = case.run(compiled)
    require(not same(half, bare) and not same(half, whole), "at strength 0.5 the output is that of 0 or of 1")
    compiled.attach("one", strength=1.0)
    require(same(case.run(compiled), whole), "at strength 1 the output is not the attached delta's")


def rows(case: Case) -> None:
    """Check that each row of a mixed batch is what it is with its delta attached, or that mixing is refused."""
    compiled = case.compile()
    args, kwargs = call_arguments(case.inputs)
    size = next(value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    names = [("one", None, "two")[row % 3] for row in range(size)]
    alone: dict[str | None, Outputs] = {}
    for name in dict.fromkeys(names):
        compiled.only(*([name] if name else []))
        alone[name] = floats(case.run(compiled))
    compiled.detach()
    try:
        with torch.no_grad():
            mixed = floats(compiled(*args, **kwargs, deltas=names))
    except DeltaSpecError as error:
        codes = {finding.code for finding in error.diagnostics}
        # A site may be one where no method can tell rows apart (DS441, DS442), which is said before they matter.
        require(codes <= {"DS441", "DS442", "DS447"}, f"a mixed batch failed: {error}")
        return
    require(methods()[case.method].promises.per_row, "rows mixed, though the method does not promise it")
    for row, name in enumerate(names):
        for ours, theirs in zip(mixed, alone[name], strict=True):
            if ours.shape[:1] == (size,):
                # An encoder's states have places for the longest prompt; those of other rows are behind their own.
                mine = ours[row, : theirs.shape[1]] if ours.dim() > 2 else ours[row]
                worst = float((mine - theirs[row]).abs().max() / (1 + theirs[row].abs().max()))
                require(worst <= case.tolerance, f"row {row} ({name}) is {worst:.1e} from what it is alone")
