"""Compiling, restoring and validating."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from peft import PeftModel, get_peft_model

import deltaspec
from benchmarks.harness import Row, interleave, ratio, seconds, verdict
from benchmarks.models import GPT2_LINEAR, config, gpt2, peft, spec
from deltaspec.backbone.clone import clone
from deltaspec.compiler.compile import compile_plan

warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")


def compiling() -> Iterator[Row]:
    """Compile a spec beside wrapping a model."""
    base = gpt2()
    document = spec(["d0"], GPT2_LINEAR)
    plan = deltaspec.plan(base, document)
    times = interleave(
        {
            "ours": lambda: deltaspec.compile(base, document),
            "rest": lambda: compile_plan(base, plan),
            "peer": lambda twin: get_peft_model(twin, config(GPT2_LINEAR)),
        },
        before={"peer": lambda: copy.deepcopy(base)},
    )
    median, text = ratio(times["peer"], times["ours"])
    _, of_rest = ratio(times["peer"], times["rest"])
    yield Row(
        "compile a spec (12 layers, 48 sites)",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 5 ×",
        verdict(median >= 5),
        "ours includes validating and planning, and leaves the model untouched; PEFT's wraps a copy made "
        f"beforehand, untimed; once it is planned, the rest takes {seconds(times['rest'])}, {of_rest} × faster than "
        "PEFT; planning describes each of 164 modules",
    )

    yield _copying()


def _copying() -> Row:
    """Copy the structure of a model, which every compile, plan and view does, beside `copy.deepcopy`."""
    base = gpt2()
    shared = [*base.parameters(), *base.buffers()]
    times = interleave(
        {
            "ours": lambda: clone(base),
            "deepcopy": lambda: copy.deepcopy(base, {id(tensor): tensor for tensor in shared}),
        }
    )
    median, text = ratio(times["deepcopy"], times["ours"])
    return Row(
        "copy the structure of a model (164 modules)",
        seconds(times["ours"]),
        f"{seconds(times['deepcopy'])} (copy.deepcopy)",
        f"{text} × faster",
        "≥ 2 ×",
        verdict(median >= 2),
        "copy.deepcopy is given the tensors, which it then shares; ours makes parameters of its own on their storage",
    )


def validating() -> Iterator[Row]:
    """Validate a spec, the whole process, beside importing the libraries it stands on and without each shortcut."""
    path = str(next(iter(sorted((Path(__file__).parent.parent / "specs").glob("*.deltaspec.yaml")))))

    def process(*arguments: str) -> Callable[[], None]:
        def run() -> None:
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

        return run

    def without(name: str, answer: bool) -> Callable[[], None]:
        """Validate with a shortcut that always gives the answer which saves nothing."""
        start = f"from deltaspec.language import validate; validate.{name} = lambda _: {answer}"
        return process("-c", f"{start}; from deltaspec.cli import main; main(['validate', {path!r}])")

    times = interleave(
        {
            "ours": process("-m", "deltaspec", "validate", path),
            "imports": process("-c", "import yaml, pydantic, jsonschema"),
            "accept": without("accepts", False),
            "coded": without("is_coded", True),
        },
        pairs=20,
    )
    median, text = ratio(times["ours"], times["imports"])
    middle = statistics.median(times["ours"])
    yield Row(
        "`deltaspec validate`, whole process, over importing yaml, pydantic and jsonschema",
        seconds(times["ours"]),
        f"{seconds(times['imports'])} (imports)",
        f"{text} ×",
        "≤ 0.5 s and ≤ 1.3 ×",
        verdict(middle <= 0.5 and median <= 1.3),
    )
    for name, what in (
        ("accept", "quick acceptance of a valid spec, over the schema generated and jsonschema"),
        ("coded", "rules in code left alone where a spec gives no parameter they read, over reading all parameters"),
    ):
        median, text = ratio(times["ours"], times[name])
        plain = f"{seconds(times[name])} (without)"
        yield Row(what, seconds(times["ours"]), plain, f"{text} × the time", "≤ 0.7", verdict(median <= 0.7))


def saving() -> Iterator[Row]:
    """Save a delta and read it back."""
    base = gpt2()
    ours = deltaspec.compile(base, spec(["d0"], GPT2_LINEAR))
    peer = peft(base, ["d0"], GPT2_LINEAR)
    with tempfile.TemporaryDirectory() as folder:
        mine, other = Path(folder, "ours"), Path(folder, "peer")
        ours.save(mine)
        peer.save_pretrained(other, selected_adapters=["d0"])
        times = interleave(
            {
                "ours": lambda: deltaspec.restore(base, mine),
                "peer": lambda: PeftModel.from_pretrained(copy.deepcopy(base), other / "d0"),
            },
            pairs=20,
        )
    _, text = ratio(times["peer"], times["ours"])
    yield Row(
        "restore one saved delta onto the backbone",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × faster",
        "-",
        "-",
        "PEFT's includes a deep copy, without which it changes the model it is given",
    )
