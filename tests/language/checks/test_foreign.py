"""Suggestions for the names of other libraries: each is followed as it stands, and what comes of it is accepted."""

from __future__ import annotations

import dataclasses
import re
from copy import deepcopy
from typing import Any

import peft
import pytest
import yaml

import deltaspec
from deltaspec.methods.registry import builtin_methods

CONFIGS = {name.lower().removesuffix("config"): name for name in dir(peft) if name.endswith("Config")}
CALLED = {"soft_prompt": "prompttuning", "prefix": "prefixtuning", "p_tuning": "promptencoder", "norm": "lntuning"}
"""Methods that have another name in PEFT."""
GIVEN: dict[str, dict[str, Any]] = {
    "lora": {"trainable_token_indices": [3, 5], "rank_pattern": {"q_proj": 4}},
    "fourierft": {"n_frequency_pattern": {"model.layers.[01].mlp": 50}},
    "c3a": {"init_weights": "gaussian", "block_size_pattern": {"up_proj": 8}},
    "miss": {"mini_r": 8},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "loha": {"alpha_pattern": {"q_proj": 16}},
    "lokr": {"decompose_factor": 8},
    "soft_prompt": {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"},
    "prefix": {"num_virtual_tokens": 4, "encoder_hidden_size": 64},
    "p_tuning": {
        "num_virtual_tokens": 4, "encoder_hidden_size": 64, "encoder_reparameterization_type": "LSTM"
    },
    "road": {"variant": 1},
}  # fmt: skip
"""Values that PEFT's users write where the default says nothing."""
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    method: (CONFIGS[name], GIVEN.get(method, {}))
    for method in builtin_methods()
    if (name := CALLED.get(method, method.replace("_", ""))) in CONFIGS
}
"""Method -> PEFT's configuration, and values that its users write."""
EVERYWHERE: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0, 2],
    "modules_to_save": ["classifier"],
}


def fields(method: str) -> dict[str, Any]:
    """Return each field of a PEFT configuration a value that one writes."""
    name, given = PEFT[method]
    found = {}
    for field in dataclasses.fields(getattr(peft, name)):
        if field.init:
            default = None if field.default is dataclasses.MISSING else field.default
            found[field.name] = (EVERYWHERE | given).get(field.name, default)
    # What is left out by default has no value that could be written.
    return {key: value for key, value in found.items() if isinstance(value, bool | int | float | str | list | dict)}


def followed(spec: dict[str, Any], place: dict[str, Any], key: str, hint: str) -> dict[str, Any]:
    """Do what a suggestion says about a key of `place`, which lies in the spec's last delta."""
    value, delta = place.pop(key), spec["deltas"][-1]
    fragment = hint.partition(": ")[2] if hint.startswith(("write ", "say ")) and "instead" not in hint else ""
    if renamed := re.fullmatch(r'did you mean "(\w+)"\?', hint):
        place[renamed[1]] = value
    elif instead := re.match(r"write (.*) instead", hint):
        place.update(yaml.safe_load(instead[1]))
    elif hint.startswith("delete it"):
        pass
    elif "beside params: " in hint:
        delta.update(yaml.safe_load(fragment))
    elif hint.startswith("write inside target: "):
        delta["target"] = {"path": "**", **yaml.safe_load(fragment)}
    elif hint.startswith("write a delta of its own: "):
        spec["deltas"].insert(0, yaml.safe_load(fragment))
    elif hint.startswith("change the method: "):
        delta["method"] = hint.rpartition(": ")[2]
    elif hint.startswith("a derived delta is written without a method: "):
        sources = [{"name": name, "method": "lora"} for name in "ab"]
        spec["deltas"] = [*sources, yaml.safe_load(hint.partition(": ")[2])]
    elif moved := re.fullmatch(r"write (\S+)", hint):
        place[key] = yaml.safe_load(moved[1])
    else:
        raise AssertionError(f"{key}: {hint!r} is no suggestion that could be followed")
    return spec


def check(method: str, key: str, value: Any) -> str:
    """Follow the suggestion for one foreign parameter; give it, or nothing where the key is ours, too."""
    params = {key: value}
    if method == "soft_prompt" and key.startswith(("prompt_tuning_init_text", "tokenizer_name")):
        params |= {"init": "text", "text": "a"} if key.startswith("token") else {"init": "text", "tokenizer": "t"}
    if method == "trainable_tokens" and key != "token_indices":
        params["token_ids"] = [3, 5]
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": params}]}
    findings = deltaspec.validate(deepcopy(spec))
    if not findings:
        return ""
    [finding] = [f for f in findings if f.where.endswith(key)]
    assert finding.suggestion is not None, finding
    after = followed(spec, spec["deltas"][0]["params"], key, finding.suggestion)
    assert deltaspec.validate(after) == [], (key, value, finding.suggestion, after)
    return finding.suggestion


@pytest.mark.parametrize("method", PEFT)
def test_every_field_of_pefts_configurations(method: str) -> None:
    for key, value in fields(method).items():
        check(method, key, value)


@pytest.mark.parametrize(
    ("method", "key", "value", "suggestion"),
    [
        ("lora", "dora", True, 'did you mean "use_dora"?'),
        ("lora", "init", "gaussian", 'did you mean "normal"?'),
        ("lora", "init_lora_weights", "gaussian", "write init: normal instead"),
        ("lora", "init_lora_weights", "pissa_niter_16", "write {init: pissa, svd_iterations: 16} instead"),
        ("lora", "init_lora_weights", True, "delete it: the start is the usual one"),
        ("lora", "init_lora_weights", "eva", "delete it: there is no such option here"),
        ("prefix", "mid_dim", 64, 'did you mean "width"?'),
        ("reft", "prefix_positions", 3, 'did you mean "first"?'),
        ("reft", "suffix_positions", 3, 'did you mean "last"?'),
        ("reft", "orthogonality", False, "write form: direft instead"),
        ("lora", "use_rslora", False, "write scaling: standard instead"),
        ("lora", "bias", "lora_only", "write true"),
        (
            "lora", "rank_pattern", {"^model.decoder": 4},
            'write beside params: overrides: [{match: {regex: "(.*[.])?(^model.decoder)"}, params: {rank: 4}}]',
        ),
        ("lora", "target_parameters", ["e.up_proj"], 'write beside params: target: {parameter: "**.e.up_proj"}'),
        (
            "lora", "modules_to_save", ["score", "classifier"],
            'write a delta of its own: {name: head, method: full, target: ["**.score", "**.classifier"]}',
        ),
        ("lora", "exclude_modules", "lm_head", 'write inside target: not: "**.lm_head"'),
        ("lora", "layers_to_transform", 3, "write inside target: layers: [3]"),
        ("lora", "attn_matrices", ["q", "k"], "write beside params: target: {role: [attn.q, attn.k]}"),
        ("lora", "intermediate_lora", True, "write beside params: target: {role: mlp.up}"),
        ("oft", "r", 8, "write block_size: 32 instead; there, that is the number of blocks; block_size is their width"),
        ("oft", "coft", True, "write constraint: 0.00006 instead"),
        ("oft", "eps", 6e-5, 'did you mean "constraint"?'),
        ("oft", "use_cayley_neumann", False, "write transform: cayley instead"),
        ("boft", "boft_dropout", 0.1, 'did you mean "block_dropout"?'),
        ("hira", "hira_dropout", 0.1, 'did you mean "dropout"?'),
        ("vera", "rank_dropout", 0.1, "delete it: there is no such option here"),
        ("bitfit", "bias", "all", "write a delta of its own: {name: biases, method: bitfit}"),
        ("ia3", "bias", "none", "delete it: there is no such option here"),
        ("miss", "init_weights", "bat", "write variant: bat instead"),
        ("fourierft", "init_weights", True, "write init: zeros instead"),
        (
            "vera", "projection_prng_key", 7,
            "delete it: the shared matrices are drawn by the spec's own seed (seed: 0, beside deltas)",
        ),
        ("prefix", "prefix_projection", True, "write reparametrisation: mlp instead"),
        ("prefix", "flat", False, "write reparametrisation: mlp instead"),
        ("soft_prompt", "prompt_tuning_init_text", "Classify:", 'did you mean "text"?'),
        ("soft_prompt", "tokenizer_name_or_path", "org/model", 'did you mean "tokenizer"?'),
        ("soft_prompt", "num_virtual_tokens", 20, 'did you mean "tokens"?'),
        ("adapter", "reduction_factor", 16, 'did you mean "reduction"?'),
        ("adapter", "ln_before", True, 'did you mean "norm_before"?'),
        ("adapter", "mh_adapter", True, "write placement: houlsby instead"),
        ("adapter", "is_parallel", True, "change the method: parallel_adapter"),
        ("adapter", "leave_out", [0, 1], "write inside target: not: {layers: [0, 1]}"),
        (
            "adapter", "unfrozen_modules", ["lm_head"],
            'write a delta of its own: {name: head, method: full, target: "**.lm_head"}',
        ),
        ("compacter", "shared_phm_rule", False, 'did you mean "share_rule"?'),
        ("compacter", "hypercomplex_division", 4, 'did you mean "divisions"?'),
        (
            "adalora", "tinit", 200,
            'delete it: that is told to the training, RankAllocator(compiled, "name", warmup_steps=200, …)',
        ),
    ],
)  # fmt: skip
def test_a_suggestion_can_be_followed(method: str, key: str, value: Any, suggestion: str) -> None:
    if (method, key) == ("lora", "init"):
        [finding] = deltaspec.validate(
            {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "params": {"init": value}}]}
        )
        assert finding.suggestion == suggestion
        return
    assert check(method, key, value) == suggestion


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"method": "lora", "combination_type": "linear"}, "combination_type"),
        ({"method": "lora", "adapters": ["a", "b"]}, "adapters"),
        ({"weights": [0.5, 0.5], "combine": "linear"}, "weights"),
    ],
)
def test_names_of_combinations_are_followed_whole(entry: dict[str, Any], key: str) -> None:
    spec = {"deltaspec": 1, "deltas": [{"name": "d", **entry}]}
    finding = next(f for f in deltaspec.validate(spec) if f.where.endswith(key))
    assert deltaspec.validate(followed(deepcopy(spec), dict(entry), key, str(finding.suggestion))) == []


def test_a_way_to_combine_beside_sources_is_renamed() -> None:
    derived = {"name": "d", "from": {"a": 0.5}, "combination_type": "linear"}
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora"}, derived]}
    finding = next(f for f in deltaspec.validate(spec) if f.where.endswith("combination_type"))
    assert finding.suggestion == 'did you mean "combine"?'
    derived["combine"] = derived.pop("combination_type")
    assert deltaspec.validate(spec) == []
