"""The names that other libraries' configurations use (PEFT, AdapterHub, OpenDelta), and what to write here instead.

Every answer can be followed as it stands: `did you mean "rank"?` renames the key, `write scaling: rslora instead` puts
that in its place, and `delete it` takes it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from json import dumps
from typing import Any

RENAMES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("r", "lora_r", "lora_rank", "rnk", "target_r", "low_rank_dimension", "svd_rank"), ("rank",)),
    **dict.fromkeys(("phm_rank", "low_rank_rank", "low_rank_w_rank"), ("rank",)),
    "lora_alpha": ("alpha",),
    **dict.fromkeys(("lora_dropout", "vera_dropout", "miss_dropout", "encoder_dropout", "p"), ("dropout",)),
    **dict.fromkeys(("dropout_rate", "hira_dropout"), ("dropout",)),
    "lora_bias": ("bias",),
    "dora": ("use_dora",),
    "init_r": ("initial_rank",),
    "d_initial": ("initial_scale",),
    "block_share": ("shared_blocks",),
    "num_cayley_neumann_terms": ("terms",),
    "oft_block_size": ("block_size",),
    "decompose_factor": ("factor",),
    "use_effective_conv2d": ("tucker",),
    "boft_n_butterfly_factor": ("factors",),
    "boft_block_size": ("block_size",),
    "apply_gs": ("orthogonal",),
    "n_frequency": ("frequencies",),
    "random_loc_seed": ("frequency_seed",),
    "scaling": ("scale",),
    "encoder_num_layers": ("layers",),
    "prompt_tuning_init_text": ("text",),
    "tokenizer_name_or_path": ("tokenizer",),
    "token_indices": ("token_ids",),
    **dict.fromkeys(("phm_dim", "hypercomplex_division"), ("divisions",)),
    "shared_phm_rule": ("share_rule",),
    "ln_before": ("norm_before",),
    "ln_after": ("norm_after",),
    "majority_sign_method": ("majority_sign",),
    **dict.fromkeys(("bottleneck_dim", "bottleneck_size", "bottleneck", "adapter_dim"), ("width",)),
    **dict.fromkeys(("encoder_hidden_size", "mid_dim"), ("width",)),
    "prefix_positions": ("first",),
    "suffix_positions": ("last",),
    "tied_weights": ("tied",),
    **dict.fromkeys(("non_linearity", "nonlinearity", "act", "act_fn", "activation_fn"), ("activation",)),
    "reduction_factor": ("reduction",),
    "scaling_factor": ("scale", "alpha"),
    **dict.fromkeys(
        ("num_virtual_tokens", "prefix_token_num", "soft_token_num", "prefix_length", "prompt_length"), ("tokens",)
    ),
}
"""Parameters that mean the same; the first one that the method has."""

_NEEDLESS = "delete it: deltaspec needs no such key"
_MISSING = "delete it: there is no such option here"
_MODEL = "delete it: the model says so itself"
_TRAINING = 'delete it: that is told to the training, RankAllocator(compiled, "name", warmup_steps=200, …)'
_START = "delete it: the start is the usual one"
_GONE: Mapping[str, str] = {
    **dict.fromkeys(("task_type", "inference_mode", "fan_in_fan_out", "base_model_name_or_path"), _NEEDLESS),
    **dict.fromkeys(("backbone_model", "common_structure", "structure_mapping", "interactive_modify"), _NEEDLESS),
    **dict.fromkeys(("revision", "auto_mapping", "peft_version", "runtime_config", "architecture"), _NEEDLESS),
    **dict.fromkeys(("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), _MODEL),
    **dict.fromkeys(("tinit", "tfinal", "deltat", "total_step", "beta1", "beta2", "orth_reg_weight"), _TRAINING),
    **dict.fromkeys(("module_dropout", "rank_dropout", "rank_dropout_scale", "boft_dropout"), _MISSING),
    **dict.fromkeys(("coft", "eps", "layer_replication", "megatron_core", "use_bdlora", "use_qalora"), _MISSING),
    **dict.fromkeys(("qalora_group_size", "alora_invocation_tokens", "ensure_weight_tying", "use_dora"), _MISSING),
    **dict.fromkeys(("use_gating", "inv_adapter", "cross_adapter", "original_ln_before", "tokenizer_kwargs"), _MISSING),
    **dict.fromkeys(("original_ln_after", "residual_before_ln", "adapter_residual_before_ln"), _MISSING),
    **dict.fromkeys(("init_weights", "init_ia3_weights", "phm_c_init", "phm_init_range", "low_rank_w_init"), _START),
    **dict.fromkeys(("hypercomplex_nonlinearity", "learn_phm"), _START),
    **dict.fromkeys(("factorized_phm", "factorized_phm_w", "factorized_phm_rule"), _START),
    "projection_prng_key": "delete it: the shared matrices are drawn by the spec's own seed (seed: 0, beside deltas)",
    "save_projection": "delete it: the shared matrices are always saved",
    "feedforward_modules": "delete it: position: auto scales what enters the second feed-forward layer by itself",
    **dict.fromkeys(("output_adapter", "composition_mode", "cross_prefix", "encoder_prefix"), _MISSING),
}
_BLOCKS = "there, that is the number of blocks; block_size is their width"
_VALUES: Mapping[str, tuple[str, Mapping[object, str]]] = {
    # key there -> the parameter here that must be known, and by value what is written in its place
    "use_rslora": ("scaling", {True: "scaling: rslora", False: "scaling: standard"}),
    "rslora": ("scaling", {True: "scaling: rslora", False: "scaling: standard"}),
    "init_lora_weights": (
        "svd_iterations",
        {"gaussian": "init: normal", "pissa": "init: pissa", "orthogonal": "init: orthogonal"},
    ),
    **dict.fromkeys(("orthogonality", "subtract_projection"), ("form", {True: "form: loreft", False: "form: direft"})),
    "use_cayley_neumann": ("transform", {True: "transform: cayley_neumann", False: "transform: cayley"}),
    "prefix_projection": ("reparametrisation", {True: "reparametrisation: mlp", False: "reparametrisation: none"}),
    "mh_adapter": ("placement", {True: "placement: houlsby", False: "placement: pfeiffer"}),
    "flat": ("reparametrisation", {True: "reparametrisation: none", False: "reparametrisation: mlp"}),
    "encoder_reparameterization_type": ("encoder", {"MLP": "encoder: mlp", "LSTM": "encoder: lstm"}),
    "prompt_tuning_init": (
        "token_ids",
        {"TEXT": "init: text", "SAMPLE_VOCAB": "init: vocabulary", "RANDOM": "init: uniform"},
    ),
}
_STARTS: tuple[tuple[str, Mapping[object, str]], ...] = (
    # init_weights, told apart by a parameter of the method
    ("frequencies", {True: "init: zeros", False: "init: normal"}),
    ("variant", {"bat": "variant: bat", "mini": "variant: mini"}),
    ("block_size", {True: "init: zeros", "gaussian": "init: normal", "xavier_uniform": "init: xavier_uniform"}),
)
VALUES: Mapping[tuple[str, str], str] = {
    ("init", "gaussian"): "normal",
    ("init", "true"): "kaiming_uniform",
    ("init", "random"): "uniform",
    ("init", "sample_vocab"): "vocabulary",
    ("combine", "weighted"): "linear",
    **{("dtype", word): "float16" for word in ("fp16", "half", "f16")},
    **{("dtype", word): "bfloat16" for word in ("bf16", "bfloat")},
    **{("dtype", word): "float32" for word in ("fp32", "float", "single", "f32")},
    **{("dtype", word): "float64" for word in ("fp64", "double", "f64")},
}
"""Values that are called otherwise: (key, value in small letters)."""


def parameter_hint(key: str, value: object, known: Collection[str]) -> str | None:
    """Return what to write for another library's parameter, in a method that knows the parameters `known`."""
    plain = key.lower()
    if plain == "r" and "shared_blocks" in known:  # OFT's
        return f"write block_size: 32 instead; {_BLOCKS}"
    if plain == "boft_block_num" and "factors" in known:
        return f"write block_size: 4 instead; {_BLOCKS}"
    if plain == "mini_r" and "variant" in known:
        return f"write {{variant: mini, width: {_flow(value)}}} instead"
    if plain == "init_lora_weights" and "svd_iterations" in known:
        powers = re.fullmatch(r"pissa_niter_(\d+)", str(value))
        if powers:
            return f"write {{init: pissa, svd_iterations: {powers[1]}}} instead"
    if plain in _VALUES and _VALUES[plain][0] in known:
        return _written(_VALUES[plain][1], value)
    if plain == "init_weights":
        for needed, answers in _STARTS:
            if needed in known and ("init" in known or needed == "variant"):
                return _written(answers, value)
    if plain == "bias":
        return _MISSING if value in ("none", False) else f"write a delta of its own: {_own('biases', 'bitfit')}"
    ours = next((name for name in RENAMES.get(plain, ()) if name in known), None)
    if ours is None and (plain.endswith(("dropout", "_config")) or plain in RENAMES or plain in _VALUES):
        return _MISSING
    return None if ours is None else f'did you mean "{ours}"?'


def place_hint(key: str, value: object) -> str | None:
    """Return what to write, and where, for another library's key that is no parameter here."""
    plain = key.lower()
    make = _PLACES.get(plain)
    return make(value) if make is not None else _GONE.get(plain)


def _target(value: object) -> str:
    paths = [_path(name) for name in _names(value)] or ['"**.q_proj"']
    return f"say where with target, beside params: target: {_one_or_list(paths)}"


def _own_delta(value: object) -> str:
    paths = [_path(name) for name in _names(value)] or ['"**.classifier"']
    return f"write a delta of its own: {_own('head', 'full', _one_or_list(paths))}"


def _own(name: str, method: str, target: str = "") -> str:
    return f"{{name: {name}, method: {method}{', target: ' + target if target else ''}}}"


def _tokens(value: object) -> str:
    ids = _flow(value) if isinstance(value, list) else "[7, 8]"
    return f"write a delta of its own: {{name: tokens, method: trainable_tokens, params: {{token_ids: {ids}}}}}"


def _pattern(name: str) -> Callable[[object], str]:
    """Make the answer for another value of a parameter at some modules, which is a mapping there."""

    def hint(value: object) -> str:
        pairs = list(value.items()) if isinstance(value, dict) else []
        pairs = [(k, v) for k, v in pairs if isinstance(k, str)] or [("q_proj", 4)]
        each = ", ".join(f"{{match: {_match(k)}, params: {{{name}: {_flow(v)}}}}}" for k, v in pairs)
        return f"write beside params: overrides: [{each}]"

    return hint


def _match(name: str) -> str:
    return _path(name) if re.fullmatch(r"[\w.*]+", name) else f"{{regex: {dumps(f'(.*[.])?({name})')}}}"


def _layers(value: object) -> str:
    return f"write inside target: layers: {_layer_list(value)}"


def _left_out(value: object) -> str:
    return f"write inside target: not: {{layers: {_layer_list(value)}}}"


def _layer_list(value: object) -> str:
    numbers = value if isinstance(value, list) else [value]
    return _flow(numbers) if numbers and all(type(n) is int and n >= 0 for n in numbers) else "[0, 1]"


def _excluded(value: object) -> str:
    paths = [_path(name) for name in _names(value)] or ['"**.lm_head"']
    return f"write inside target: not: {_one_or_list(paths)}"


def _stacked(value: object) -> str:
    paths = [_path(name) for name in _names(value)] or ['"**.experts.gate_up_proj"']
    return f"write beside params: target: {{parameter: {_one_or_list(paths)}}}"


def _attention(value: object) -> str:
    letters = [n for n in _names(value) if n in ("q", "k", "v")] or ["q", "v"]
    return f"write beside params: target: {{role: [{', '.join(f'attn.{n}' for n in letters)}]}}"


def _role(name: str) -> Callable[[object], str]:
    return lambda value: f"write beside params: target: {{role: {name}}}" if value else _NEEDLESS


_LORA_PLACES = {"selfattn_lora": "[attn.q, attn.v]", "intermediate_lora": "mlp.up", "output_lora": "mlp.down"}
_PLACES: Mapping[str, Callable[[object], str]] = {
    **dict.fromkeys(("target_modules", "modified_modules", "modules", "targets"), _target),
    **dict.fromkeys(("exclude_modules", "exclude"), _excluded),
    "target_parameters": _stacked,
    "attn_matrices": _attention,
    **dict.fromkeys(("layers_to_transform", "layers_pattern"), _layers),
    "leave_out": _left_out,
    **dict.fromkeys(("modules_to_save", "unfrozen_modules", "trainable_modules"), _own_delta),
    "trainable_token_indices": _tokens,
    "is_parallel": lambda value: f"change the method: {'parallel_adapter' if value else 'adapter'}",
    "phm_layer": lambda value: f"change the method: {'compacter' if value else 'adapter'}",
    **{key: _role(role) for key, role in _LORA_PLACES.items()},
    **dict.fromkeys(("rank_pattern", "r_pattern"), _pattern("rank")),
    "alpha_pattern": _pattern("alpha"),
    "n_frequency_pattern": _pattern("frequencies"),
    "block_size_pattern": _pattern("block_size"),
}


def _written(answers: Mapping[object, str], value: object) -> str:
    found = next((text for given, text in answers.items() if given is value or given == str(value)), None)
    if found is None:  # a start that is named, and not here, is another than the usual one
        return _MISSING if isinstance(value, str) else _START
    return f"write {found} instead"


def _names(value: object) -> list[str]:
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str) and name]


def _path(name: str) -> str:
    return dumps(name if name.startswith("**") else f"**.{name}", ensure_ascii=False)


def _one_or_list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"[{', '.join(items)}]"


def _flow(value: Any) -> str:
    return dumps(value, ensure_ascii=False)
