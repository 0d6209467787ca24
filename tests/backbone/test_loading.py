"""Models from what a command line names, and what is said where there is none."""

import json
import sys

import pytest
import torch
import transformers
from torch import nn

from deltaspec.backbone.loading import Wanted, model_from
from deltaspec.diagnostics.findings import DeltaSpecError

LLAMA = dict(model_type="llama", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
FACTORIES = """
import torch
from torch import nn
from torch.nn import Linear

calls = []
net = nn.Linear(2, 2)
number = 3

def small():
    return nn.Linear(3, 4)

def needs_values():
    calls.append("tried")
    layer = nn.Linear(2, 2)
    assert layer.weight.sum().item() < 100
    return layer

def broken():
    raise RuntimeError("out of cheese")

def leaves():
    import sys
    sys.exit(3)

def dictionary():
    return {}

def wants(x):
    return x

class Zoo:
    @staticmethod
    def tiger():
        return nn.Linear(5, 5)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with modules of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def configured(path, **config):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def finding(reference):
    with pytest.raises(DeltaSpecError) as caught:
        model_from(str(reference))
    (found,) = caught.value.diagnostics
    assert found.file in (str(reference), "(no model)") or not str(reference).isprintable()
    return found


def test_a_directory_is_built_without_weights(here):
    path = configured(here / "llama", **LLAMA, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    for reference in (str(path), str(path / "config.json"), "llama", "./llama", "llama/config.json"):
        model = model_from(reference)
        assert type(model).__name__ == "LlamaForCausalLM" and not model.training
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_without_architectures_it_is_the_base_model(here):
    assert type(model_from(str(configured(here / "b", **LLAMA)))).__name__ == "LlamaModel"


def test_a_seven_billion_model_takes_no_memory(here):
    configured(here / "big", model_type="llama", architectures=["LlamaForCausalLM"], num_hidden_layers=32)
    parameters = list(model_from("big").parameters())
    assert all(p.is_meta for p in parameters) and sum(p.numel() for p in parameters) > 6e9


def test_a_real_model_directory(minilm_dir):
    model = model_from(str(minilm_dir))
    assert type(model).__name__ == "BertModel" and len(model.encoder.layer) == 6


def test_directories_and_configurations_that_cannot_be_used(here):
    assert (
        finding("./nowhere").code == finding("nowhere.json").code == finding("a b").code == finding("").code == "DS321"
    )
    assert finding("x\0y").code == "DS321"
    (here / "empty").mkdir()
    found = finding("empty")
    assert found.code == "DS321" and found.message == "this directory has no config.json"
    (here / "empty" / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in finding("empty").suggestion
    configured(here / "anything", name="not a model")
    assert "names no model_type" in finding("anything").message
    configured(here / "list")
    for text in ("[1]", "{", "\\", ""):
        (here / "list" / "config.json").write_text(text)
        assert finding("list").code == "DS322"
    (here / "list" / "config.json").write_bytes(b"\xff\xfe")
    assert "cannot be read" in finding("list").message
    found = finding(configured(here / "typo", **LLAMA, architectures=["LamaForCausalLM"]))
    assert found.code == "DS322" and "has no model class LamaForCausalLM" in found.message
    assert found.suggestion == "did you mean LlamaForCausalLM?"
    assert "LamaForCausalLM" in finding(configured(here / "text", **LLAMA, architectures="LamaForCausalLM")).message
    wrong = finding(configured(here / "value", **{**LLAMA, "hidden_size": "wide"})).message
    assert "hidden_size" in wrong and "expected int, got str" in wrong
    assert finding(configured(here / "odd", **LLAMA, architectures=["logging"])).code == "DS322"
    found = finding(configured(here / "unfit", model_type="bert", hidden_size=10, num_attention_heads=3))
    assert found.code == "DS322" and "not a multiple of the number of attention heads" in found.message
    assert finding(configured(here / "unheard", model_type="unheard_of")).code == "DS322"


def test_code_of_a_model_is_never_run(here):
    configured(here / "remote", model_type="mine", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (here / "remote" / "evil.py").write_text("open('ran', 'w')")
    found = finding("remote")
    assert found.code == "DS322" and "never run" in found.message and "package.module:factory" in found.suggestion
    assert not (here / "ran").exists()


def test_an_unreachable_hub_is_said(here, monkeypatch):
    import socket

    def fails(*_):
        raise socket.gaierror("no such name")

    monkeypatch.setattr("deltaspec.backbone.hub.socket.getaddrinfo", fails)
    monkeypatch.setattr("deltaspec.backbone.hub.getproxies", dict)
    found = finding("no-such-org-anywhere/no-such-model")
    assert found.code == "DS321" and "the hub cannot be reached" in found.message


def test_a_hub_id_uses_the_cache_and_the_same_code(here, monkeypatch):
    """What the hub's client gives for an id is built like a directory."""
    import transformers

    config = transformers.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"])
    asked = []

    def gives(source, **options):
        asked.append((source, options))
        return config

    monkeypatch.setattr("deltaspec.backbone.loading.is_cached", lambda reference: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gives)
    assert type(model_from("org/model")).__name__ == "LlamaForCausalLM"
    assert asked == [("org/model", {"trust_remote_code": False, "local_files_only": False})]


def test_code_from_a_hub_is_not_run_and_the_way_out_is_named(here):
    """Only the text of transformers' ValueError tells this failure from others: should it change, this fails."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (here / "config.json").write_text(json.dumps({"model_type": "its-own", "auto_map": auto_map}))
    (here / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(DeltaSpecError) as caught:
        model_from("config.json")
    (found,) = caught.value.diagnostics
    assert found.code == "DS322" and "needs model code of its own" in found.message
    assert "write a factory that loads it" in str(found.suggestion)


def test_factories(here):
    (here / "factories.py").write_text(FACTORIES)
    small = model_from("factories:small")
    assert small.weight.shape == (4, 3) and small.weight.is_meta
    assert model_from("factories:net") is sys.modules["factories"].net
    assert not model_from("factories:needs_values").weight.is_meta  # fails on meta, so it is made for real
    assert sys.modules["factories"].calls == ["tried", "tried"]
    assert model_from("factories:Zoo.tiger").in_features == 5
    assert isinstance(model_from("factories:Net").fc, nn.Linear)
    (here / "package").mkdir()
    (here / "package" / "models.py").write_text("from torch import nn\ndef make(): return nn.ReLU()\n")
    assert isinstance(model_from("package.models:make"), nn.ReLU)
    assert str(here) not in sys.path


def test_factories_that_fail(here):
    (here / "factories.py").write_text(FACTORIES)
    (here / "imports_nothing.py").write_text("import nonesuch_at_all\n")
    (here / "no_python.py").write_text("x = = 1\n")
    found = finding("factories:broken")
    assert found.code == "DS324" and found.message == "broken() failed: RuntimeError: out of cheese (factories.py:20)"
    assert "missing 1 required positional argument" in finding("factories:wants").message
    assert "dictionary() gave an object of class dict" in finding("factories:dictionary").message
    assert "neither a module nor a factory" in finding("factories:number").message
    found = finding("factories:smal")
    assert (
        found.code == "DS323" and found.message == "factories has no smal" and found.suggestion == "did you mean small?"
    )
    assert finding("factories:Zoo.lion").message == "Zoo has no lion"
    assert "there is no module nonesuch" in finding("nonesuch.models:make").message
    assert finding("factories.inner:make").code == "DS323"
    found = finding("imports_nothing:x")
    assert found.code == "DS323" and "No module named 'nonesuch_at_all' (imports_nothing.py:1)" in found.message
    assert "SyntaxError: invalid syntax (no_python.py, line 1)" in finding("no_python:x").message
    assert str(here) not in sys.path


def test_a_factory_that_exits(here):
    (here / "factories.py").write_text(FACTORIES)
    assert finding("factories:leaves").code == "DS324"


def test_loaded_models_have_their_weights(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef build():\n    torch.manual_seed(3)\n    return torch.nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    weight = torch.nn.Linear(2, 2).weight
    assert torch.equal(model_from("mine:build", Wanted(weights=True)).weight, weight)
    assert torch.equal(model_from("mine:build", Wanted(weights=True, dtype="bfloat16")).weight, weight.bfloat16())
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path / "empty")
    with pytest.raises(DeltaSpecError, match="the weights of this BertModel cannot be loaded: OSError") as raised:
        model_from(str(tmp_path / "empty"), Wanted(weights=True))
    assert [finding.code for finding in raised.value.diagnostics] == ["DS322"]
