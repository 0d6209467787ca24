"""Binding what works beside a module's call to the rows of a batch: prefixes in attention, prompts in front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.deltas.modules import storage_key
from deltaspec.methods.declarations import Own
from deltaspec.methods.registry import methods
from deltaspec.runtime.program import Forward
from deltaspec.runtime.programs import form_of
from deltaspec.serving.attention import AttendedRows, AttendRows
from deltaspec.serving.numbering import numbering_of
from deltaspec.serving.prompts import EmbeddedRows, FollowingRows, Front, PromptedRows
from deltaspec.serving.slots import Source, Table

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.runtime.active import Attachments
    from deltaspec.runtime.placements import Visit
    from deltaspec.runtime.programs import Programmer
    from deltaspec.serving.slots import Slot


def attend_rows(attachments: Attachments, host: str, given: Sequence[tuple[Slot, Visit]]) -> AttendedRows:
    """Build the forward of an attention module for slots of deltas that work inside it, in order of application."""
    hooks = []
    for slot, visit in given:
        method, params, site = methods()[visit.method], visit.planned.params, visit.planned.site
        names, compute, simpler = tuple(s.name for s in visit.planned.tensors), None, method.simpler(params)
        if simpler is not None:  # once a delta, not once a row
            kind, settings = simpler
            compute = _simplified(visit)
            method, params = methods()[kind], methods()[kind].Params(**settings)
            names = tuple(spec.name for spec in method.tensors(site, params))
        table = Table(slot, _sources(attachments, visit), compute)
        hooks.append(AttendRows(method, params, form_of(site, names), table))
    return AttendedRows(attachments.programmer.modules[host], tuple(hooks))


def put_prompts_in_front(
    attachments: Attachments, hosts: Mapping[str, Sequence[tuple[Slot, str]]], made: Mapping[str, Forward]
) -> dict[str, Forward]:
    """Build the forwards that put virtual tokens in front of rows, around those that are `made` already, by host."""
    programmer, found = attachments.programmer, dict[str, Forward]()

    def so_far(fqn: str) -> Forward:
        return found.get(fqn) or made.get(fqn) or programmer.own_forward(fqn)

    for host, given in hosts.items():
        visits = [(slot, visit) for slot, name in given for visit in programmer.hosts[name][host]]
        prompts = [(slot, visit) for slot, visit in visits if virtual_tokens(visit)]
        if not prompts:
            continue
        entrance = prompts[0][1].planned.site.row.entrance
        assert entrance is not None
        front = Front([(slot, virtual_tokens(visit)) for slot, visit in prompts])
        tables = [Table(s, _sources(attachments, visit), _virtual_rows(attachments, visit)) for s, visit in prompts]
        found[host] = EmbeddedRows(so_far(host), front, tables)
        fqn, follower = entrance.fqn, entrance.follower
        module, own = programmer.modules[fqn], programmer.own_forward(fqn)
        numbering = None if follower is not None else numbering_of(module, own)
        found[fqn] = PromptedRows(module, so_far(fqn), programmer.modules[host], front, numbering)
        if follower is not None:
            found[follower] = FollowingRows(programmer.modules[follower], so_far(follower), front)
    return found


def touched(programmer: Programmer, names: Iterable[str]) -> set[str]:
    """Give the FQNs of the modules whose forwards change while these deltas are attached."""
    found: set[str] = set()
    for name in names:
        for host, visits in programmer.hosts[name].items():
            found.add(host)
            entering = [v.planned.site.row.entrance for v in visits if virtual_tokens(v)]
            found.update(fqn for e in entering if e is not None for fqn in (e.fqn, e.follower) if fqn is not None)
    return found


def virtual_tokens(visit: Visit) -> int:
    """Give the number of tokens that a delta puts in front of the input here."""
    return methods()[visit.method].virtual_tokens(visit.planned.params)


def _sources(attachments: Attachments, visit: Visit) -> dict[str, Source]:
    stack, fqn = attachments.stacks.of(visit.delta), visit.planned.site.row.fqn
    return {s.name: Source(stack, storage_key(fqn, s), attachments.deltas) for s in visit.planned.tensors}


def _simplified(visit: Visit) -> Callable[[Mapping[str, Tensor], str | None], tuple[Tensor, ...]]:
    method, params, site = methods()[visit.method], visit.planned.params, visit.planned.site

    def compute(own: Mapping[str, Tensor], _: str | None) -> tuple[Tensor, ...]:
        return tuple(method.simplified(site, params, Own(tuple(own), tuple(own.values()))).values())

    return compute


class _OwnTokens(Own):
    """A delta's tensors, as the formula at an embedding sees them."""

    def __init__(self, own: Mapping[str, Tensor], dropout: Callable[[Tensor], Tensor]) -> None:
        super().__init__(tuple(own), tuple(own.values()))
        self.dropout = dropout


def _virtual_rows(
    attachments: Attachments, visit: Visit
) -> Callable[[Mapping[str, Tensor], str | None], tuple[Tensor, ...]]:
    """Give what computes the embeddings of one delta's virtual tokens, `[tokens, width]`, by the method's formula."""
    method, params, site = methods()[visit.method], visit.planned.params, visit.planned.site
    form, tokens = form_of(site, tuple(spec.name for spec in visit.planned.tensors)), virtual_tokens(visit)
    probability = getattr(params, "dropout", 0)
    width = site.row.out_features
    assert width is not None

    def compute(own: Mapping[str, Tensor], name: str | None) -> tuple[Tensor, ...]:
        like = next(iter(own.values()))
        given = _OwnTokens(own, _dropout(attachments, visit.delta if name is None else name, probability))
        ids = -1 - torch.arange(tokens, device=like.device)[None]
        return (method.apply(form, params, given, ids, lambda x: like.new_zeros(*x.shape, width))[0],)

    return compute


def _dropout(attachments: Attachments, name: str, probability: float) -> Any:
    return attachments.deltas[name].dropout(probability) if probability else lambda value: value
