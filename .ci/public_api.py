"""The public signatures, written down: `public_api.py` writes tests/project/api/deltaspec.json, `--check` compares.

They are read from the source by griffe, without importing it. What is written does not depend on where a class lives,
on lines or on docstrings: only names, parameters with their kinds and defaults, annotations and bases count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/project/api/deltaspec.json"

FACES = {
    "deltaspec": (
        "CompiledModel", "DeltaSpec", "DeltaSpecError", "Diagnostic", "Plan",
        "compile", "estimate", "load", "plan", "restore", "validate",
    ),
    "deltaspec.methods": (
        "Form", "Init", "Method", "MethodParams", "Promises", "Rank", "Refusal", "Site", "TensorSpec",
        "builtin_methods", "methods",
    ),
    "deltaspec.engines": ("check", "known", "needs", "notes"),
    "deltaspec.testing": ("check_method",),
    "deltaspec.allocation": ("RankAllocator",),
    "deltaspec.training": ("DeltaTrainerMixin", "Job", "JobsTrainer", "Training", "scheduler"),
    "deltaspec.verification": ("verify",),
    "deltaspec.folders": ("extract", "merge_folder"),
    "deltaspec.demo.model": ("build",),
}  # fmt: skip
"""What users import, and from where."""
GIVEN = (
    "Rows", "Restore", "LibraryView", "Verification", "Agreement", "Extraction", "Change", "Delta", "Region",
    "UnknownDeltaError", "ContractError",
    "PlannedDelta", "PlannedSite", "Site", "TensorSpec", "Init", "MethodParams", "ModuleTable", "Row", "ParameterInfo",
    "OptimizerReport", "Held", "Results", "JobResult", "Evaluation", "DeltaEntry", "Train", "Override", "Expect",
    "DeltaExpect", "ModelContract", "Count", "Trainable", "Selector", "Layers", "Shape", "Memory", "Conditions",
    "MemoryUse", "Estimate", "Costs", "KeptAt",
)  # fmt: skip
"""Classes that users get from those, catch or read, wherever they are defined."""
MADE_BY_USERS = (
    "DeltaSpecError", "Diagnostic", "RankAllocator", "Job", "JobsTrainer", "Training",
    "Site", "TensorSpec", "Init", "Refusal", "Promises",
)  # fmt: skip
"""Classes whose constructor is public, too; the others are made by deltaspec."""
SPOKEN = ("__call__", "__contains__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__")
"""Special methods that are promised: what `with`, `in`, `len` and the like need."""


def signatures(root: Path = ROOT) -> dict[str, str]:
    """Return every public name of the package below `root` with its signature."""
    package = griffe.load("deltaspec", search_paths=[root], try_relative_path=False)
    assert isinstance(package, griffe.Module)
    found: dict[str, str] = {}
    for face, names in FACES.items():
        module = package if face == "deltaspec" else package[face.removeprefix("deltaspec.")]
        for name in names:
            prefix = "" if module.members[name].is_class else f"{face}."
            found |= _described(module.members[name], prefix)
    classes = {name: cls for name, cls in _classes(package) if name in GIVEN}
    for name in GIVEN:
        found |= _described(classes[name], "")
    return dict(sorted(found.items()))


def _classes(module: griffe.Module) -> Iterator[tuple[str, griffe.Class]]:
    for name, member in module.members.items():
        if isinstance(member, griffe.Class):
            yield name, member
        elif isinstance(member, griffe.Module):
            yield from _classes(member)


def _described(obj: Any, prefix: str) -> dict[str, str]:
    """Return the signature of a function, or those of a class and its public members."""
    name = f"{prefix}{obj.name}"
    if obj.is_function:
        return {name: signature(obj)}
    if not obj.is_class:
        kind = "property" if "property" in obj.labels else "attribute"
        default = "" if obj.value is None or kind == "property" else f" = {obj.value}"
        return {} if obj.annotation is None else {name: f": {obj.annotation}{default} ({kind})"}
    made = {name: f" is a class({', '.join(str(base).rpartition('.')[2] for base in obj.bases)})"}
    for member in obj.all_members.values():
        spoken = member.name in SPOKEN or (member.name == "__init__" and obj.name in MADE_BY_USERS)
        if spoken or not member.name.startswith("_"):
            made |= _described(member, f"{name}.")
    return made


def signature(function: griffe.Function) -> str:
    """Return `(a, /, b: int = 1, *, c) -> int`, after `classmethod` or `staticmethod`."""
    parts: list[str] = []
    before = None
    for p in function.parameters:
        if before is griffe.ParameterKind.positional_only is not p.kind:
            parts.append("/")
        seen_star = before in (griffe.ParameterKind.keyword_only, griffe.ParameterKind.var_positional)
        if p.kind is griffe.ParameterKind.keyword_only and not seen_star:
            parts.append("*")
        star = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(p.kind, "")
        annotation = "" if p.annotation is None else f": {p.annotation}"
        default = "" if p.default is None or star else f" = {p.default}"
        parts.append(f"{star}{p.name}{annotation}{default}")
        before = p.kind
    if before is griffe.ParameterKind.positional_only:
        parts.append("/")
    labels = "".join(f"{label} " for label in ("classmethod", "staticmethod") if label in function.labels)
    return f"{labels}({', '.join(parts)}) -> {function.returns}"


def differences(golden: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return a line for each name that went, came or changed."""
    lines = [f"removed: {name}{golden[name]}" for name in golden if name not in now]
    lines += [f"added: {name}{now[name]}" for name in now if name not in golden]
    changed = [name for name in golden if name in now and golden[name] != now[name]]
    return lines + [f"changed: {name}\n  from {golden[name]}\n    to {now[name]}" for name in changed]


def main(arguments: list[str]) -> int:
    """Write the file, or compare with it; `--root DIR` reads another checkout."""
    root = Path(arguments[arguments.index("--root") + 1]) if "--root" in arguments else ROOT
    now = signatures(root)
    if "--check" not in arguments:
        GOLDEN.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    if lines := differences(json.loads(GOLDEN.read_text(encoding="utf-8")), now):
        print("The public API moved:", *lines, HOW_TO_ACCEPT, sep="\n")
    return 1 if lines else 0


HOW_TO_ACCEPT = (
    "If that is meant, `make generate` writes tests/project/api/deltaspec.json anew; say it in CHANGELOG.md, too."
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
