"""Say what no code of the package uses, tests not counted: vulture, with what is called from outside taken out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import vulture

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "deltaspec/methods/builtin"
DECORATORS = ["@field_validator", "@model_validator"]
"""pydantic calls what they decorate."""
CALLED = {
    "__dir__": "Python",
    "__signature__": "inspect.signature",
    "control": "transformers, by keyword: an argument of callbacks",
    "_clip_grad_norm": "transformers' Trainer",
    "_get_name": "torch: repr of a module",
    "extra_repr": "torch: repr of a module",
    "get_command": "click",
    "get_metavar": "click",
    "loss_is_scaled_for_ga": "transformers' Trainer",
    "model_config": "pydantic",
    "num_items_in_batch": "transformers' Trainer, by keyword",
    "on_optimizer_step": "transformers' Trainer",
    "on_pre_optimizer_step": "transformers' Trainer",
    "on_train_begin": "transformers' Trainer",
    "should_training_stop": "transformers' Trainer",
    "tie_word_embeddings": "transformers: a field of configs",
}
"""Names in the package that other code calls or reads, and who does."""


def main() -> int:
    """Print a line for each unused name; return 1 if there is one."""
    public = json.loads((ROOT / "tests/project/api/deltaspec.json").read_text(encoding="utf-8"))
    names = {*CALLED, *(name.rpartition(".")[2] for name in public)}
    checker = vulture.Vulture(ignore_names=sorted(names), ignore_decorators=DECORATORS)
    checker.scavenge([str(ROOT / "deltaspec")])
    # The registry finds the class of each method by its file.
    unused = checker.get_unused_code()
    found = [item for item in unused if not (item.typ == "class" and METHODS in item.filename.parents)]
    print(*(item.get_report() for item in found), sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
