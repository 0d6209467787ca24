"""P-tuning: embeddings in front of the input, computed by a small encoder that folds away after training."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from deltaspec.methods.base import Tensors
from deltaspec.methods.declarations import Init, Promises, Site, TensorSpec
from deltaspec.methods.shared.prompts import PromptMethod, PromptParams

if TYPE_CHECKING:
    from torch import Tensor

_SIDES = ("", "_reverse")


class PTuningParams(PromptParams):
    """Parameters of p_tuning."""

    tokens: Annotated[int, Field(ge=1, le=65536)] = 20
    """Number of embeddings; they take as many positions of the model's context."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """`mlp`: three linear layers with ReLU. `lstm`: a bidirectional LSTM, then two linear layers with ReLU."""
    width: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Hidden width of the encoder; left out: the width of the model's embeddings."""
    layers: Annotated[int, Field(ge=1, le=16)] = 2
    """Layers of the LSTM."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry between layers of the LSTM while training."""

    @model_validator(mode="after")
    def _dropout_has_a_place(self) -> PTuningParams:
        if self.dropout and (self.encoder == "mlp" or self.layers == 1):
            raise ValueError("dropout lies between layers of the LSTM: set encoder: lstm and layers: 2, or dropout: 0")
        return self


class PTuning(PromptMethod):
    """P-tuning."""

    name = "p_tuning"
    summary = "embeddings in front of the input, from a small encoder that folds away"
    paper = "GPT Understands, Too (arXiv:2103.10385)"
    Params = PTuningParams
    promises = Promises(identity_at_start=False, weight=None, per_row=True)
    default_roles = ("embed",)
    small = {"tokens": 2, "width": 4}
    foreign = {
        "encoder_hidden_size": "width",
        "encoder_num_layers": "layers",
        "encoder_dropout": "dropout",
        "encoder_reparameterization_type": {"MLP": "encoder: mlp", "LSTM": "encoder: lstm"},
    }

    def tensors(self, site: Site, params: PTuningParams) -> tuple[TensorSpec, ...]:
        """Declare the encoder's input `[tokens, width]` and its layers, weights `[out, in]`."""
        assert site.row.out_features is not None
        width = site.row.out_features
        hidden = params.width or width
        specs = [TensorSpec("prompt", (params.tokens, width), Init("normal", 1.0))]
        if params.encoder == "mlp":
            sizes = [(width, hidden), (hidden, hidden), (hidden, width)]
        else:
            for layer in range(params.layers):
                into = 2 * hidden if layer else width
                for side in _SIDES:
                    specs += [
                        _weight(f"lstm_{layer}_input{side}", 4 * hidden, into),
                        _weight(f"lstm_{layer}_hidden{side}", 4 * hidden, hidden),
                        TensorSpec(f"lstm_{layer}_input_bias{side}", (4 * hidden,)),
                        TensorSpec(f"lstm_{layer}_hidden_bias{side}", (4 * hidden,)),
                    ]
            sizes = [(2 * hidden, 2 * hidden), (2 * hidden, width)]
        for number, (into, out) in enumerate(sizes):
            specs += [_weight(f"linear_{number}", out, into), TensorSpec(f"linear_{number}_bias", (out,))]
        return tuple(specs)

    def rows(self, params: PTuningParams, t: Any) -> Any:
        """Run the encoder."""
        from torch.nn import functional as F

        x = t.prompt
        if params.encoder == "lstm":
            for layer in range(params.layers):
                x = _lstm(t, layer, t.dropout(x) if layer and params.dropout else x)
        last = 2 if params.encoder == "mlp" else 1
        for number in range(last + 1):
            x = F.linear(x, getattr(t, f"linear_{number}"), getattr(t, f"linear_{number}_bias"))
            x = F.relu(x) if number < last else x
        return x

    def simpler(self, params: PTuningParams) -> tuple[str, dict[str, Any]] | None:
        """Return a soft prompt: what is left without the encoder."""
        return "soft_prompt", {"tokens": params.tokens} | params.kept

    def simplified(self, site: Site, params: PTuningParams, t: Any) -> Tensors:
        """Keep what the encoder gives."""
        return {"prompt": self.rows(params.model_copy(update={"dropout": 0.0}), t)}


def _weight(name: str, out: int, into: int) -> TensorSpec:
    return TensorSpec(name, (out, into), Init("kaiming_uniform", sqrt(5)))


def _lstm(t: Any, layer: int, x: Any) -> Any:
    """Run one bidirectional layer over `[tokens, in]`; gives `[tokens, 2 * hidden]`."""
    import torch

    weights = [
        getattr(t, f"lstm_{layer}_{part}{side}")
        for side in _SIDES
        for part in ("input", "hidden", "input_bias", "hidden_bias")
    ]
    if isinstance(x, torch.Tensor) and torch.compiler.is_compiling():
        # In a compiled graph each row of a mixed batch has its own encoder, and torch.vmap knows no LSTM.
        sides = _lstm_side(x, *weights[:4]), _lstm_side(x.flip(0), *weights[4:]).flip(0)
        return torch.cat(sides, dim=-1)
    start = x.new_zeros(2, 1, 1).expand(2, 1, weights[1].shape[1])
    # As nn.LSTM calls it: weights, biases, layers, dropout, training (which cuDNN's backward asks for), bidirectional,
    # batch first.
    out = torch.lstm(x.unsqueeze(0), (start, start), weights, True, 1, 0.0, True, True, True)
    return out[0].squeeze(0)


def _lstm_side(x: Tensor, into: Tensor, over: Tensor, into_bias: Tensor, over_bias: Tensor) -> Tensor:
    """Run one direction step by step, as nn.LSTM's documentation has it."""
    import torch
    from torch.nn import functional as F

    hidden = cell = x.new_zeros(over.shape[1])
    states = []
    for given in F.linear(x, into, into_bias).unbind(0):
        enter, forget, new, leave = (given + F.linear(hidden, over, over_bias)).chunk(4)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        states.append(hidden)
    return torch.stack(states)
