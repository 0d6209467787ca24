"""How a compiled model looks to other libraries: like its backbone, in what it says to be and in what is set on it."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from deltaspec.backbone.reserved import home
from deltaspec.compiler.adapter_verbs import ADAPTERS, adapter_verb
from deltaspec.names.paths import below, is_inside
from deltaspec.runtime.verbs import Verb

_CLASS: Any = vars(object)["__class__"]


class Face(nn.Module):
    """The part of a compiled model that other libraries ask what it is."""

    # Not in a class with `super()` in it: there, this name is a cell of its own.
    @property
    def __class__(self) -> type:
        """Of transformers' models too, where the backbone is one: Trainer lets only those save themselves."""
        backbone: Any = self.__dict__.get("_modules", {}).get("backbone")
        transformers: Any = sys.modules.get("transformers.modeling_utils")
        if transformers is None or not isinstance(backbone, transformers.PreTrainedModel):
            return type(self)
        return _standing_for(type(backbone))  # type: ignore[arg-type]  # mypy takes no class that may be any for hashable

    @__class__.setter
    def __class__(self, kind: type[Any]) -> None:
        """Become of a class that another library derived from the one that this says to be of (FSDP2 does)."""
        shown, real = self.__class__, type(self)
        bases = tuple(real if base is shown else base for base in kind.__bases__)
        members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        _CLASS.__set__(self, kind if bases == kind.__bases__ else type(kind.__name__, bases, members))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is the backbone's there, where it is read."""
        backbone = self.__dict__.get("_modules", {}).get("backbone")
        if backbone is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(backbone, name):
            nn.Module.__setattr__(self, name, value)
        else:
            setattr(backbone, name, value)

    def _get_name(self) -> str:
        return type(self).__name__


@functools.cache
def _standing_for(kind: type[Any]) -> type:
    """Return the class that a compiled model of such a backbone says to be of: a subclass of that."""
    return type(f"Compiled{kind.__name__}", (kind,), {"__module__": kind.__module__})


def attribute(backbone: nn.Module, name: str) -> Any:
    """Return an attribute that a compiled model has from its backbone. Verbs of PEFT say what stands for them."""
    try:
        found = getattr(backbone, name)
    except AttributeError:
        if name in ADAPTERS:
            raise adapter_verb(name) from None
        raise
    if name in ADAPTERS and isinstance(found, Verb):
        raise adapter_verb(name)
    return found


def take_backbone_names(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Take the tensors of deltas by the names that they have in the backbone, too, as its checkpoints do.

    A hook of a compiled model, before it loads a state.
    """
    where = home(model.get_submodule("backbone"))
    for key in [key for key in state if is_inside(key, where)]:
        state[below("backbone", key)] = state.pop(key)
