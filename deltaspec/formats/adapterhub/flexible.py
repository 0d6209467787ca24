"""AdapterHub's flexible heads: which class of transformers has one of the same function, and where its layers are.

`flexible_heads.json` has, by model type, the heads of its classes: what they compute in AdapterHub's terms, and in
`places` the modules of their layers that have parameters, in order; `inverse` is what gives what enters the last one,
and `zero` a buffer that AdapterHub's head has not.
Read in `heads/` and `head_utils.py` of adapters 1.3, and in the classes of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from deltaspec.formats.formulas import ACTIVATIONS
from deltaspec.formats.options import Options

REMARKS = {
    "first": "its head is a classifier on the first token: it is in the logits of that token, and those of the others "
    "mean nothing",
    "last": "its head is a classifier on the last token that is not padding, which AdapterHub finds by their number: "
    "under padding on the left it takes another one",
}
"""What one must know of heads that are alike, but not on all inputs or not at all places."""
LANGUAGE = ("masked_lm", "causal_lm", "seq2seq_lm")
_ANY = "hidden_act"
"""Where a head's activation is the one that the model's configuration names."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a flexible head computes."""

    kind: str
    layers: int
    activation: str | None
    use_pooler: bool
    layer_norm: bool
    bias: bool
    """Whether its last layer has one; those before always have."""
    labels: int | None

    def keys(self, name: str) -> list[str]:
        """Return what its layers with parameters are called in the file."""
        found, number = [], 0
        language = self.kind in LANGUAGE
        for last in [False] * (self.layers - 1) + [True]:
            number += not language  # a dropout
            found.append(f"heads.{name}.{number}")
            number += 1
            if not last:
                number += self.activation is not None
                if self.layer_norm:
                    found.append(f"heads.{name}.{number}")
                    number += 1
        return found

    def __str__(self) -> str:
        layers = "one layer" if self.layers == 1 else f"{self.layers} layers with {self.activation or 'no activation'}"
        norm = " and LayerNorm" if self.layer_norm and self.layers > 1 else ""
        pooler = ", on what the pooler gives" if self.use_pooler else ""
        return f"{self.kind}, {layers}{norm}, with{'' if self.bias else 'out'} bias{pooler}"


@dataclass(frozen=True, slots=True)
class Form:
    """A head of a class of transformers."""

    kind: str
    """Name of the class."""
    places: tuple[str, ...]
    inverse: str | None
    zero: str | None
    """A buffer that it adds, and AdapterHub's has not."""
    remark: str | None


def head_in(options: Options) -> Head:
    """Read what a flexible head computes. Wrong options are findings."""
    kind, layers = options.text("head_type", ""), options.whole("layers", 1, least=1)
    pooler, norm = options.flag("use_pooler", False), options.flag("layer_norm", False)
    named = options.get("activation_function")
    if named is not None and not isinstance(named, str):
        options.wrong("activation_function", named, "a string or null")
    bias = options.flag("bias", kind not in ("causal_lm", "seq2seq_lm"))
    labels = None if options.get("num_labels") is None else options.whole("num_labels", 1, least=1)
    options.ignore("dropout_prob", "embedding_size", "vocab_size", "shift_labels", "multilabel", "num_choices")
    options.ignore("label2id", "id2label")
    options.finish("a flexible head of AdapterHub")
    return Head(kind, layers, named if isinstance(named, str) and named else None, pooler, norm, bias, labels)


def forms_of(head: Head, model_type: str | None, hidden_act: Any) -> list[Form]:
    """Return the heads of classes of transformers that compute the same."""
    if (data := _data().get(str(model_type))) is None:
        return []
    found = []
    for one in _data().get(data.get("as"), data)["heads"]:
        same = one["layers"] == head.layers and one.get("use_pooler", False) == head.use_pooler
        same &= one.get("bias", True) or not head.bias
        act = hidden_act if one.get("activation") == _ANY else one.get("activation")
        if head.layers > 1:
            same &= _ours(act) == _ours(head.activation) and one.get("layer_norm", False) == head.layer_norm
        if same and head.kind in one["types"]:
            more = (one.get(name) for name in ("inverse", "zero", "remark"))
            found.append(Form(data["class"] + one["class"], tuple(one["places"]), *more))
    return found


def _ours(activation: Any) -> str | None:
    return ACTIVATIONS.get(activation.lower(), activation) if isinstance(activation, str) else None


@cache
def _data() -> Mapping[str, Any]:
    return dict(json.loads(files(__package__).joinpath("flexible_heads.json").read_text("utf-8")))
