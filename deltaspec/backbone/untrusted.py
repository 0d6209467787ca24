"""What a configuration or a tokenizer from elsewhere may not do: run code of a repository, or ask whether to.

transformers asks on standard input where `trust_remote_code` is not given, as in the constructors of models that build
models of nested configurations; `yes |` would answer. It also downloads attention kernels by their hub names.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def no_questions() -> Iterator[None]:
    """Let nothing inside read standard input: it is at its end."""
    with patch.object(sys, "stdin", io.StringIO()):
        yield


@contextmanager
def no_code() -> Iterator[None]:
    """Let transformers neither run code of a repository nor load a kernel inside, and ask nothing.

    Raises what transformers does where it is told not to trust a repository: a ValueError that says so.
    """
    import transformers.dynamic_module_utils
    import transformers.modeling_utils

    with ExitStack() as stack:
        stack.enter_context(no_questions())
        stack.enter_context(patch.object(transformers.dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0))
        # Else `flash_attention_2` without that package means a kernel from the hub.
        stack.enter_context(patch.object(transformers.modeling_utils, "is_kernels_available", _none_there))
        yield


def kernel_in(config: Any) -> str | None:
    """Return the kernel of a hub that a configuration names, or one nested in it; None where there is none.

    `config` is a configuration of transformers, or the data of one.
    """
    pending, seen = [config], set[int]()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, list | tuple):
            pending += part
            continue
        for key, value in _items(part):
            if str(key).strip("_").removesuffix("_internal").endswith("_implementation"):
                named = value.values() if isinstance(value, Mapping) else [value]
                if kernels := [name for name in named if isinstance(name, str) and "/" in name]:
                    return kernels[0]
            if isinstance(value, dict | list | tuple) or hasattr(value, "__dict__"):
                pending.append(value)
    return None


def _items(part: Any) -> list[tuple[Any, Any]]:
    return list((part if isinstance(part, Mapping) else getattr(part, "__dict__", {})).items())


def _none_there(*_: Any, **__: Any) -> bool:
    return False
