"""The demo, step by step: validate, plan, train, compare, detach, save, reload."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import deltaspec
from deltaspec.demo import model, training
from deltaspec.demo.data import Task

LOGITS = "logits.safetensors"


class DemoFailed(RuntimeError):
    """Something that the demo promises did not hold."""


def specs_dir() -> Path:
    """Find the demo's specs: in the repository, or in the installed package."""
    package, here = Path(__file__).parent, Path.cwd()
    found = next(folder for folder in (package / "specs", package.parents[1] / "specs") if folder.is_dir())
    return found.relative_to(here) if found.is_relative_to(here) else found


def spec_paths() -> list[Path]:
    """Return the two spec files."""
    return [specs_dir() / f"demo-{name}.deltaspec.yaml" for name in model.HEADS]


def run(console: Console, output: Path, tasks: tuple[Task, ...]) -> None:
    """Run the whole demo; saves under `output`. Raises DemoFailed where a promise does not hold."""
    tokens = model.tokenizer()
    original = model.build()
    before = _flags(original)
    compiled = _compile(console, original)
    frozen = {task.name: _probe(original, task, tokens) for task in tasks}
    _train(console, compiled, tasks, tokens)
    logits = _compare(console, compiled, tasks, tokens, frozen)
    _detach(console, compiled, original, before, tasks, tokens)
    _save(console, compiled, output, logits)
    _reload_elsewhere(console, output)


def _compile(console: Console, original: model.SentenceClassifier) -> deltaspec.CompiledModel:
    """Validate both specs, print their plan for this model, compile them onto it together."""
    console.rule("1  validate, plan, compile")
    for path in spec_paths():
        findings = deltaspec.validate(path)
        if findings:
            raise DemoFailed("\n".join(str(finding) for finding in findings))
        console.print(f"{path.name}: valid")
    console.print(deltaspec.plan(original, *spec_paths()), soft_wrap=True)
    return deltaspec.compile(original, *spec_paths())


def _probe(original: model.SentenceClassifier, task: Task, tokens: PreTrainedTokenizerBase) -> float:
    """Measure a linear probe on the untouched backbone's embeddings."""
    features = training.outputs(original.embed, task.train, tokens)
    probe = training.linear_probe(features, task.train, classes=len(task.labels))
    with torch.no_grad():
        return training.accuracy(probe(training.outputs(original.embed, task.test, tokens)), task.test)


def _train(
    console: Console, compiled: deltaspec.CompiledModel, tasks: tuple[Task, ...], tokens: PreTrainedTokenizerBase
) -> None:
    """Train each task's delta and head, the other task's being detached."""
    console.rule("2  train one delta a task, on one backbone")
    with training.training_progress(console) as progress:
        for task in tasks:
            body, head = compiled.deltas[task.name], compiled.deltas[f"{task.name}-head"]
            with compiled.only(body.name, head.name):
                training.fit(compiled, body.parameters(), head.parameters(), task, tokens, progress)


def _logits(compiled: deltaspec.CompiledModel, delta: str, task: Task, tokens: PreTrainedTokenizerBase) -> Tensor:
    """Compute a task's test logits `[texts, classes]` with its own head over the given delta."""
    with compiled.only(delta, f"{task.name}-head"):
        return training.outputs(lambda **batch: compiled(**batch)[task.name], task.test, tokens)


def _compare(
    console: Console,
    compiled: deltaspec.CompiledModel,
    tasks: tuple[Task, ...],
    tokens: PreTrainedTokenizerBase,
    frozen: Mapping[str, float],
) -> dict[str, Tensor]:
    """Print the accuracy of every delta on every task; give each task's logits under its own delta."""
    console.rule("3  accuracy on the test texts")
    table = Table("")
    for task in tasks:
        table.add_column(f"{task.name}: {task.title}\n({len(task.labels)} classes, {len(task.test.texts)} texts)")
    table.add_row("untouched backbone, linear probe", *(f"{frozen[task.name]:.3f}" for task in tasks))
    methods = {delta.name: delta.method for delta in compiled.plan.deltas}
    own: dict[str, Tensor] = {}
    for task in tasks:
        scores = []
        for tested in tasks:
            logits = _logits(compiled, task.name, tested, tokens)
            score = f"{training.accuracy(logits, tested.test):.3f}"
            scores.append(f"[bold]{score}[/bold]" if tested is task else f"{score} (the wrong delta)")
            if tested is task:
                own[task.name] = logits
        table.add_row(f"delta {task.name} ({methods[task.name]})", *scores)
    console.print(table)
    return own


def _flags(module: torch.nn.Module) -> dict[str, object]:
    """Note every flag of a model: requires_grad by parameter, training by module."""
    noted: dict[str, object] = {name: p.requires_grad for name, p in module.named_parameters()}
    return noted | {f"{name}.training": child.training for name, child in module.named_modules()}


def _detach(
    console: Console,
    compiled: deltaspec.CompiledModel,
    original: model.SentenceClassifier,
    before: Mapping[str, object],
    tasks: tuple[Task, ...],
    tokens: PreTrainedTokenizerBase,
) -> None:
    """Detach everything and compare with the backbone as it came from disk, bit for bit."""
    console.rule("4  detach everything")
    compiled.detach()
    fresh = model.build()
    batch = model.encode(tokens, tasks[0].test.texts[:64])
    with torch.no_grad():
        expected, detached, untouched = fresh(**batch), compiled(**batch), original(**batch)
    weights, state, given = fresh.state_dict(), compiled.backbone.state_dict(), original.state_dict()
    flags = _flags(compiled.backbone)
    _check(
        console,
        {
            "outputs of the detached model": all(torch.equal(detached[k], expected[k]) for k in expected),
            "weights of the detached model": all(torch.equal(state[k], weights[k]) for k in weights),
            "requires_grad and training flags": all(flags[k] == before[k] for k in before),
            "the model that was given to compile": given.keys() == weights.keys()
            and all(torch.equal(given[k], weights[k]) for k in weights)
            and all(torch.equal(untouched[k], expected[k]) for k in expected)
            and _flags(original) == before,
        },
    )


def _check(console: Console, equal: Mapping[str, bool]) -> None:
    """Print what equals what came from disk. Raises DemoFailed where something does not."""
    for what, holds in equal.items():
        console.print(f"{what}: {'equal, bit for bit' if holds else 'DIFFERENT'}")
    if not all(equal.values()):
        raise DemoFailed("not equal: " + ", ".join(what for what, holds in equal.items() if not holds))


def _save(console: Console, compiled: deltaspec.CompiledModel, output: Path, logits: Mapping[str, Tensor]) -> None:
    """Write the deltas, and the logits that a reloaded model has to give again."""
    console.rule("5  save, and reload in a new process")
    compiled.save(output / "deltas")
    save_file(dict(logits), output / LOGITS)
    for path in sorted(file for file in output.rglob("*") if file.is_file()):
        console.print(f"{path.relative_to(output)}  {path.stat().st_size / 1000:.0f} kB", highlight=False)


def _reload_elsewhere(console: Console, output: Path) -> None:
    """Start a new Python process that reloads the deltas and checks their logits."""
    command = [sys.executable, "-m", "deltaspec", "demo", "--reload", "--output", str(output)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are split by thread, and rounded so
    finished = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    console.print(finished.stdout.strip())
    if finished.returncode:
        raise DemoFailed(f"the reloaded deltas do not give the same predictions:\n{finished.stderr}")


def reload(console: Console, output: Path, tasks: tuple[Task, ...]) -> None:
    """Restore the saved deltas onto a freshly loaded backbone and compare their logits with the saved ones."""
    tokens = model.tokenizer()
    compiled = deltaspec.restore(model.build(), output / "deltas")
    expected = load_file(output / LOGITS)
    equal: dict[str, bool] = {}
    for task in tasks:
        same_texts = task.cut(test=len(expected[task.name]))
        logits = _logits(compiled, task.name, same_texts, tokens)
        equal[f"process {os.getpid()}: logits of {task.name!r}"] = torch.equal(logits, expected[task.name])
    _check(console, equal)
