"""The base model that deltas were saved for, as their manifest and locks name it."""

from __future__ import annotations

from pathlib import Path

from deltaspec.backbone.loading import Wanted
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.storage.saved import SavedSet

HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")
"""How the names of weights end that have a row a label."""


def base_saved_with(folder: Path) -> tuple[str | None, Wanted]:
    """Return the reference of the base model, None where none or several are named; and its class, with as many labels
    as a saved head has.

    Raises DeltaSpecError where a file is damaged.
    """
    saved, findings = SavedSet(folder), list[Diagnostic]()
    named, labels = set[str](), set[int]()
    for name in saved.names:
        try:
            base = dict(saved.locked(name).get("lineage", {}).get("base", {}))
        except DeltaSpecError as error:
            findings += error.diagnostics
            continue
        except (AttributeError, TypeError, ValueError) as error:
            findings.append(saved.no_lock(name, error))
            continue
        if isinstance(base.get("id"), str):
            named.add(base["id"])
        if any(key.endswith(HEADS) for key in saved.keys(name) or ()):
            held = saved.tensors(name, findings) or {}
            labels |= {len(value) for key, value in held.items() if key.endswith(HEADS) and value.dim() == 2}
    if findings:
        raise DeltaSpecError(findings)
    settings = {"num_labels": labels.pop()} if len(labels) == 1 else {}
    return named.pop() if len(named) == 1 else None, Wanted(
        settings=settings, likely=saved.manifest["backbone"]["class"]
    )
