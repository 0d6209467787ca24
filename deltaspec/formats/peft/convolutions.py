"""What PEFT's layers around convolutions compute otherwise than the convolution itself would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from deltaspec.formats.peft.adapter import CONFIG

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter
    from deltaspec.formats.peft.sites import Found


def refuse_ignored_geometry(adapter: Adapter, found: Iterable[Found]) -> None:
    """Refuse convolutions that PEFT runs with another geometry than their own.

    Its layers of HRA and BOFT take the first number of the stride and of the padding for both, and leave out dilation
    and padding mode: they run, and compute something else than the convolution does.
    """
    for at in found:
        if at.row.kind != "conv":
            continue
        module = adapter.base.model.get_submodule(at.fqn)
        stride, padding, dilation = (getattr(module, name) for name in ("stride", "padding", "dilation"))
        ignored = [name for name, value in (("stride", stride), ("padding", padding)) if len(set(value)) > 1]
        ignored += ["dilation"] * (set(dilation) != {1}) + ["padding_mode"] * (module.padding_mode != "zeros")  # type: ignore[arg-type]
        if ignored:
            message = f"{adapter.type} on {at.fqn}: PEFT leaves out its {' and '.join(ignored)}, and runs another "
            message += "convolution than the model has"
            adapter.find("DS544", message, "merge it with PEFT: model.merge_and_unload()", CONFIG)
