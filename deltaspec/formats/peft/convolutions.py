"""What PEFT's layers around convolutions compute otherwise than the convolution itself would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

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
        if at.row.kind == "conv":
            module: Any = adapter.base.model.get_submodule(at.fqn)
            _refuse(adapter, at.fqn, ignored_geometry(module), "merge it with PEFT: model.merge_and_unload()")


def refuse_ignored_padding(adapter: Adapter, found: Iterable[Found]) -> None:
    """Refuse convolutions whose padding mode PEFT leaves out: it convolves with the change of the weight by itself."""
    for at in found:
        module = adapter.base.model.get_submodule(at.fqn)
        _refuse(adapter, at.fqn, ignored_padding(module), "train it again without this module")


def refuse_ignored_dilation(adapter: Adapter, fqn: str) -> None:
    """Refuse a convolution whose dilation or padding mode PEFT's layer of LoRA leaves out."""
    if adapter.base.rows[fqn].kind == "conv":
        _refuse(
            adapter, fqn, ignored_dilation(adapter.base.model.get_submodule(fqn)), "train it again without this module"
        )


def ignored_geometry(module: Any) -> list[str]:
    """Return what PEFT's layers of HRA and BOFT leave out of a convolution; of another module, nothing."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return []
    uneven = [name for name in ("stride", "padding") if len(set(getattr(module, name))) > 1]
    return [*uneven, *ignored_dilation(module)]


def ignored_padding(module: Any) -> list[str]:
    """Return the padding mode, where a convolution has one that PEFT leaves out; of another module, nothing."""
    padded = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode != "zeros"
    return ["padding_mode"] * padded


def ignored_dilation(module: Any) -> list[str]:
    """Return what PEFT's layer of LoRA leaves out of a convolution; of another module, nothing."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return []
    return ["dilation"] * (set(module.dilation) != {1}) + ignored_padding(module)


def _refuse(adapter: Adapter, fqn: str, ignored: list[str], hint: str) -> None:
    if ignored:
        message = f"{adapter.type} on {fqn}: PEFT leaves out its {' and '.join(ignored)}, and runs another "
        adapter.find("DS544", message + "convolution than the model has", hint, CONFIG)
