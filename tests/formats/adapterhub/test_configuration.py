"""AdapterHub's configurations: strings, unions, and those of older versions."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from written_elsewhere import base_of, copied, try_wrong_values

import deltaspec
from deltaspec.formats.adapterhub.adapter import CONFIG
from deltaspec.formats.adapterhub.configuration import parts_of
from deltaspec.formats.base import Base
from deltaspec.formats.opening import open_set

LATEST = {"version": "adapters.1.3.0"}


def test_string_with_options() -> None:
    (found,) = parts_of("seq_bn[reduction_factor=16, non_linearity='gelu', leave_out=[0, 2]]", LATEST)
    assert found["reduction_factor"] == 16 and found["non_linearity"] == "gelu" and found["leave_out"] == [0, 2]
    assert found["original_ln_before"] and not found["mh_adapter"]


def test_string_of_several() -> None:
    lora, prefix = parts_of("lora[r=4,alpha=2] | prefix_tuning_flat", LATEST)
    assert (lora["architecture"], lora["r"], lora["alpha"]) == ("lora", 4, 2)
    assert prefix == {"architecture": "prefix_tuning", "flat": True}


@pytest.mark.parametrize(
    ("name", "architectures"), [("mam", ["prefix_tuning", None]), ("unipelt", ["prefix_tuning", None, "lora"])]
)
def test_named_unions(name: str, architectures: list[str | None]) -> None:
    assert [part.get("architecture") for part in parts_of(name, LATEST)] == architectures


@pytest.mark.parametrize(
    "given",
    [
        "seq_bm",
        "seq_bn[reduction_factor]",
        "seq_bn[r=__import__('os')]",
        "",
        None,
        3,
        ["lora"],
        {"architecture": "union"},
    ],
)
def test_what_is_none(given: Any) -> None:
    with pytest.raises(ValueError):
        parts_of(given, LATEST)


@pytest.mark.parametrize(
    ("version", "alpha"),
    [({}, 16), ({"version": "3.2.1"}, 16), ({"version": "adapters.1.0.0"}, 4), ({"version": "adapters.1.1.0"}, 16)],
)
def test_alpha_of_versions(version: dict[str, Any], alpha: int) -> None:
    (found,) = parts_of({"architecture": "lora", "r": 4, "alpha": 16}, version)
    assert found["alpha"] == alpha


def test_version_one() -> None:
    old = {"non_linearity": "gelu", "invertible_adapter": {"block_type": "nice", "reduction_factor": 2}}
    (found,) = parts_of(old, {})
    assert found == {"non_linearity": "gelu_new", "inv_adapter": "nice"}
    assert parts_of({"non_linearity": "gelu_orig"}, {})[0]["non_linearity"] == "gelu"
    assert parts_of({"non_linearity": "gelu"}, LATEST)[0]["non_linearity"] == "gelu"


READ = {
    "seq_bn_bert": ("reduction_factor", "scaling", "non_linearity", "residual_before_ln", "stochastic_depth",
                    "phm_dim"),
    "ia3_gpt2": ("alpha", "attn_matrices", "leave_out", "composition_mode", "architecture"),
    "lora_gating_bert": ("r", "alpha", "dropout", "vera_d", "use_gating", "selfattn_lora"),
    "prefix_gpt2": ("prefix_length", "non_linearity", "leave_out", "use_gating", "cross_prefix"),
    "loreft_bert": ("r", "layers", "prefix_positions", "dropout", "orthogonality"),
}  # fmt: skip
"""Options that a reader asks for, by case."""


def rewritten(folder: Path, whole: dict[str, Any], **config: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**whole, "config": {**whole["config"], **config}}))


def findings(folder: Path, plain: Base) -> list[Any]:
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        open_set(folder, lambda: plain)
    return list(caught.value.diagnostics)


@pytest.mark.parametrize("case", READ)
def test_any_value_is_read_or_is_a_finding(case: str, tmp_path: Path) -> None:
    folder = copied("adapterhub", case, tmp_path)
    whole = json.loads((folder / CONFIG).read_text())
    try_wrong_values("adapterhub", case, folder, READ[case], partial(rewritten, folder, whole))


@pytest.mark.parametrize(
    ("case", "options", "said"),
    [
        ("seq_bn_bert", {"dropout": 5}, "dropout must be less than 1"),
        ("seq_bn_bert", {"scaling": 1e9}, "scale must be at most 1000000"),
        ("seq_bn_bert", {"reduction_factor": 10**400}, "reduction_factor"),
        ("seq_bn_bert", {"a_new_one": 3}, "a_new_one: 3 is no option"),
        ("ia3_gpt2", {"alpha": 1e300}, "alpha: 1e+300 is not a number"),
        ("union_lora_seqbn_gpt2", {"a_new_one": 3}, "a_new_one is no key of a union"),
    ],
)
def test_the_finding_is_about_the_configuration(case: str, options: Any, said: str, tmp_path: Path) -> None:
    folder = copied("adapterhub", case, tmp_path)
    rewritten(folder, json.loads((folder / CONFIG).read_text()), **options)
    found = findings(folder, Base(base_of("adapterhub", case)))
    assert {(finding.code, bool(finding.suggestion)) for finding in found} == {("DS544", True)}
    assert all(str(folder) in finding.file for finding in found) and said in found[0].message


def test_all_findings_at_once(tmp_path: Path) -> None:
    folder = copied("adapterhub", "lora_gating_bert", tmp_path)
    rewritten(folder, json.loads((folder / CONFIG).read_text()), r="x", alpha=[], dropout="y", leave_out="z")
    messages = [finding.message for finding in findings(folder, Base(base_of("adapterhub", "lora_gating_bert")))]
    assert [message.partition(":")[0] for message in messages] == ["leave_out", "r", "alpha", "dropout"]


@pytest.mark.parametrize(
    ("around", "said"),
    [
        ({"name": 5}, "name: 5 is not a string"),
        ({"hidden_size": "x"}, "hidden_size: 'x' is not a whole number"),
        ({"version": [1]}, "version: [1] is not a string"),
        ({"a_new_one": 3}, "a_new_one: 3 is no option of an adapter_config.json"),
        ({"config": "seqbn[reduction_factor=8]"}, "did you mean 'seq_bn'?"),
        ({"config": "lora["}, "not of the form name[key=value, …]"),
        ({"config": 5}, "it is a int, neither a mapping nor a string"),
        ({"config": {"architecture": "union", "configs": []}}, "a union without configurations"),
    ],
)
def test_what_is_around_the_configuration(around: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = copied("adapterhub", "seq_bn_bert", tmp_path)
    whole = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**copy.deepcopy(whole), **around}))
    found = findings(folder, Base(base_of("adapterhub", "seq_bn_bert")))
    assert {finding.code for finding in found} == {"DS544"} and said in found[0].message
