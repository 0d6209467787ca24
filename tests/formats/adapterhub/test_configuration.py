"""AdapterHub's configurations: strings, unions, and those of older versions."""

from __future__ import annotations

from typing import Any

import pytest

from deltaspec.formats.adapterhub.configuration import parts_of

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
