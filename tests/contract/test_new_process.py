"""Every method, saved here, computes the same bits in a process that has never seen it."""

import os
import subprocess
import sys

import torch
from models import ARCHITECTURES, first_output
from repository import ROOT

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods

CHOSEN = ("llama", "bert")
RELOAD = """
import sys
from pathlib import Path
import torch
from models import ARCHITECTURES, first_output
import deltaspec

for folder in sorted(Path(sys.argv[1]).iterdir()):
    architecture = ARCHITECTURES[folder.name.split("-")[1]]
    model, inputs = architecture.model(), architecture.inputs()
    compiled = deltaspec.restore(model, folder / "saved", example_inputs=inputs)
    assert compiled.attached == ("d",), folder.name
    expected = torch.load(folder / "output.pt", weights_only=True)
    assert torch.equal(first_output(compiled, inputs), expected), folder.name
    print(folder.name)
"""


def test_every_method_is_restored_to_the_bit_in_a_new_process(tmp_path):
    done = []
    for method in methods():
        for name in CHOSEN:
            architecture = ARCHITECTURES[name]
            model, inputs = architecture.model(), architecture.inputs()
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
    command = [sys.executable, "-c", RELOAD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests" / "support"]))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == sorted(done)
