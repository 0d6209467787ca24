"""Options of PEFT configurations that are not what they may be: one error that says so, and never another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaspec
from deltaspec.deltas.finite import is_finite
from deltaspec.formats.base import Base
from deltaspec.formats.opening import open_set
from deltaspec.formats.peft.reader import base_of
from deltaspec.storage.delta_set import DeltaSet

FILE = "adapter_model.safetensors"

USUAL = "the configuration was changed by hand: save the adapter again"
WRONG: tuple[Any, ...] = (5, "x", [], [5], {"a": 1}, None, -1, 1.5, True, "(", 10**400)
COMMON = {
    "base_model_name_or_path": "base", "revision": None, "task_type": None, "auto_mapping": None,
    "inference_mode": True, "target_modules": ["q_proj", "v_proj"], "exclude_modules": None,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {}, "new_option": None,
}  # fmt: skip
"""Options of several types; the last one is of none."""
PATTERNS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern")
WITHOUT_LAYERS = {name: value for name, value in COMMON.items() if name not in PATTERNS}
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {
        **COMMON, "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "lora_bias": False, "init_lora_weights": True, "bias": "none", "target_parameters": None,
        "trainable_token_indices": None, "layer_replication": None,
        "ensure_weight_tying": False, "alora_invocation_tokens": None,
    },
    "IA3": {**WITHOUT_LAYERS, "feedforward_modules": ["v_proj"]},
    "LOKR": {
        **COMMON, "r": 2, "alpha": 4, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False,
        "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False, "init_weights": True,
    },
    "LOHA": {**COMMON, "r": 2, "alpha": 4, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False},
    "ADALORA": {**COMMON, "init_r": 2, "target_r": 1, "lora_alpha": 4, "lora_dropout": 0.0, "rank_pattern": None},
    "VERA": {**WITHOUT_LAYERS, "r": 2, "vera_dropout": 0.0, "d_initial": 0.1, "projection_prng_key": 0,
             "save_projection": False},
    "FOURIERFT": {**WITHOUT_LAYERS, "n_frequency": 3, "random_loc_seed": 7, "scaling": 1.0, "n_frequency_pattern": {},
                  "init_weights": False},
    "C3A": {**WITHOUT_LAYERS, "block_size": 2, "block_size_pattern": {}, "init_weights": None},
    "HRA": {**WITHOUT_LAYERS, "r": 2, "apply_GS": False},
    "ROAD": {**WITHOUT_LAYERS, "variant": "road_1", "group_size": 2},
    "OFT": {**WITHOUT_LAYERS, "r": 0, "oft_block_size": 2, "module_dropout": 0.0, "coft": False, "eps": 6e-5,
            "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
    "BOFT": {**WITHOUT_LAYERS, "boft_block_size": 2, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0},
    "MISS": {**WITHOUT_LAYERS, "r": 2, "mini_r": 1, "miss_dropout": 0.0, "init_weights": True},
    "DELORA": {**COMMON, "r": 2, "delora_lambda": 15, "module_dropout": 0.0, "init_weights": True},
    "HIRA": {**COMMON, "r": 2, "hira_dropout": 0.0, "init_weights": True},
}  # fmt: skip
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "LORA": {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)},
    "IA3": {"ia3_l": (4, 1)},
    "LOKR": {"lokr_w1": (2, 2), "lokr_w2": (2, 2)},
    "LOHA": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)},
    "ADALORA": {"lora_A": (2, 4), "lora_E": (2, 1), "lora_B": (4, 2)},
    "VERA": {"vera_lambda_d": (2,), "vera_lambda_b": (4,)},
    "FOURIERFT": {"fourierft_spectrum": (3,)},
    "C3A": {"c3a_kernel": (2, 2, 2)},
    "HRA": {"hra_u": (4, 2)},
    "ROAD": {"road_theta": (2,), "road_alpha": (2,)},
    "OFT": {"oft_R.weight": (2, 1)},
    "BOFT": {"boft_R": (1, 2, 2, 2), "boft_s": (4, 1)},
    "MISS": {"miss_block": (2, 4)},
    "DELORA": {"delora_A": (2, 4), "delora_B": (4, 2), "delora_lambda": (1,), "delora_w_norm": (4,)},
    "HIRA": {"hira_A": (2, 4), "hira_B": (4, 2)},
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})


def tensors(kind: str, **changed: Tensor) -> dict[str, Tensor]:
    found = {}
    for module in ("q_proj", "v_proj"):
        for name, shape in SHAPES[kind].items():
            turned = kind == "IA3" and module == "v_proj"
            found[f"base_model.model.{module}.{name}"] = torch.ones(shape[::-1] if turned else shape)
    return {**found, **changed}


def write(folder: Path, kind: str, **changed: Any) -> None:
    config = {"peft_type": kind, **OPTIONS[kind], **changed}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def received(folder: Path, plain: Base) -> DeltaSet:
    return open_set(folder, lambda: plain)


def refused(folder: Path, kind: str, name: str, value: Any) -> tuple[str, str | None]:
    """Return the message and the way out of the one finding about an option."""
    save_file(tensors(kind), folder / FILE)
    write(folder, kind, **{name: value})
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        deltaspec.restore(base(), folder)
    (finding,) = caught.value.diagnostics
    assert finding.code == "DS544"
    return finding.message, finding.suggestion


@pytest.mark.parametrize("kind", OPTIONS)
def test_any_value_is_read_or_is_a_finding(kind: str, tmp_path: Path) -> None:
    plain = Base(base())
    save_file(tensors(kind), tmp_path / FILE)
    write(tmp_path, kind)
    received(tmp_path, plain)
    names = OPTIONS[kind] if kind in ("LORA", "IA3", "LOKR") else OPTIONS[kind].keys() - COMMON.keys()
    for name in names:
        for value in WRONG:
            write(tmp_path, kind, **{name: value})
            try:
                received(tmp_path, plain)
            except deltaspec.DeltaSpecError:
                continue
            except Exception as error:
                pytest.fail(f"{name}: {value!r}: {error!r}")


@pytest.mark.parametrize(
    ("kind", "name", "value", "says"),
    [
        ("LORA", "r", "x", "r: 'x' is not a whole number from 1 on"),
        ("LORA", "lora_alpha", [], "lora_alpha: [] is not a number"),
        ("LORA", "lora_dropout", "x", "lora_dropout: 'x' is not a number"),
        ("LORA", "alpha_pattern", "x", "alpha_pattern: 'x' is not a mapping of names to numbers"),
        ("LORA", "rank_pattern", {"q_proj": None}, "is not a mapping of names to whole numbers from 1 on"),
        ("LORA", "rank_pattern", {"(": 4}, "rank_pattern: {'(': 4} is not made of regular expressions: "),
        ("LORA", "target_modules", 5, "target_modules: 5 is not a string or a list of strings"),
        ("LORA", "target_modules", "(", "target_modules: '(' is not made of regular expressions: "),
        ("LORA", "exclude_modules", 5, "exclude_modules: 5 is not a string or a list of strings"),
        ("LORA", "layers_pattern", ["("], "layers_pattern: ['('] is not made of regular expressions: "),
        ("LORA", "layers_to_transform", "x", "layers_to_transform: 'x' is not a whole number from 0 on"),
        ("LORA", "target_parameters", [[1]], "target_parameters: [[1]] is not a list of strings"),
        ("IA3", "feedforward_modules", 5, "feedforward_modules: 5 is not a string or a list of strings"),
        ("ADALORA", "rank_pattern", {"q_proj.lora_E": 2}, "is not a mapping of names to lists of true and false"),
        ("C3A", "block_size_pattern", {"(": 2}, "block_size_pattern: {'(': 2} is not made of regular expressions: "),
        ("LOKR", "base_model_name_or_path", 5, "base_model_name_or_path: 5 is not a string"),
    ],
)  # fmt: skip
def test_the_finding_is_the_option_alone(kind: str, name: str, value: Any, says: str, tmp_path: Path) -> None:
    message, hint = refused(tmp_path, kind, name, value)
    assert says in message
    assert hint == USUAL


@pytest.mark.parametrize(
    ("kind", "name", "value", "hint"),
    [
        ("LORA", "init_lora_weights", "guassian", "gaussian"),
        ("LORA", "init_lora_weights", "pissa_niter_x", "pissa_niter_16"),
        ("ADALORA", "init_lora_weights", "orthogonl", "orthogonal"),
        ("LORA", "bias", "lora_onyl", "lora_only"),
        ("BOFT", "bias", "boft", "boft_only"),
        ("LORA", "task_type", "CASUAL_LM", "CAUSAL_LM"),
        ("LOKR", "init_weights", "lycors", "lycoris"),
        ("HIRA", "init_weights", "gausian", "gaussian"),
        ("C3A", "init_weights", "xavier", "xavier_uniform"),
        ("MISS", "init_weights", "minni", "mini"),
        ("ROAD", "variant", "road_3", "road_4"),
        ("LOHA", "init_weights", "true", None),
        ("OFT", "init_weights", "gaussian", None),
        ("IA3", "init_ia3_weights", 1, None),
    ],
)
def test_words_that_are_not_known(kind: str, name: str, value: Any, hint: str | None, tmp_path: Path) -> None:
    message, found = refused(tmp_path, kind, name, value)
    assert message.startswith(f"{name}: {value!r} is not ")
    assert found == (USUAL if hint is None else f"did you mean {hint!r}?")


def test_words_that_peft_reads_in_any_case(tmp_path: Path) -> None:
    save_file(tensors("LORA"), tmp_path / FILE)
    write(tmp_path, "LORA", init_lora_weights="OLoRA")
    (delta,) = deltaspec.restore(base(), tmp_path).plan.deltas
    assert delta.sites[0].params.init == "olora"


@pytest.mark.parametrize("kind", OPTIONS)
def test_tensors_of_other_shapes_and_types(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    plain, usual = Base(base()), tensors(kind)
    for key, value in list(usual.items())[: len(SHAPES[kind])]:
        for other in (torch.ones(()), torch.ones(0), value[None], value.flatten()[:1], value.int(), value > 0,
                      value.to(torch.float8_e4m3fn), value.to(torch.complex64), value * torch.nan):  # fmt: skip
            save_file({**usual, key: other.contiguous()}, tmp_path / FILE)
            try:
                received(tmp_path, plain)
            except deltaspec.DeltaSpecError:
                continue
            except Exception as error:
                pytest.fail(f"{key}: {other!r}: {error!r}")


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 4), (1, 4, 1, 1)])
def test_magnitudes_are_vectors_where_no_convolution_is(shape: tuple[int, ...], tmp_path: Path) -> None:
    write(tmp_path, "LORA", use_dora=True)
    names = [f"base_model.model.{module}.lora_magnitude_vector" for module in ("q_proj", "v_proj")]
    save_file({**tensors("LORA"), **{name: torch.ones(4) for name in names}}, tmp_path / FILE)
    deltaspec.restore(base(), tmp_path)
    save_file({**tensors("LORA"), names[0]: torch.ones(shape), names[1]: torch.ones(4)}, tmp_path / FILE)
    with pytest.raises(deltaspec.DeltaSpecError, match="DS526"):
        deltaspec.restore(base(), tmp_path)


def test_float8_is_looked_at_for_what_is_not_finite() -> None:
    value = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    assert is_finite(value)
    assert not is_finite(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("changed", "head", "says"),
    [
        (
            {"auto_mapping": {"base_model_class": 5, "parent_library": "transformers.models"}},
            None,
            "base_model_class: 5",
        ),
        ({"auto_mapping": "x"}, None, "auto_mapping: 'x' is not a mapping"),
        ({"task_type": 5}, None, "task_type: 5 is not 'CAUSAL_LM', "),
        ({"task_type": "SEQ_CLS"}, torch.ones(()), "its head has the shape []"),
    ],
)
def test_the_base_model_that_is_named(changed: Any, head: Tensor | None, says: str, tmp_path: Path) -> None:
    write(tmp_path, "LORA", **changed)
    more = {} if head is None else {"base_model.model.score.weight": head}
    save_file({**tensors("LORA"), **more}, tmp_path / FILE)
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        base_of(tmp_path)
    assert [says in finding.message for finding in caught.value.diagnostics] == [True]
