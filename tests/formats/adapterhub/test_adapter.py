"""AdapterHub directories that were cut, renamed, mixed, or say what nothing here knows."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from written_elsewhere import FIXTURES, base, base_of, copied, difference, refuse

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

Change = Callable[[dict[str, Any], dict[str, Any]], object]
UP = "bert.encoder.layer.1.output.adapters.task.adapter_up.weight"

CHANGES: dict[str, tuple[Change, str, str]] = {
    "a layer is cut": (lambda c, w: [w.pop(k) for k in list(w) if "layer.1" in k], "DS543", "layer.1"),
    "a tensor is cut": (lambda c, w: w.pop(UP), "DS543", "has no adapter_up.weight"),
    "another width": (lambda c, w: c["config"].update(reduction_factor=16), "DS543", "reduction_factor of 16"),
    "a layer is left out": (lambda c, w: c["config"].update(leave_out=[0]), "DS543", "leaves out"),
    "more places are meant": (lambda c, w: c["config"].update(mh_adapter=True), "DS543", "attention.output"),
    "a type": (lambda c, w: w.update({UP: w[UP].int()}), "DS526", "torch.int32"),
    "a shape": (lambda c, w: w.update({UP: torch.ones(31, 4)}), "DS526", "adapter_up.weight"),
    "another name": (lambda c, w: c.update(name="other"), "DS543", "of other"),
    "two adapters": (
        lambda c, w: (c.pop("name"), w.update({UP.replace("task", "b"): w[UP]})), "DS543", "several adapters",
    ),
    "an unknown option": (lambda c, w: c["config"].update(rotations=3), "DS544", "rotations"),
    "an option of another kind": (lambda c, w: c["config"].update(ln_before="yes"), "DS544", "ln_before"),
    "an unknown activation": (lambda c, w: c["config"].update(non_linearity="mish"), "DS549", "mish"),
    "an unknown architecture": (lambda c, w: c["config"].update(architecture="mtl_lora"), "DS545", "mtl_lora"),
    "no configuration": (lambda c, w: c.update(config="seq_bm"), "DS544", "seq_bm"),
    "no invertible adapter": (lambda c, w: c["config"].update(inv_adapter="nice"), "DS543", "invertible"),
    "a key of nothing": (lambda c, w: w.update({"bert.pooler.extra": torch.ones(3)}), "DS543", "fits nowhere"),
    "another model's": (
        lambda c, w: [w.update({k.replace(".output.", ".outputs."): w.pop(k)}) for k in list(w)],
        "DS523", "another model",
    ),
}  # fmt: skip


def changed(change: Change, folder: Path) -> Path:
    """Change the configuration and the weights of an adapter."""
    config, weights = (
        json.loads((folder / "adapter_config.json").read_text()),
        torch.load(folder / "pytorch_adapter.bin"),
    )
    change(config, weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_adapter.bin")
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_refused(name: str, tmp_path: Path) -> None:
    change, code, said = CHANGES[name]
    refuse("adapterhub", "seq_bn_bert", changed(change, copied("adapterhub", "seq_bn_bert", tmp_path)), code, said)


def test_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    folder, witness = copied("adapterhub", "seq_bn_bert", tmp_path), tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": Runs()}, protocol=2))
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(base_of("adapterhub", "seq_bn_bert"), folder)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS522"}
    assert not witness.exists()


def test_other_spellings_of_the_same(tmp_path: Path) -> None:
    """A string, a mapping without what is the default, and the names of version 1 mean what the full one does."""

    def shorter(config: dict[str, Any], weights: dict[str, Any]) -> None:
        config["config"] = "pfeiffer[reduction_factor=8]"
        del config["version"]
        for key in list(weights):
            weights[key.replace(".adapters.", ".layer_text_task_adapters.")] = weights.pop(key)

    folder = changed(shorter, copied("adapterhub", "seq_bn_bert", tmp_path))
    assert difference("adapterhub", "seq_bn_bert", folder) < 5e-5


def test_alpha_of_ia3_scales_what_has_no_scale(tmp_path: Path) -> None:
    folder = copied("adapterhub", "ia3_gpt2", tmp_path)
    changed(lambda c, w: c["config"].update(alpha=3), folder)
    model = base_of("adapterhub", "ia3_gpt2")
    merged = deltaspec.restore(model, folder).merge()
    scale = torch.load(folder / "pytorch_adapter.bin")["transformer.h.0.attn.c_attn.loras.task.lora_B"][:, 0]
    expected = torch.cat([torch.full((32,), 3.0), scale * 3])
    for name in ("weight", "bias"):
        path = f"transformer.h.0.attn.c_attn.{name}"
        torch.testing.assert_close(merged.get_parameter(path), model.get_parameter(path) * expected)


def test_what_the_file_does_not_tell_may_be_said(tmp_path: Path) -> None:
    folder = copied("adapterhub", "noreft_gpt2", tmp_path)
    changed(lambda c, w: c["config"].update(subtract_projection=True), folder)
    assert difference("adapterhub", "noreft_gpt2", folder) < 5e-5


def test_head_without_a_place(tmp_path: Path) -> None:
    folder = copied("adapterhub", "head_static_bert", tmp_path)
    bare = base("adapterhub", "bert", "BertModel")
    with pytest.raises(DeltaSpecError, match="load BertForSequenceClassification") as caught:
        deltaspec.restore(bare, folder)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS523"}
    for name in ("head_config.json", "pytorch_model_head.bin"):
        (folder / name).unlink()
    assert deltaspec.restore(bare, folder).attached == ("adapter",)


@pytest.mark.parametrize(
    ("setup", "code"),
    [
        ({"type": "Stack", "children": [{"type": "single", "children": ["../a"]}]}, "DS544"),
        ({"type": "Stack", "children": []}, "DS544"),
        ({"type": "Stack", "children": [{"type": "Fuse", "children": []}]}, "DS549"),
        ("a", "DS544"),
        ({"type": "Stack", "children": [{"type": "single", "children": [n]} for n in "ba"]}, "DS549"),
    ],
)
def test_setups(setup: Any, code: str, tmp_path: Path) -> None:
    """The last one is b (behind the block) before a (behind the projection), which would see b's change."""
    folder = copied("adapterhub", "stack_double_gpt2", tmp_path)
    whole = json.loads((folder / "adapter_setup.json").read_text()) | {"adapter_setup": setup}
    (folder / "adapter_setup.json").write_text(json.dumps(whole))
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(base_of("adapterhub", "stack_double_gpt2"), folder)
    assert {finding.code for finding in caught.value.diagnostics} == {code}


def test_every_key_is_accounted_for() -> None:
    from deltaspec.formats.adapterhub.reader import read
    from deltaspec.formats.base import Base

    folder = FIXTURES / "adapterhub" / "double_seq_bn_inv_gpt2" / "adapter"
    found = read(folder, Base(base_of("adapterhub", "double_seq_bn_inv_gpt2")), "french")
    assert found.account.keys() == torch.load(folder / "pytorch_adapter.bin").keys()
    assert all(found.account.values())
    assert [delta.name for delta in found.deltas] == ["french-invertible-1", "french-invertible-2", "french"]


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = copied("adapterhub", "seq_bn_bert", tmp_path)
    save_file(torch.load(folder / "pytorch_adapter.bin"), folder / "adapter.safetensors")
    (folder / "pytorch_adapter.bin").unlink()
    assert difference("adapterhub", "seq_bn_bert", Path(shutil.move(folder, tmp_path / "moved"))) < 5e-5
