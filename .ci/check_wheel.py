"""Build wheel and sdist into dist/, check what is in them, and validate a spec where the wheel alone is installed.

`--tag v0.1.0` also checks that the version is the tag's. Needs nothing but Python: all else goes into environments of
its own, which are thrown away.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
FOLDERS = [name.strip("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
DEMO_SPECS = ("demo-topics.deltaspec.yaml", "demo-tweets.deltaspec.yaml")
ABSENT = ("torch", "transformers", "safetensors", "numpy")


def environment(directory: Path, *requirements: str) -> Path:
    """Make an environment with these installed; return its Python."""
    venv.create(directory, with_pip=True)
    python = directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", *requirements], check=True)
    return python


def build(directory: Path, dist: Path) -> tuple[Path, Path]:
    """Build both distributions; return wheel and sdist."""
    python = environment(directory, *PROJECT["build-system"]["requires"])
    subprocess.run([python, "-m", "hatchling", "build", "--directory", dist], check=True, cwd=ROOT)
    return dist / f"deltaspec-{VERSION}-py3-none-any.whl", dist / f"deltaspec-{VERSION}.tar.gz"


def sources() -> set[str]:
    """Return the files of the package, as they are to be in both distributions."""
    files = (path for path in (ROOT / "deltaspec").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def wrong_in_wheel(names: set[str]) -> list[str]:
    """Return a line for each file that is missing in a wheel, or should not be there."""
    info = f"deltaspec-{VERSION}.dist-info"
    wanted = sources() | {f"deltaspec/demo/specs/{name}" for name in DEMO_SPECS}
    wanted |= {"deltaspec/schemas/deltaspec-v1.schema.json"}
    own = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert {"deltaspec/py.typed", "deltaspec/roles/bert.json"} <= wanted
    lines = [f"the wheel lacks {name}" for name in sorted((wanted | own) - names)]
    return lines + [f"the wheel should not hold {name}" for name in sorted(names - wanted - own)]


def wrong_in_sdist(names: set[str]) -> list[str]:
    """Return a line for each file or folder that is missing in an sdist, and for what is a machine's own."""
    lines = [f"the sdist lacks {name}" for name in sorted(sources() - names)]
    lines += [f"the sdist lacks {f}" for f in FOLDERS if not any(n == f or n.startswith(f"{f}/") for n in names)]
    alien = (".venv", ".git", "__pycache__", "dist", "build")
    return lines + [f"the sdist should not hold {name}" for name in sorted(names) if set(name.split("/")) & set(alien)]


def refuse_a_dead_wheel(directory: Path, wheel: Path) -> None:
    """Install the wheel alone, and use it: no torch, a good spec, a bad one."""
    python = environment(directory, str(wheel))
    look = f"import importlib.util as u; found = [n for n in {ABSENT!r} if u.find_spec(n)]; assert not found, found"
    subprocess.run([python, "-I", "-c", look], check=True)
    command = [python, "-I", "-m", "deltaspec"]
    version = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    assert version == f"deltaspec {VERSION}", version
    specs = [ROOT / "specs" / name for name in DEMO_SPECS]
    subprocess.run([*command, "validate", *specs], check=True, cwd=directory)
    bad = directory / "bad.deltaspec.yaml"
    bad.write_text(specs[0].read_text(encoding="utf-8").replace("method: ", "method: no_"), encoding="utf-8")
    done = subprocess.run([*command, "validate", bad], check=False, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 1, f"a spec with an unknown method gave exit status {done.returncode}: {done.stdout}"


def main(arguments: list[str]) -> int:
    """Build and check; return 1 with a line for each thing that is wrong."""
    if "--tag" in arguments and (tag := arguments[arguments.index("--tag") + 1]) != f"v{VERSION}":
        print(f"the tag is {tag}, and the version in pyproject.toml {VERSION}")
        return 1
    with tempfile.TemporaryDirectory() as made:
        wheel, sdist = build(Path(made) / "build", ROOT / "dist")
        with zipfile.ZipFile(wheel) as archive:
            wrong = wrong_in_wheel(set(archive.namelist()))
        with tarfile.open(sdist) as packed:
            files = {member.name.partition("/")[2] for member in packed.getmembers() if member.isfile()}
            wrong += wrong_in_sdist(files)
        if not wrong:
            refuse_a_dead_wheel(Path(made) / "use", wheel)
    print(*(wrong or [f"{wheel.name} and {sdist.name} hold what they should"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
