"""Names of the tensors in PEFT's files: which module each belongs to, and what it is there."""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "base_model.model."
"""What stands before the module's own name in a key that PEFT wrote."""
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
"""Segments that torch.compile, FSDP, checkpointing and DataParallel put into names."""
_PARTS = (
    ("A", re.compile(r"(.+)\.lora_A(\.[^.]+)?\.weight")),
    ("B", re.compile(r"(.+)\.lora_B(\.[^.]+)?\.weight")),
    ("lora_bias", re.compile(r"(.+)\.lora_B\.bias")),
    ("embedding_A", re.compile(r"(.+)\.lora_embedding_A")),
    ("embedding_B", re.compile(r"(.+)\.lora_embedding_B")),
    ("magnitude", re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")),
    ("tokens", re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta")),
    ("base", re.compile(r"(.+)\.base_layer\.(?:weight|bias)")),
    ("bias", re.compile(r"((?:(?!lora_).)+)\.bias")),
    ("weight", re.compile(r"((?:(?!lora_).)+)\.[^.]+")),
)
LORA = ("A", "B", "embedding_A", "embedding_B")
"""Parts that make up a low-rank update."""


@dataclass(frozen=True, slots=True)
class Key:
    """The name of a tensor, taken apart."""

    name: str
    """As it stands in the file."""
    module: str
    """Module as the file names it, without PEFT's prefix; the whole name where nothing is known of it."""
    part: str
    """One of `_PARTS`; empty where it is none of them."""
    prefixed: bool
    """Whether it begins with PEFT's prefix."""
    named: bool = False
    """Whether it holds the adapter's name, which PEFT leaves out when it saves."""

    @property
    def site(self) -> str:
        """Return the module's name without the wrappers that PEFT puts around it."""
        return self.module.replace(".base_layer", "")

    @property
    def unwrapped(self) -> str:
        """Return the module's name without what other tools put into names."""
        return _WRAPPERS.sub("", self.site)


def parsed(name: str) -> Key:
    """Take the name of a tensor apart."""
    for part, pattern in _PARTS:
        if found := pattern.fullmatch(name):
            module: str = found[1]
            named = len(found.groups()) > 1 and found[2] is not None
            return Key(name, module.removeprefix(PREFIX), part, module.startswith(PREFIX), named)
    return Key(name, name.removeprefix(PREFIX), "", name.startswith(PREFIX))
