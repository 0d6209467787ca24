"""`train:`, hints for whoever trains a delta: what an optimizer and a scheduler want to know. No plan needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.documents.document import Document
from deltaspec.language.selectors import Part
from deltaspec.methods.base import Method
from deltaspec.methods.registry import builtin_methods

Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
Steps = Annotated[int, Field(ge=0, le=1_000_000_000)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Train(Part):
    """Hints for whoever trains a delta; `c.parameter_groups()` makes an optimizer's groups of them."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})
    lr: float | None = Field(None, gt=0, le=1e6)
    """Learning rate."""
    weight_decay: float | None = Field(None, ge=0, le=1e6)
    """Weight decay of all its parameters."""
    lr_ratio: float | None = Field(None, gt=0, le=1e6)
    """LoRA+ (arXiv:2402.12354): how many times `lr` the learning rate of the second factor (B) is."""
    warmup: Steps | Share | None = None
    """Steps in which the learning rate rises from 0, or which part of all steps (0.1)."""
    schedule: Schedule | None = None
    """How the learning rate falls after them; left out, it stays."""
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    """Seed of the order of its training data. (Its first values are drawn by the spec's `seed`.)"""

    def to_data(self) -> dict[str, Any]:
        """Return the hints that are given."""
        return self.model_dump(mode="json", exclude_none=True)


def check(document: Document, methods: Mapping[str, Method]) -> Iterator[Diagnostic]:
    """Return the findings about the hints of a document, beside those of the schema."""
    listed = document.data.get("deltas")
    for index, delta in enumerate(listed if isinstance(listed, list) else ()):
        hints = delta.get("train") if isinstance(delta, dict) else None
        if not isinstance(hints, dict) or "lr_ratio" not in hints or "from" in delta:
            continue
        path = ("deltas", index, "train", "lr_ratio")
        method = methods.get(delta["method"]) if isinstance(delta.get("method"), str) else None
        if method is not None and not method.faster:
            takers = ", ".join(name for name, known in builtin_methods().items() if known.faster)
            message = f"lr_ratio: {method.name} has no second factor that could learn faster"
            yield document.diagnostic("DS229", message, path, f"delete it; it is for {takers}", key=True)
        elif "lr" not in hints:
            message = "lr_ratio is a multiple of lr, which is not given"
            yield document.diagnostic("DS229", message, path, "write lr, too, such as lr: 1e-3", key=True)
