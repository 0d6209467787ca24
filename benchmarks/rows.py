"""What is measured, one function a group of rows."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

import deltaspec
from benchmarks.harness import Row, excess, interleave, many, ratio, seconds
from benchmarks.models import GPT2_LINEAR, LLAMA_LINEAR, config, gpt2, llama, peft, spec

warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")


def switching() -> Iterator[Row]:
    """Switch the active delta, and leave and enter the detached state."""
    base = gpt2()
    yield _alone(base)
    for loaded, target in ((2, 500), (100, 20_000)):
        names = [f"d{i}" for i in range(loaded)]
        ours, peer = deltaspec.compile(base, spec(names, GPT2_LINEAR)), peft(base, names, GPT2_LINEAR)
        times = interleave({"ours": many(_switch(ours, names), 200), "peer": _set(peer, names)}, pairs=20)
        median, text = ratio(times["peer"], times["ours"], 200)
        yield Row(
            f"switch the active delta, {loaded} loaded (12 × 256 GPT-2, 48 sites)",
            seconds(times["ours"], 1 / 200),
            seconds(times["peer"]),
            f"{text} × faster",
            f"≥ {target:,} ×",
            "yes" if median >= target else "no",
            "two is the fewest between which one can switch" if loaded == 2 else "",
        )
    yield _detached(ours, peer)
    yield _thousand(base)


def _alone(base: torch.nn.Module) -> Row:
    """Turn the only delta on and off: with one loaded there is no other switch."""
    ours, peer = deltaspec.compile(base, spec(["d0"], GPT2_LINEAR)), peft(base, ["d0"], GPT2_LINEAR)
    turns = itertools.cycle([(), ("d0",)])

    def turn() -> None:
        ours.only(*next(turns))

    times = interleave({"ours": many(turn, 200), "peer": _set(peer, ["d0"])}, pairs=20)
    median, text = ratio(times["peer"], times["ours"], 200)
    return Row(
        "switch the active delta, 1 loaded: off or on, per call (12 × 256 GPT-2, 48 sites)",
        seconds(times["ours"], 1 / 200),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 500 ×",
        "yes" if median >= 500 else "no",
        "ours takes its delta off, or puts it on the bare backbone, and puts back the training flags of all 148 "
        "parameters of the backbone, or reads and clears them: most of the time, as torch has no call for many at "
        "once; PEFT's is given the adapter that is active already, and leaves the backbone's flags alone",
    )


def _thousand(base: torch.nn.Module) -> Row:
    """Switch among two and among 1,000 loaded."""
    contestants = {}
    for loaded in (2, 1000):
        names = [f"d{i}" for i in range(loaded)]
        documents = [spec(names[i : i + 100], GPT2_LINEAR) for i in range(0, loaded, 100)]
        for document in documents[1:]:
            document["deltas"][0]["attached"] = False
        contestants[str(loaded)] = many(_switch(deltaspec.compile(base, *documents), names), 200)
    times = interleave(contestants, pairs=40)
    median, text = ratio(times["1000"], times["2"])
    return Row(
        "switch the active delta, 1,000 loaded, over 2 loaded",
        seconds(times["1000"], 1 / 200),
        "-",
        f"{text} × ours with 2",
        "≤ 1.2 ×",
        "yes" if median <= 1.2 else "no",
        "PEFT is left out: each adapter that is added takes it longer than the one before",
    )


def _switch(ours: deltaspec.CompiledModel, names: list[str]) -> Callable[[], None]:
    turns = itertools.cycle([names[0], names[-1]])

    def run() -> None:
        ours.only(next(turns))

    return run


def _set(peer: PeftModel, names: list[str]) -> Callable[[], None]:
    turns = itertools.cycle([names[0], names[-1]])

    def run() -> None:
        peer.set_adapter(next(turns))

    return run


def _detached(ours: deltaspec.CompiledModel, peer: PeftModel) -> Row:
    def enter_ours() -> None:
        with ours.detached():
            pass

    def enter_peer() -> None:
        with peer.disable_adapter():
            pass

    times = interleave({"ours": many(enter_ours, 100), "peer": enter_peer}, pairs=20)
    median, text = ratio(times["peer"], times["ours"], 100)
    return Row(
        "`detached()`, enter and leave, 100 loaded",
        seconds(times["ours"], 1 / 100),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 20,000 ×",
        "yes" if median >= 20_000 else "no",
    )


def compiling() -> Iterator[Row]:
    """Compile a spec beside wrapping a model."""
    base = gpt2()
    document = spec(["d0"], GPT2_LINEAR)
    copies = [copy.deepcopy(base) for _ in range(23)]
    times = interleave(
        {
            "ours": lambda: deltaspec.compile(base, document),
            "peer": lambda: get_peft_model(copies.pop(), config(GPT2_LINEAR)),
        },
        pairs=20,
    )
    median, text = ratio(times["peer"], times["ours"])
    yield Row(
        "compile a spec (12 layers, 48 sites)",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 5 ×",
        "yes" if median >= 5 else "no",
        "ours includes validating and planning, and leaves the model untouched; PEFT's wraps a copy made beforehand",
    )


def forwards() -> Iterator[Row]:
    """One forward with LoRA attached on all linear layers, over the bare backbone."""
    base = llama()
    ours = deltaspec.compile(base, spec(["d0"], LLAMA_LINEAR))
    peer = peft(base, ["d0"], LLAMA_LINEAR)
    merged = ours.merge()
    for batch, tokens, limit, pairs in ((1, 1, 1 / 3, 60), (1, 16, 1 / 3, 60), (8, 128, 1 / 2, 20)):
        ids = torch.randint(0, 1000, (batch, tokens))

        def run(model: torch.nn.Module, ids: torch.Tensor = ids) -> Callable[[], None]:
            def forward() -> None:
                with torch.no_grad():
                    model(input_ids=ids, use_cache=False)

            return forward

        contestants = {"bare": run(base), "ours": run(ours), "peer": run(peer), "merged": run(merged)}
        times = interleave(contestants, pairs)
        first, second, part, text = excess(times["ours"], times["peer"], times["bare"])
        yield Row(
            f"LoRA on 56 linears attached, over bare, {batch} × {tokens} tokens (8 × 512 Llama)",
            f"{first:.3f} ×",
            f"{second:.3f} ×",
            text,
            f"≤ {limit:.2g}",
            "yes" if part <= limit else "no",
        )
        if tokens == 16:
            _, merged_text = ratio(times["merged"], times["bare"])
            yield Row("merged, over bare, 1 × 16 tokens", f"{merged_text} ×", "-", "-", "1", "-")


def training() -> Iterator[Row]:
    """One training step with LoRA on all linear layers."""
    base = llama()
    ours = deltaspec.compile(base, spec(["d0"], LLAMA_LINEAR)).train()
    peer = peft(base, ["d0"], LLAMA_LINEAR).train()
    ids = torch.randint(0, 1000, (4, 64))

    def step(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def run() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    times = interleave({"ours": step(ours), "peer": step(peer)}, pairs=20)
    median, text = ratio(times["ours"], times["peer"])
    yield Row(
        "training step, LoRA on 56 linears, 4 × 64 tokens",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × the peer's time",
        "≤ 1 ×",
        "yes" if median <= 1 else "no",
    )


def validating() -> Iterator[Row]:
    """Validate a spec, the whole process, beside importing the libraries it stands on."""
    path = next(iter(sorted((Path(__file__).parent.parent / "specs").glob("*.deltaspec.yaml"))))

    def process(*arguments: str) -> Callable[[], None]:
        def run() -> None:
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

        return run

    times = interleave(
        {
            "ours": process("-m", "deltaspec", "validate", str(path)),
            "imports": process("-c", "import yaml, pydantic, jsonschema"),
        },
        pairs=20,
    )
    median, text = ratio(times["ours"], times["imports"])
    middle = sorted(times["ours"])[10]
    yield Row(
        "`deltaspec validate`, whole process, over importing yaml, pydantic and jsonschema",
        seconds(times["ours"]),
        f"{seconds(times['imports'])} (imports)",
        f"{text} ×",
        "≤ 0.5 s and ≤ 1.3 ×",
        "yes" if middle <= 0.5 and median <= 1.3 else "no",
    )


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
    median, text = ratio(times["peer"], times["ours"])
    yield Row(
        "restore one saved delta onto the backbone",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × faster",
        "-",
        "-",
        "PEFT's includes a deep copy, without which it changes the model it is given",
    )


GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "switching": switching,
    "compiling": compiling,
    "forwards": forwards,
    "training": training,
    "saving": saving,
    "validating": validating,
}
