"""The examples of serving: what their checks read adapters by, and the folder that the plugin of vLLM serves."""

import importlib
import json
import shutil

import golden_set
import pytest
import tiny_models
import torch
from beside_peft import reloaded
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from repository import ROOT
from torch import nn

from deltaspec import Diagnostic

SERVING = ROOT / "examples/serving"
BASE = "the/base"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(SERVING)
    return importlib.import_module("_common")


@pytest.fixture
def shelf(monkeypatch):
    monkeypatch.syspath_prepend(SERVING / "vllm/deltaspec_vllm")
    return importlib.import_module("deltaspec_vllm.shelf")


@pytest.fixture
def identity_of(shelf):
    return importlib.import_module("deltaspec_vllm.held").identity_of


OPTIONS = {
    "plain": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "ranks": {"rank_pattern": {"up": 3, r"0\.down": 5}},
    "alphas": {"alpha_pattern": {"block.1.up": 7}, "rank_pattern": {"1.up": 3}, "use_rslora": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_factors_are_peft_s(common, options, tmp_path):
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}) for _ in range(2)]
    net = nn.ModuleDict({"block": nn.ModuleList(blocks)})
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False, **options))
    model.save_pretrained(tmp_path)
    found = common.low_rank(tmp_path)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        down, up = map(torch.from_numpy, found[name])
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(r=3), "rank is 3 in the configuration and 4"),
        (lambda c, t: t.update({"base_model.model.a.lora_magnitude_vector": torch.ones(4)}), "no factor of a LoRA"),
        (lambda c, t: t.update({"base_model.model.b.lora_B.weight": torch.ones(4, 4)}), "B without its A"),
        (lambda c, t: t.update({"base_model.model.a.lora_A.default.weight": torch.ones(4, 4)}), "no factor of a LoRA"),
    ],
    ids=["rank", "magnitude", "alone", "suffix"],
)
def test_what_is_no_plain_lora_is_not_read(common, change, message, tmp_path):
    from safetensors.torch import save_file

    config = {"r": 4, "lora_alpha": 4}
    tensors = {f"base_model.model.a.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    change(config, tensors)
    adapter(tmp_path, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        common.low_rank(tmp_path)


def adapter(folder, config=None, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config or {}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_an_adapter_is_found_by_name_and_by_content_as_a_copy(shelf, identity_of, tmp_path):
    folder = adapter(tmp_path / "shelf/french")
    found = shelf.Shelf(tmp_path / "shelf", check=lambda *_: [])
    copy, content = found.find("french", BASE), identity_of(folder)
    assert found.find(content, BASE) == copy != folder
    adapter(folder, weights=b"changed in place")
    assert (copy / "adapter_model.safetensors").read_bytes() == b"weights"
    assert found.find(content, BASE) is None
    assert (found.find("french", BASE) / "adapter_model.safetensors").read_bytes() == b"changed in place"


def test_an_adapter_is_checked_once_for_each_content_and_base(shelf, tmp_path):
    folder, checked = adapter(tmp_path / "shelf/french"), []
    found = shelf.Shelf(tmp_path / "shelf", 64, check=lambda copy, *rest: checked.append(rest) or [])
    for base in (BASE, BASE, "another"):
        found.find("french", base)
    adapter(folder, weights=b"other")
    found.find("french", BASE)
    assert checked == [(BASE, 64), ("another", 64), (BASE, 64)]


def test_what_is_wrong_is_said_and_no_copy_stays(shelf, tmp_path):
    adapter(tmp_path / "shelf/french")
    findings = [Diagnostic("DS501", "too wide", "/secret/place", suggestion="less"), Diagnostic("DS502", "too deep")]
    found = shelf.Shelf(tmp_path / "shelf", check=lambda *_: findings)
    for _ in range(2):
        with pytest.raises(shelf.Refused) as refused:
            found.find("french", BASE)
        assert str(refused.value) == "the adapter 'french' is not served: [DS501] too wide (less); [DS502] too deep"


OUTSIDE = ["../out", "out", "..", ".", "", "a/b", ".hidden", "file", "files", "content:0", "x\n"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_the_folder_is_served(shelf, identity_of, name, tmp_path):
    outside, root = adapter(tmp_path / "out"), tmp_path / "shelf"
    for place in ("a/b", ".hidden"):
        adapter(root / place)
    (root / "out").symlink_to(outside)
    (root / "file").write_text("no folder")
    (root / "files").mkdir()
    for file in outside.iterdir():
        (root / "files" / file.name).symlink_to(file)
    found = shelf.Shelf(root, check=lambda *_: [])
    assert found.find(name, BASE) is None
    assert found.find(identity_of(outside), BASE) is None


def test_a_folder_that_is_not_there_is_refused(shelf, tmp_path):
    with pytest.raises(ValueError, match=r"DELTASPEC_LIBRARY=.*nowhere: there is no such folder"):
        shelf.Shelf(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, and a shelf with saved deltas: a lora that was attached at strength 0.5, and a bitfit that was not."""
    root = tmp_path_factory.mktemp("saved")
    compiled = golden_set.build()
    compiled.only({"low": 0.5})
    compiled.save(root / "shelf/french")
    tiny_models.base("llama").save_pretrained(root / "base")
    return root, compiled


def entries(folder):
    return {entry["name"]: entry for entry in json.loads((folder / "manifest.json").read_text())["deltas"]}


@torch.no_grad()
def test_saved_deltas_are_exported_once_for_each_content(shelf, identity_of, saved):
    root, compiled = saved
    found, base = shelf.Shelf(root / "shelf"), str(root / "base")
    adapter = found.find("french", base)
    expected = compiled(**golden_set.INPUTS).logits
    torch.testing.assert_close(reloaded(tiny_models.base("llama"), adapter)(**golden_set.INPUTS).logits, expected)
    assert found.find(identity_of(root / "shelf/french"), base) == found.find("french", base) == adapter
    alone = found.find(entries(root / "shelf/french")["low"]["identity"], base)
    assert alone != adapter
    torch.testing.assert_close(reloaded(tiny_models.base("llama"), alone)(**golden_set.INPUTS).logits, expected)
    assert sorted(path.name for path in (root / "shelf").rglob("*") if "adapter" in path.name) == []


def test_saved_deltas_that_vllm_would_not_serve_are_refused(shelf, saved, tmp_path):
    root, _ = saved
    base, found = str(root / "base"), shelf.Shelf(root / "shelf")
    with pytest.raises(shelf.Refused, match=r"DS606.*lora_bias"):
        found.find(entries(root / "shelf/french")["bias"]["identity"], base)
    with pytest.raises(shelf.Refused, match=r"DS602.*rank 2"):
        shelf.Shelf(root / "shelf", 1).find("french", base)
    shutil.copytree(root / "shelf/french", tmp_path / "shelf/cut")
    entry = entries(tmp_path / "shelf/cut")["low"]
    file = tmp_path / "shelf/cut" / entry["file"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(shelf.Refused, match=r"DS522\].* is damaged"):
        shelf.Shelf(tmp_path / "shelf").find("cut", base)
    file.unlink()
    file.symlink_to(root / "shelf/french" / entry["file"])
    assert shelf.Shelf(tmp_path / "shelf").find("cut", base) is None


@pytest.mark.parametrize("identity", [None, "sha256:" + "0" * 64], ids=["none", "another"])
def test_a_manifest_that_claims_another_identity_is_not_believed(shelf, saved, identity, tmp_path):
    root, _ = saved
    shutil.copytree(root / "shelf/french", tmp_path / "shelf/liar")
    file = tmp_path / "shelf/liar/manifest.json"
    data = json.loads(file.read_text())
    wanted = "sha256:" + "0" * 64
    for entry in data["deltas"]:
        entry["identity"] = identity
    file.write_text(json.dumps(data))
    found = shelf.Shelf(tmp_path / "shelf")
    if identity is None:
        assert found.find(wanted, str(root / "base")) is None
    else:
        with pytest.raises(shelf.Refused, match="DS522"):
            found.find(wanted, str(root / "base"))
