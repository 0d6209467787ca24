"""The base model that deltas were saved for, as their manifest and locks name it."""

from __future__ import annotations

from pathlib import Path

from deltaspec.backbone.loading import Wanted
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.formats.unread import Unread
from deltaspec.storage.saved import SavedSet

HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")
"""How the names of weights end that have a row a label."""


def base_saved_with(folder: Path) -> tuple[str | None, Wanted]:
    """Return the reference of the base model, and its class, with as many labels as a saved head has.

    The reference is None where no base or several are named. Of tensors, headers are read, and no values: whoever reads
    those checks their digests. Raises DeltaSpecError where a lock or a header is damaged.
    """
    saved, findings = SavedSet(folder), list[Diagnostic]()
    named, labels = set[str](), set[int]()
    for name in saved.names:
        try:
            base = dict(saved.locked(name).get("lineage", {}).get("base", {}))
            if any(key.endswith(HEADS) for key in saved.keys(name) or ()):
                held = Unread(folder).headers(saved.entry[name]["file"])
                labels |= {h.shape[0] for key, h in held.items() if key.endswith(HEADS) and len(h.shape) == 2}
        except DeltaSpecError as error:
            findings += error.diagnostics
            continue
        except (AttributeError, TypeError, ValueError) as error:
            findings.append(saved.no_lock(name, error))
            continue
        if isinstance(base.get("id"), str):
            named.add(base["id"])
    if findings:
        raise DeltaSpecError(findings)
    settings = {"num_labels": labels.pop()} if len(labels) == 1 else {}
    return named.pop() if len(named) == 1 else None, Wanted(
        settings=settings, likely=saved.manifest["backbone"]["class"]
    )
