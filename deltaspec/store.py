"""Deltas on disk: per delta a safetensors file, the resolved spec and the lock; one manifest that makes them valid.

Files are named by their content and written first; the manifest is replaced last, in one step. So a crash at any moment
leaves the old set or the new one. Reading accounts for every key before anything is changed. Nothing is ever unpickled.

    manifest.json                                  what belongs to the set, and the backbone's fingerprints
    french.3f9a1c2b.safetensors                    its tensors
    french.3f9a1c2b.deltaspec.json                 a spec with this delta (and those linked to it by derived ones),
                                                   every parameter written out
    french.3f9a1c2b.deltaspec.lock.json            its lock
"""

from __future__ import annotations

import hashlib
import json
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaspec.atomic import write_atomically
from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.fingerprint import weights_fingerprint

if TYPE_CHECKING:
    from deltaspec.compiled import CompiledModel

MANIFEST = "manifest.json"
FORMAT = 1


def save(compiled: CompiledModel, directory: str | PathLike[str]) -> None:
    """Write all deltas of a compiled model to a directory, made if need be; what it held of ours before is replaced.

    Raises DeltaSpecError where a delta holds NaN or infinite values (DS520) or a derived one is attached and its
    sources have changed since (DS528), OSError where the directory cannot be written.
    """
    from safetensors.torch import save as to_bytes

    from deltaspec.lock import lock

    folder = Path(directory)
    plan, attachments = compiled.plan, compiled._attachments
    attachments.derive_detached()
    findings, deltas, files = [_behind(name) for name in attachments.behind()], [], {}
    for planned in plan.deltas:
        tensors = {key: value.detach().contiguous() for key, value in compiled.deltas[planned.name].tensors()}
        findings += [_not_finite(planned.name, key) for key, value in tensors.items() if not _finite(value)]
        part = plan.alone(planned.name)
        payload = to_bytes({k: v.clone() for k, v in tensors.items()}, metadata={"format": "pt", "delta": planned.name})
        digest = hashlib.sha256(payload).hexdigest()
        stem = f"{planned.name}.{digest[:8]}"
        files[f"{stem}.safetensors"] = payload
        files[f"{stem}.deltaspec.json"] = _json(part.specs[0].to_data())
        files[f"{stem}.deltaspec.lock.json"] = lock(part).encode()
        deltas.append(
            {
                "name": planned.name,
                "file": f"{stem}.safetensors",
                "sha256": digest,
                "spec": f"{stem}.deltaspec.json",
                "lock": f"{stem}.deltaspec.lock.json",
            }
        )
    if findings:
        raise DeltaSpecError(findings)
    manifest = {
        "deltaspec": FORMAT,
        "backbone": {
            "class": plan.model_class,
            "structure": plan.structure,
            "weights": weights_fingerprint(compiled.backbone),
        },
        "attached": list(compiled.attached),
        "deltas": deltas,
    }
    folder.mkdir(parents=True, exist_ok=True)
    before = _file_names(folder)
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_atomically(folder / MANIFEST, _json(manifest))
    for name in before - files.keys():
        (folder / name).unlink(missing_ok=True)


def load(compiled: CompiledModel, directory: str | PathLike[str]) -> None:
    """Read the tensors of all saved deltas into the deltas of the same names. All or nothing.

    Raises DeltaSpecError (DS521-DS527) with all findings, the model unchanged: files missing or damaged, another
    backbone, a delta that the model lacks, tensors missing, surplus, of another shape or dtype, or not finite.
    """
    saved = SavedSet(directory)
    findings = saved.check_backbone(compiled.plan.structure, compiled.backbone, compiled.plan.model_class)
    staged: list[tuple[Tensor, Tensor]] = []
    for name in saved.names:
        if name not in compiled.deltas:
            known = ", ".join(compiled.deltas)
            findings.append(
                saved.finding("DS524", f"the model has no delta {name!r}", f"it has: {known}; compile its spec too")
            )
            continue
        staged += _match(saved, name, dict(compiled.deltas[name].tensors()), findings)
    if findings:
        raise DeltaSpecError(findings)
    with torch.no_grad():
        for target, value in staged:
            target.copy_(value)
    compiled._attachments.derive(compiled.deltas)


def restore(
    model: nn.Module, directory: str | PathLike[str], *, capture: str = "auto", example_inputs: Any = None
) -> CompiledModel:
    """Compile the saved specs onto a model and load the saved tensors; the deltas that were attached when saving are
    attached.

    Raises DeltaSpecError with all findings; `model` is never changed.
    """
    from deltaspec.compiled import compile as compile_specs
    from deltaspec.spec import load as load_spec

    saved = SavedSet(directory)
    specs = dict.fromkeys(load_spec(saved.path(entry["spec"])) for entry in saved.entries)  # derived deltas share one
    compiled = compile_specs(model, *specs, capture=capture, example_inputs=example_inputs)
    load(compiled, directory)
    compiled.only(*saved.attached)
    return compiled


class SavedSet:
    """A directory written by `save`, its manifest read and checked."""

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.folder = Path(directory)
        self.manifest = self._read_manifest()
        self.entries: list[dict[str, str]] = self.manifest["deltas"]
        self.names = [entry["name"] for entry in self.entries]
        self.attached: list[str] = self.manifest["attached"]

    def path(self, name: str) -> Path:
        """Give the path of one of its files."""
        return self.folder / name

    def finding(self, code: str, message: str, suggestion: str | None = None, file: str = MANIFEST) -> Diagnostic:
        """Make a finding about one of its files."""
        return Diagnostic(code, message, file=str(self.folder / file), suggestion=suggestion)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        hint = "give the directory that c.save(dir) wrote"
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DeltaSpecError([self.finding("DS521", "there are no saved deltas here", hint)]) from None
        except OSError as error:
            raise DeltaSpecError([self.finding("DS521", f"cannot be read: {error.strerror}", hint)]) from error
        except (ValueError, RecursionError) as error:
            raise DeltaSpecError(
                [self.finding("DS522", f"is not a manifest: {error}", "save the deltas again")]
            ) from error
        if problem := _manifest_problem(data):
            raise DeltaSpecError([self.finding("DS522", f"is not a manifest: {problem}", "save the deltas again")])
        return dict(data)

    def check_backbone(self, structure: str, backbone: nn.Module, model_class: str) -> list[Diagnostic]:
        """Compare the saved fingerprints with a backbone's."""
        saved = self.manifest["backbone"]
        if saved["structure"] != structure:
            message = (
                f"was saved for another backbone: {saved['class']}, whose structure differs from this {model_class}"
            )
            return [self.finding("DS523", message, "load the model that the deltas were trained on")]
        weights = weights_fingerprint(backbone)
        if saved["weights"] is not None and weights is not None and saved["weights"] != weights:
            message = "was saved for a backbone of this structure with other weights"
            return [self.finding("DS523", message, "load the checkpoint (and dtype) that the deltas were trained on")]
        return []

    def tensors(self, name: str, findings: list[Diagnostic]) -> dict[str, Tensor] | None:
        """Read a delta's tensors, its digest checked; None, with a finding, where that fails."""
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes

        entry = next(entry for entry in self.entries if entry["name"] == name)
        try:
            payload = self.path(entry["file"]).read_bytes()
        except OSError as error:
            findings.append(
                self.finding("DS521", f"cannot be read: {error.strerror}", "restore the file", entry["file"])
            )
            return None
        if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
            message = "is damaged: its content is not what was saved (truncated or changed)"
            findings.append(self.finding("DS522", message, "save the deltas again, or restore the file", entry["file"]))
            return None
        try:
            return dict(from_bytes(payload))
        except (SafetensorError, ValueError, KeyError) as error:
            findings.append(self.finding("DS522", f"is no safetensors file: {error}", "save again", entry["file"]))
            return None


def _match(
    saved: SavedSet, name: str, targets: dict[str, Tensor], findings: list[Diagnostic]
) -> list[tuple[Tensor, Tensor]]:
    """Account for every key of one delta: (target, value) pairs, and a finding for each that does not fit."""
    values = saved.tensors(name, findings)
    if values is None:
        return []
    file = next(entry["file"] for entry in saved.entries if entry["name"] == name)

    def found(code: str, message: str, suggestion: str) -> None:
        findings.append(saved.finding(code, message, suggestion, file))

    staged = []
    for key in targets.keys() - values.keys():
        found("DS525", f"{name}: tensor {key} is missing", "the delta has sites that were not saved: compare the specs")
    for key in values.keys() - targets.keys():
        found("DS525", f"{name}: tensor {key} fits nowhere", "the model's delta lacks this site: compare the specs")
    for key in sorted(values.keys() & targets.keys()):
        value, target = values[key], targets[key]
        if value.shape != target.shape:
            found(
                "DS526",
                f"{name}: tensor {key} is {list(value.shape)}, the model's is {list(target.shape)}",
                "compare the params",
            )
        elif value.is_floating_point() != target.is_floating_point():
            found("DS526", f"{name}: tensor {key} is {value.dtype}, the model's is {target.dtype}", "compare the specs")
        elif not _finite(value):
            findings.append(_not_finite(name, key, str(saved.path(file))))
        else:
            staged.append((target, value))
    return staged


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _not_finite(delta: str, key: str, file: str = "<model>") -> Diagnostic:
    hint = "the training diverged: go back to an earlier state"
    return Diagnostic(
        "DS520" if file == "<model>" else "DS527",
        f"{delta}: tensor {key} has NaN or infinite values",
        file=file,
        suggestion=hint,
    )


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _manifest_problem(data: Any) -> str | None:
    if not isinstance(data, dict) or data.get("deltaspec") != FORMAT:
        return f"its format is not version {FORMAT}"
    backbone, deltas, attached = data.get("backbone"), data.get("deltas"), data.get("attached")
    if not isinstance(backbone, dict) or not {"class", "structure", "weights"} <= backbone.keys():
        return "it names no backbone"
    if not isinstance(deltas, list) or not all(_is_entry(entry) for entry in deltas):
        return "its list of deltas is malformed"
    names = [entry["name"] for entry in deltas]
    if len(set(names)) < len(names):
        return "it names a delta twice"
    if not isinstance(attached, list) or not set(map(str, attached)) <= set(names):
        return "it says that unknown deltas were attached"
    return None


def _is_entry(entry: Any) -> bool:
    """Tell whether a manifest's entry is whole and stays inside the directory."""
    fields = ("name", "file", "sha256", "spec", "lock")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) for field in fields):
        return False
    return all(os.path.basename(entry[field]) == entry[field] for field in ("file", "spec", "lock"))


def _file_names(folder: Path) -> set[str]:
    """Give the names of the files, the manifest apart, of the set that is in a directory; empty where there is none."""
    try:
        entries = SavedSet(folder).entries
    except DeltaSpecError:
        return set()
    return {entry[field] for entry in entries for field in ("file", "spec", "lock")}


def _behind(delta: str) -> Diagnostic:
    message = f"{delta} is attached, and its sources have changed since it was computed"
    hint = f"compute it anew first: c.refresh({delta!r})"
    return Diagnostic("DS528", message, file="<model>", suggestion=hint)
