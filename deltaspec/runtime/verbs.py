"""Methods of a backbone that do another thing once it is compiled: entries of its modules' own `__dict__`.

They are those of modules that can save themselves (`save_pretrained`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Verb:
    """Stands for a method of one module. A copy of it does nothing: who makes a view of the copy puts in its own."""

    def __init__(self, do: Callable[..., Any] | None) -> None:
        self.do = do

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what stands for the method."""
        assert self.do is not None
        return self.do(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> Verb:
        """Copy without what it does, which is bound to the module that is being copied."""
        return Verb(None)

    def __reduce__(self) -> Any:
        """Pickle without what it does."""
        return Verb, (None,)


def put(module: nn.Module, name: str, do: Callable[..., Any]) -> None:
    """Let a method of a module do this."""
    module.__dict__[name] = Verb(do)


def remove(backbone: nn.Module) -> None:
    """Let the modules of a copy of a backbone have their own methods again."""
    for module in backbone.modules():
        own = module.__dict__ if hasattr(type(module), "save_pretrained") else {}
        for name in [name for name, value in own.items() if type(value) is Verb]:
            del own[name]
