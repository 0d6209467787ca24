"""What the methods share that put virtual tokens in front of the input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

from deltaspec.backbone.table import Row
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import Form, MethodParams, Refusal, Site


class PromptParams(MethodParams):
    """Parameters of all methods that put virtual tokens in front of the input."""

    place: Literal["tokens", "front"] = "tokens"
    """`tokens`: right before a row's first token, behind padding on the left, which then changes nothing. `front`: in
    front of everything (PEFT); positions are those of the columns, padding counted, whatever position_ids say."""
    output: Literal["tokens", "all"] = "tokens"
    """`tokens`: what the model gives has the positions of the input. `all`: also those of the virtual tokens, in front
    (PEFT); a classifier that reads the first position then reads theirs."""

    @property
    def kept(self) -> dict[str, str]:
        """Those of them that are not the default, for a method that does the same."""
        return self.model_dump(include={"place", "output"}, exclude_defaults=True)


class PromptMethod(Method):
    """A method whose delta is a number of rows, looked up in the embedding by ids below zero."""

    strength = None

    @abstractmethod
    def rows(self, params: Any, t: Any) -> Any:
        """Return the embeddings of the virtual tokens, `[tokens, width]`; runs once under tracing."""

    def is_default(self, row: Row, params: Any) -> bool:
        """Stand, where no target is given, for the embedding of the ids that the model is given."""
        return row.entrance is not None and row.entrance.problem is None

    def virtual_tokens(self, params: Any) -> int:
        """Return the number of rows."""
        return int(params.tokens)

    def leads(self, params: Any) -> bool:
        """Return whether they stand in front of padding, too."""
        return bool(params.place == "front")

    def stays(self, params: Any) -> bool:
        """Return whether they stay in what the model gives."""
        return bool(params.output == "all")

    def refuse(self, site: Site, params: Any) -> Refusal | None:
        """Take the embedding that a transformers model looks its `input_ids` up in."""
        hint = "leave target out: it stands for the embedding of input_ids"
        if site.parameter is not None:
            return Refusal(f"{self.name} takes the embedding module, not its parameter {site.parameter!r}", hint)
        if site.kind != "embedding":
            return Refusal(f"{self.name} works in the embedding of the token ids, not in {site.row.type}", hint)
        entrance = site.row.entrance
        if entrance is None:
            taking = "no model of transformers that takes input_ids and attention_mask"
            return Refusal(f"{taking} looks its ids up in this embedding", hint)
        if entrance.problem is not None:
            other = "use a method that works in the layers, such as prefix or lora"
            return Refusal(f"{entrance.fqn or 'the model'} takes no {self.name}: {entrance.problem}", other)
        tokens = self.virtual_tokens(params)
        if entrance.places is not None and tokens >= entrance.places:
            reason = f"{tokens:,} tokens leave no room in the {entrance.places:,} positions of this model"
            return Refusal(reason, "set fewer tokens, or use prefix, which takes no positions")
        return None

    def apply(self, form: Form, params: Any, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Look ids -1, -2, … -tokens up in the prompt's rows, and pass the rest on, those below raised by tokens."""
        import torch
        from torch.nn import functional as F

        tokens = self.virtual_tokens(params)
        mine = (x < 0) & (x >= -tokens)
        rows = F.embedding((-1 - x).clamp(0, tokens - 1), self.rows(params, t))
        rest = base(torch.where(x < 0, (x + tokens).clamp(max=0), x))
        return torch.where(mine.unsqueeze(-1), rows, rest)
