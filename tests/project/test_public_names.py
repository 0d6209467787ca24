"""The public names of the package, with and without torch."""

import os
import subprocess
import sys

import pytest
from repository import ROOT


def test_python_names_that_need_torch_say_so_without_it():
    code = "import sys; sys.modules['torch'] = None; import deltaspec; deltaspec.load; deltaspec.compile"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=environment)
    assert done.stderr.splitlines()[-1].endswith("deltaspec.compile needs torch: pip install 'deltaspec[torch]'")


def test_public_names():
    import deltaspec

    assert deltaspec.__all__ == [
        "CompiledModel", "DeltaSpec", "DeltaSpecError", "Diagnostic", "Plan",
        "compile", "estimate", "load", "plan", "restore", "validate",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = deltaspec.nope
    import deltaspec.planning.plan  # importing what makes plans must not hide the function

    assert callable(deltaspec.plan)
