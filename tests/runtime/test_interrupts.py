"""Ctrl-C inside a switch, at any line: what was attached is attached, or what should be, and nothing in between."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from live_model import build, lora, net

import deltaspec
from deltaspec.compiler.compiled import CompiledModel

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
SOURCE = os.path.dirname(deltaspec.__file__)
PLACES = ["up", "head"]


def made() -> CompiledModel:
    deltas = [lora("a", PLACES, attached=False), lora("b", PLACES, attached=False)]
    deltas.append({"name": "n", "method": "bitfit", "target": "head", "attached": False})
    return build(*deltas, model=net(), capture="modules")


def interrupted(run: Callable[[], Any], line: int) -> bool:
    """Run something, with an interrupt at this line of ours, counted from its start; return whether it came so far."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        count += event == "line"
        if event == "line" and count == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def within(compiled: CompiledModel) -> None:
    with compiled.only("b"):
        pass


SWITCHES: dict[str, tuple[tuple[str, ...], Callable[[CompiledModel], Any], int]] = {
    "only": (("a",), lambda c: c.only("b"), 1),
    "detach": (("a",), lambda c: c.detach(), 1),
    "attach": ((), lambda c: c.attach("a"), 3),
    "another set": (("b",), lambda c: c.attach("n"), 7),
    "strength": (("a",), lambda c: c.attach("b", strength=0.5), 11),
    "context": (("a",), within, 1),
    "prepare rows": ((), lambda c: c.rows(["a", "b", None]), 7),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_an_interrupted_switch_leaves_one_set_or_the_other(switch):
    start, run, every = SWITCHES[switch]
    compiled, flags = made(), {}
    outputs = {}
    for names in ((), ("a",), ("b",), ("b", "n")):
        compiled.only(*names)
        outputs[names] = compiled(X).detach()
    compiled.detach()
    flags = {name: p.requires_grad for name, p in compiled.backbone.named_parameters() if "deltaspec" not in name}
    line = 1
    while True:
        compiled.detach().only(*start)
        if not interrupted(lambda: run(compiled), line):
            break
        if compiled.attached in outputs and set(compiled.strengths.values()) <= {1.0}:
            assert torch.equal(compiled(X), outputs[compiled.attached]), line
        rows = compiled(X, deltas=["a", None, "b"])
        torch.testing.assert_close(rows[1], outputs[()][1], msg=str(line))
        compiled.only("b")
        assert torch.equal(compiled(X), outputs["b",]), line
        compiled.detach()
        assert torch.equal(compiled(X), outputs[()]), line
        now = {n: p.requires_grad for n, p in compiled.backbone.named_parameters() if "deltaspec" not in n}
        assert now == flags, line
        assert not any("forward" in module.__dict__ for module in compiled.backbone.modules()), line
        line += every
    assert line > 10
