"""What PEFT's prompt types share: one table, `prompt_embeddings`, whatever computed it while it was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.adapter import CONFIG, Adapter
from deltaspec.formats.peft.words import TASKS
from deltaspec.names.paths import is_inside

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.backbone.table import Row
    from deltaspec.formats.base import Base

KEY = "prompt_embeddings"
_OUT = "merging is not possible with a prompt: train it anew with deltaspec, or go on with PEFT"


def check_task(adapter: Adapter) -> None:
    """Refuse an adapter of a task for which PEFT runs the model without its prompt, in silence."""
    if not adapter.config.get("task_type"):
        message = "has no task_type: without one of its tasks PEFT runs the model without the prompt"
        adapter.find("DS548", message, f"write the task that it was trained for: {', '.join(TASKS)}", CONFIG)


def submodules(adapter: Adapter) -> int:
    """Return for how many stacks PEFT has made tokens; it takes both of an encoder and a decoder where none is said."""
    usual = 2 if adapter.task == "SEQ_2_SEQ_LM" else 1
    if adapter.options.get("num_transformer_submodules") is None:
        return usual
    given = adapter.options.whole("num_transformer_submodules", usual)
    if given not in (1, 2):
        adapter.find("DS544", f"num_transformer_submodules: {given!r} is not known here", "it is 1 or 2", CONFIG)
    return int(given == 2) + 1


def table(adapter: Adapter, tokens: int, width: int | None, became: str) -> Tensor | None:
    """Take the table, of a row a token; None where it is not there, or is not of this shape."""
    found = adapter.take(KEY, became)
    if found is None:
        adapter.find("DS543", f"has no {KEY}", "save the adapter again", adapter.file)
        return None
    if found.dim() != 2 or found.shape[0] != tokens or (width is not None and found.shape[1] != width):
        message = f"{KEY} is {list(found.shape)}, and its configuration says {[tokens, width]}"
        adapter.find("DS543", message, "the configuration and the file are of two adapters", adapter.file)
        return None
    return found


def add_soft_prompt(adapter: Adapter) -> None:
    """Add the embeddings that stand in front of the input, however they were trained."""
    tokens = adapter.options.whole("num_virtual_tokens", 0, 1)
    width = None if adapter.options.get("token_dim") is None else adapter.options.whole("token_dim", 0, 1)
    adapter.ignore("num_attention_heads", "num_layers")
    check_task(adapter)
    stacks = submodules(adapter)
    row = _entrance(adapter)
    adapter.options.settle()
    if row is None:
        adapter.take(KEY, "not read")
        return
    rows = table(adapter, stacks * tokens, width, f"prompt of {counted(tokens, 'token')} at {row.fqn}")
    if rows is None:
        return
    if rows.shape[1] != row.out_features:
        message = f"{KEY} has rows of width {rows.shape[1]}, and those of {row.fqn} are {row.out_features} wide"
        adapter.find("DS526", message, "load the model that it was trained on", adapter.file)
        return
    if stacks == 2:
        adapter.remark(f"{tokens} further rows, made for the decoder, are left out: PEFT does not put them in front")
        rows = rows[:tokens].clone()
    params: dict[str, Any] = {"tokens": tokens, "place": "front"}
    adapter.remark("the model's outputs have the positions of the input; PEFT's have the prompt's in front of them")
    if _reads_first(adapter, row):
        params["output"] = "all"
        adapter.incoming.remarks[-1] = "its classifier reads the prompt's first position, as PEFT has it"
    if _counts_by_ids(adapter, row):
        adapter.remark("it numbers tokens by their ids, and leaves padding out; given PEFT's embeddings, it numbers "
                       "padding, too: rows with padding on the left differ from PEFT's")  # fmt: skip
    default = [r for r in adapter.base.table.rows if r.entrance is not None and r.entrance.problem is None]
    site = IncomingSite(row.fqn, {"prompt": rows})
    adapter.add("soft_prompt", params, [site], default_target=default == [row])


def _counts_by_ids(adapter: Adapter, row: Row) -> bool:
    """Return whether a model numbers positions by the ids of tokens, as RoBERTa does: its table of them has padding."""
    owner = adapter.base.model.get_submodule(row.fqn.rpartition(".")[0])
    others = (module for name, module in owner.named_children() if name != row.fqn.rpartition(".")[2])
    return any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in others)


def _reads_first(adapter: Adapter, row: Row) -> bool:
    """Return whether a head behind the model that is given the prompt reads its first position, as encoders' do."""
    if adapter.task != "SEQ_CLS":
        return False
    reads = classifier_reads(adapter.base, row)
    if reads == "last":
        adapter.remark("PEFT's classifier reads the last column of each row; here it reads the last token, so that "
                       "rows with padding on the right differ from PEFT's")  # fmt: skip
    elif reads == "mean":
        message = (
            f"the head of {adapter.base.table.model_class} averages over positions, in PEFT over the prompt's, too"
        )
        adapter.find("DS548", message, _OUT, CONFIG)
    return reads in ("first", "mean")


def classifier_reads(base: Base, row: Row) -> str | None:
    """Return what a classifier reads of the model that is given the prompt: its `first` position, its `last` one, the
    `mean` of all; None where it reads what that model itself made of them, or nothing that is known.
    """
    entrance = row.entrance
    assert entrance is not None
    if not entrance.fqn:
        return None
    inside = [r for r in base.table.rows if r.attends and is_inside(r.fqn, entrance.fqn)]
    if any(getattr(base.model.get_submodule(r.fqn), "is_causal", False) for r in inside):
        return "last"
    if getattr(base.config, "classifier_pooling", "cls") == "mean":
        return "mean"
    model: Any = base.model.get_submodule(entrance.fqn)
    return "first" if getattr(model, "pooler", None) is None else None


def _entrance(adapter: Adapter) -> Row | None:
    """Return the embedding in front of which PEFT puts a prompt: that of the encoder, or of the only stack."""
    known = [row for row in adapter.base.table.rows if row.entrance is not None]
    able = [row for row in known if row.entrance is not None and row.entrance.problem is None]
    if len(able) > 1:
        able = [row for row in able if row.vocabulary] or able
    if len(able) == 1:
        return able[0]
    reason = "it has several embeddings of ids that it is given" if able else "it takes no token ids"
    problems = [row.entrance.problem for row in known if row.entrance is not None and row.entrance.problem]
    if not able and problems:
        reason = str(problems[0])
    kind = adapter.base.table.model_class
    adapter.find("DS548", f"no prompt can be put in front of {kind} here: {reason}", _OUT, CONFIG)
    return None
