"""Every method, saved here, computes the same bits in a process that has never seen it."""

import os
import subprocess
import sys

import torch
from models import ARCHITECTURES, first_output
from repository import ROOT
from whole import in_turn

import deltaspec
from deltaspec.contract.snapshot import snapshot
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods

CHOSEN = ("llama", "bert")
RELOAD = """
import sys
from functools import cache
from pathlib import Path
import torch
from models import ARCHITECTURES, first_output
import deltaspec

built = cache(lambda name: ARCHITECTURES[name].model())
for folder in sorted(Path(sys.argv[1]).iterdir()):
    name = folder.name.split("-")[1]
    model, inputs = built(name), ARCHITECTURES[name].inputs()
    compiled = deltaspec.restore(model, folder / "saved", example_inputs=inputs)
    assert compiled.attached == ("d",), folder.name
    expected = torch.load(folder / "output.pt", weights_only=True)
    assert torch.equal(first_output(compiled, inputs), expected), folder.name
    print(folder.name)
"""


def test_every_method_is_restored_to_the_bit_in_a_new_process(tmp_path, whole):
    """On one architecture in turn; on both in `make test-whole`. A model serves all methods: none changes it."""
    done, models = [], {name: ARCHITECTURES[name].model() for name in CHOSEN}
    untouched = {name: snapshot(model, identity=True) for name, model in models.items()}
    for number, method in enumerate(methods()):
        for name in in_turn(CHOSEN, number, len(CHOSEN) if whole else 1):
            architecture, model = ARCHITECTURES[name], models[name]
            inputs = architecture.inputs()
            delta = {"name": "d", "method": method, "params": methods()[method].small}
            for target in (None, *architecture.targets):
                document = {"deltaspec": 1, "deltas": [delta | ({} if target is None else {"target": target})]}
                try:
                    compiled = deltaspec.compile(model, document, example_inputs=inputs)
                except DeltaSpecError:
                    continue
                with torch.no_grad():
                    generator = torch.Generator().manual_seed(0)
                    for parameter in compiled.trainable_parameters():
                        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
                folder = tmp_path / f"{method}-{name}"
                folder.mkdir()
                compiled.save(folder / "saved")
                torch.save(first_output(compiled, inputs), folder / "output.pt")
                done.append(folder.name)
                break
    assert {entry.split("-")[0] for entry in done} == set(methods())
    assert all(snapshot(model, identity=True) == untouched[name] for name, model in models.items())
    command = [sys.executable, "-c", RELOAD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests" / "support"]))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == sorted(done)
