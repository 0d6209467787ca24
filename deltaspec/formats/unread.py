"""A foreign directory while it is read: what is wrong with it, all of it, before anything is made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest, one_line

if TYPE_CHECKING:
    from torch import Tensor

_MOST_JSON = 16 << 20
_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that Git LFS did not fetch."""
_CODE = re.compile(r"\bGLOBAL ([\w.]+)")
"""How torch names what a pickle would have called."""
_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.int64": "I64", "torch.int32": "I32",
    "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
"""What safetensors calls the dtypes of torch."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of a tensor before its values."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it: `F32`, `BF16`."""


class Unread:
    """Reads the files of a directory and collects findings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.findings: list[Diagnostic] = []

    def find(self, code: str, message: str, suggestion: str | None = None, file: str = "") -> None:
        """Add a finding about a file of the directory, or about all of it."""
        place = str(self.folder / file) if file else str(self.folder)
        self.findings.append(Diagnostic(code, message, file=place, suggestion=suggestion))

    def unknown(self, key: str, value: object, known: Iterable[str], file: str) -> None:
        """Add the finding about a kind that cannot be read, with the known one that is near it, or all."""
        known = tuple(known)
        near = closest(value, known) if isinstance(value, str) else None
        hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
        self.find("DS545", f"{key}: {value!r} cannot be read", hint, file)

    def settle(self) -> None:
        """Raise DeltaSpecError where anything was found."""
        if self.findings:
            raise DeltaSpecError(dict.fromkeys(self.findings))

    def json(self, file: str) -> dict[str, Any]:
        """Read a JSON object. Raises DeltaSpecError where there is none."""
        try:
            if is_pipe(self.folder / file):
                raise OSError(EINVAL, "it is a pipe or a device, which has no end")
            with (self.folder / file).open("rb") as stream:
                content = stream.read(_MOST_JSON + 1)
            if len(content) > _MOST_JSON:
                raise ValueError(f"it is larger than {_MOST_JSON >> 20} MiB")
            data = json.loads(content, object_pairs_hook=_object)
            if not isinstance(data, dict):
                raise TypeError(f"it holds a {type(data).__name__}, not an object")
        except OSError as error:
            self.find("DS521", f"cannot be read: {error.strerror}", "restore the file", file)
        except (ValueError, TypeError, RecursionError) as error:
            self.find("DS522", f"is no JSON object: {error}", "restore the file", file)
        else:
            return data
        raise DeltaSpecError(self.findings)

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Read a file of tensors: safetensors, or a pickle of tensors alone, of which nothing is executed.

        Raises DeltaSpecError where it is neither.
        """
        with self._reading(file) as path:
            return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path, "cpu")

    def headers(self, file: str) -> dict[str, Header]:
        """Read what a file says of its tensors before their values. Raises DeltaSpecError as `tensors` does."""
        with self._reading(file) as path:
            if path.suffix == ".safetensors":
                return _headers(path)
            return {
                name: Header(tuple(value.shape), _DTYPES.get(str(value.dtype), "?"))
                for name, value in _pickled(path, "meta").items()
            }

    @contextmanager
    def _reading(self, file: str) -> Iterator[Path]:
        """Add a finding, and raise DeltaSpecError, where a file of tensors cannot be read."""
        path = self.folder / file
        try:
            if is_pipe(path):
                raise OSError(EINVAL, "it is a pipe or a device, which has no end")
            if _begins(path, _POINTER):
                raise _PointerError
            yield path
        except _PointerError:
            self.find("DS522", "is a pointer of Git LFS, not the file itself", "fetch it: git lfs pull", file)
        except OSError as error:
            self.find("DS521", f"cannot be read: {error.strerror or error}", "restore the file", file)
        except (ValueError, RuntimeError) as error:
            hint = "restore the file, or save the adapter again"
            self.find("DS522", f"is no file of tensors: {one_line(str(error))}", hint, file)
        else:
            return
        raise DeltaSpecError(self.findings)


class _PointerError(Exception):
    """A file of Git LFS that was not fetched."""


def is_pipe(path: Path) -> bool:
    """Return whether something is there that is neither a file nor a directory: reading it may never end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(start)) == start


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = path.read_bytes()  # a mapped file that is cut meanwhile would end the process
    try:
        found = load(content)  # in any order, another one each time
    except (SafetensorError, KeyError) as error:
        raise ValueError(_reason(error)) from error
    return {key: found[key] for key in sorted(found)}


def _reason(error: Exception) -> str:
    """Return what safetensors says, which begins in another way where it reads headers alone."""
    return str(error).removeprefix("Error while deserializing").removeprefix(" header").removeprefix(": ")


def _headers(path: Path) -> dict[str, Header]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
            return {name: Header(tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}
    except SafetensorError as error:
        raise ValueError(_reason(error)) from error


def _pickled(path: Path, device: str) -> dict[str, Tensor]:
    import pickle

    import torch

    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text goes on to tell how to run it
        code = _CODE.search(str(error))
        held = f"it holds code, {code[1]}, of which nothing was run" if code else "it is no pickle of tensors alone"
        raise ValueError(held) from error
    except EOFError as error:
        raise ValueError("it ends too early") from error
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(one_line(str(error))) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict of tensors")
    wrong = [key for key, value in found.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if wrong:
        raise ValueError(f"it holds more than tensors, such as {str(wrong[0])[:80]!r}")
    odd = [key for key, value in found.items() if not _has_values(value, device)]
    if odd:
        raise ValueError(f"{odd[0][:80]!r} is sparse, quantised or without values: no plain tensor")
    return found


def _has_values(value: Tensor, device: str) -> bool:
    """Return whether a tensor is a plain one, with values where they were asked for."""
    import torch

    return value.layout is torch.strided and not value.is_quantized and value.device.type == device


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("it has a key twice")
    return data
