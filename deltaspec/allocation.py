"""Rank allocation of AdaLoRA (arXiv:2303.10512): while a delta trains, its ranks move to the sites that need them.

>>> allocator = RankAllocator(c, "d", total_steps=1000, warmup_steps=100, final_steps=300, interval=10)
>>> loss = c(**batch).loss + 0.5 * allocator.orthogonality()
>>> loss.backward(); optimizer.step(); allocator.step(); optimizer.zero_grad()

With transformers: `Trainer(model=c.backbone, callbacks=[allocator.callback()])`.

Uses compiled models as a user would.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaspec.deltas.modules import storage_key

if TYPE_CHECKING:
    from deltaspec.compiler.compiled import CompiledModel


class RankAllocator:
    """Drops the least important ranks of one `adalora` delta until its sites have `rank` on average.

    Each matrix of a stacked parameter counts as a site of its own: ranks move between experts, too. A dropped rank is a
    zero in the site's `singular`: shapes stay as they are. The budget stays at `initial_rank` for
    `warmup_steps`, falls by a cubic schedule, and is reached `final_steps` before the end, where the choice is fixed.
    Importance is |value · gradient|, smoothed by `sensitivity_decay`, times its deviation, by `uncertainty_decay`.
    """

    def __init__(
        self,
        model: CompiledModel,
        delta: str,
        *,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        final_steps: int = 0,
        interval: int = 1,
        sensitivity_decay: float = 0.85,
        uncertainty_decay: float = 0.85,
    ) -> None:
        planned = next((d for d in model.plan.deltas if d.name == delta), None)
        if planned is None or planned.method != "adalora":
            known = [d.name for d in model.plan.deltas if d.method == "adalora"]
            raise ValueError(f"{delta!r} is no adalora delta of this model; those are {known or 'none'}")
        if interval < 1 or warmup_steps < 0 or final_steps < 0:
            raise ValueError("interval is at least 1; warmup_steps and final_steps are at least 0")
        if not (0 < sensitivity_decay < 1 and 0 < uncertainty_decay < 1):
            raise ValueError("decays lie between 0 and 1")
        self._delta, self._sites = model.deltas[delta], planned.sites
        self.warmup_steps, self.final_steps, self.interval = warmup_steps, final_steps, interval
        self._decays = sensitivity_decay, uncertainty_decay
        matrices = [prod(site.site.stack or ()) for site in planned.sites]
        ranks: list[tuple[int, int]] = [(s.params.initial_rank, s.params.rank) for s in planned.sites]  # type: ignore[attr-defined]
        self.initial_budget = sum(n * first for n, (first, _) in zip(matrices, ranks, strict=True))
        self.target_budget = sum(n * last for n, (_, last) in zip(matrices, ranks, strict=True))
        self.steps = 0
        """Steps taken so far."""
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self.total_steps: int | None = None
        if total_steps is not None:
            self.set_total_steps(total_steps)

    def set_total_steps(self, total_steps: int) -> None:
        """Set how many optimiser steps there will be. Raises ValueError where none are left for allocation."""
        if self.warmup_steps >= total_steps - self.final_steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up and {self.final_steps} final steps leave none of {total_steps} "
                "in which ranks could be dropped"
            )
        self.total_steps = total_steps

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks that each site has now; those of a stacked parameter's matrices as `name[0]` and so on."""
        found: dict[str, int] = {}
        for site in self._sites:
            counts = self._tensor(site.fqn, "singular").count_nonzero(-1)
            names = [f"{site.fqn}[{i}]" for i in range(len(counts))] if counts.dim() else [site.fqn]
            found.update(zip(names, counts.reshape(-1).tolist(), strict=True))
        return found

    def orthogonality(self) -> Tensor:
        """Return the mean of ‖AAᵀ - I‖ and ‖BᵀB - I‖ over all sites, to be added to the loss (times 0.5 or so)."""
        terms = []
        for site in self._sites:
            ranks = self._tensor(site.fqn, "singular").dim()
            for rows in (self._tensor(site.fqn, "down").flatten(ranks), self._tensor(site.fqn, "up").mT):
                identity = torch.eye(rows.shape[-2], device=rows.device, dtype=rows.dtype)
                terms.append(torch.linalg.matrix_norm(rows @ rows.mT - identity).reshape(-1))
        return torch.cat(terms).mean()

    def budget(self, step: int) -> int:
        """Return the number of ranks, of all sites together, that a step (the first is 1) leaves."""
        if self.total_steps is None:
            raise ValueError("the number of steps is not known: pass total_steps, or call set_total_steps")
        end = self.total_steps - self.final_steps
        if step <= self.warmup_steps:
            return self.initial_budget
        if step >= end:
            return self.target_budget
        left = 1 - (step - self.warmup_steps) / (end - self.warmup_steps)
        return int((self.initial_budget - self.target_budget) * left**3 + self.target_budget)

    @torch.no_grad()
    def step(self) -> None:
        """Do one step: call it after `optimizer.step()` and before gradients are cleared."""
        self.steps += 1
        budget = self.budget(self.steps)
        assert self.total_steps is not None
        end = self.total_steps - self.final_steps
        if self.steps < end:
            self._observe()
            if self.steps > self.warmup_steps and self.steps % self.interval == 0:
                self._drop(budget)
        elif self.steps == end:
            self._drop(budget)
            self._sensitivity, self._uncertainty = {}, {}
        else:
            for fqn, kept in self._kept.items():
                self._tensor(fqn, "singular").mul_(kept)

    def callback(self, orthogonality: float = 0.5) -> Any:
        """Return a transformers TrainerCallback that takes the steps, and adds the gradient of the orthogonality term.

        The number of steps is the trainer's where none was given. The term's gradient joins after gradient clipping.
        """
        from transformers import TrainerCallback

        allocator = self

        class AllocationCallback(TrainerCallback):
            """Drives a RankAllocator."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if allocator.total_steps is None:
                    allocator.set_total_steps(state.max_steps)

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if orthogonality:
                    (orthogonality * allocator.orthogonality()).backward()  # type: ignore[no-untyped-call]

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                allocator.step()

        return AllocationCallback()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs besides the delta itself."""
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "sensitivity": dict(self._sensitivity),
            "uncertainty": dict(self._uncertainty),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another allocator of the same delta."""
        self.steps, self.total_steps = state["steps"], state["total_steps"]
        self._sensitivity, self._uncertainty = dict(state["sensitivity"]), dict(state["uncertainty"])
        self._kept = dict(state["kept"])

    def _tensor(self, fqn: str, name: str) -> Tensor:
        return self._delta.tensor(f"{fqn}.{name}" if fqn else name)

    def _observe(self) -> None:
        """Smooth the importance of every value."""
        first, second = self._decays
        for site in self._sites:
            for spec in site.tensors:
                key = storage_key(site.fqn, spec)
                value = self._delta.tensor(key)
                if value.grad is None:
                    raise ValueError(f"{key} has no gradient: step() comes after backward() and before zero_grad()")
                now = (value * value.grad).abs()
                before = self._sensitivity.get(key, torch.zeros_like(value))
                self._sensitivity[key] = sensitivity = first * before + (1 - first) * now
                before = self._uncertainty.get(key, torch.zeros_like(value))
                self._uncertainty[key] = second * before + (1 - second) * (now - sensitivity).abs()

    def _score(self, fqn: str) -> Tensor:
        """Return the importance of a site's ranks: singular values' own, and means over rows of A and columns of B."""

        def of(name: str) -> Tensor:
            key = f"{fqn}.{name}" if fqn else name
            if key not in self._sensitivity:
                return torch.zeros_like(self._delta.tensor(key))
            return self._sensitivity[key] * self._uncertainty[key]

        singular = of("singular")
        return singular + of("down").flatten(singular.dim()).mean(-1) + of("up").mean(-2)

    def _drop(self, budget: int) -> None:
        """Keep this many ranks of all sites together; of equal ones the first are dropped first."""
        scores = [self._score(site.fqn) for site in self._sites]
        order = torch.cat([score.reshape(-1).to(scores[0].device) for score in scores]).argsort(stable=True)
        kept = torch.ones(len(order), dtype=torch.bool, device=order.device)
        kept[order[: self.initial_budget - budget]] = False
        for site, mask in zip(self._sites, torch.split(kept, [score.numel() for score in scores]), strict=True):
            singular = self._tensor(site.fqn, "singular")
            self._kept[site.fqn] = mask.reshape(singular.shape).to(singular.device)
            singular.mul_(self._kept[site.fqn])
