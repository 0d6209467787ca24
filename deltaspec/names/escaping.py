"""Names of deltas where only some characters may stand: as parts of dotted names, and as names of files.

What is not a letter, a digit, `-` or `_` of ASCII is written `%` and two hexadecimal digits a byte. So no two names
become one, each can be read back, and none can say anything of folders.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import sha256
from urllib.parse import unquote

_PLAIN = "[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*"
_POINT = "[A-Za-z_][A-Za-z0-9_.]*=[A-Za-z0-9_.+:%-]+"
PLAIN_NAME = f"^{_PLAIN}$"
"""Names of deltas, as users of PEFT write them: `user/lora`, `1_task`, `v1.2`."""
DELTA_NAME = rf"^{_PLAIN}(\[{_POINT}(,{_POINT})*\])?$"
"""Such names, and those of the deltas of a matrix: `french[rank=4,lr=1e-3]`."""
MOST = 128
"""Characters of such a name at most."""
_OTHER = re.compile(r"[^A-Za-z0-9_-]", re.ASCII)
_MARKS = re.compile(r"[~%/\\]")
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))})
"""Names that are no files on Windows, whatever follows them behind a dot."""
_LONG = 150


@lru_cache(maxsize=1 << 14)
def escaped(name: str) -> str:
    """Return a name without dots, slashes or anything else that means something elsewhere."""
    return _OTHER.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), name)


def unescaped(text: str) -> str:
    """Return the name that was escaped."""
    return unquote(text)


def flat(name: str) -> str:
    """Write a dotted name as one part of another, `encoder~layer~0`: that is no path on a disk, either."""
    return _MARKS.sub(lambda found: f"%{ord(found[0]):02X}", name).replace(".", "~")


def dotted(part: str) -> str:
    """Return the dotted name that was written flat."""
    name = part.replace("~", ".")
    return unquote(name) if "%" in name else name


def file_stem(name: str) -> str:
    """Return how the name of a file of a delta begins; long ones are cut, and told apart by a digest."""
    stem = escaped(name)
    if name.casefold() in _DEVICES:
        stem = f"%{ord(name[0]):02X}{stem[1:]}"
    return stem if len(stem) <= _LONG else f"{stem[: _LONG - 17].rstrip('%')}-{sha256(name.encode()).hexdigest()[:16]}"
