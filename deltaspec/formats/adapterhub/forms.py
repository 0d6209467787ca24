"""What a bottleneck of AdapterHub computes at a place, as a change of what enters or leaves one module.

Read in `modeling.py` of adapters 1.3. With h what leaves a sublayer, x the residual stream, s = h + x and N the norm
behind the sum (the identity where an architecture normalises before):

    z = N(s) where original_ln_before, else h          what the bottleneck u sees
    r = h where residual_before_ln, else z             what u(z) is added to
    y = N(u(z) + r + x) where original_ln_after, else u(z) + r

A parallel one sees z = x, and y = N(u(x) + h + x).

A delta here changes what enters or leaves one module. Of these, it can say those that change h (an adapter behind the
projection), those that change s (behind the module that gives s; or before N, with a copy of N in front of the
bottleneck; or, where no module gives s, behind the projection, with what enters a module that x enters added to what it
sees) and those that change what is left in the end (behind N, or behind s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltaspec.formats.adapterhub.places import Place

Domain = Literal["h", "s", "y", "around"]
"""What a delta changes: `h`, `s`, `y` as above; `around` adds to s what it makes of x."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a configuration computes at one place."""

    domain: Domain
    site: str
    """FQN of the module that the delta is on."""
    before: bool = False
    """Whether it changes what enters."""
    parallel: bool = False
    """Whether the bottleneck sees x alone."""
    stream: str | None = None
    """Path of the module that x enters, where the site's own input or output is not all that the bottleneck sees."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a configuration says of where a bottleneck takes its input and its residual."""

    before: bool
    """`original_ln_before`."""
    after: bool
    """`original_ln_after`."""
    residual: bool | str
    """`residual_before_ln`."""
    parallel: bool
    """`is_parallel`."""
    norm_before: bool
    """`ln_before`."""

    def at(self, place: Place) -> Form | str:
        """Return what it computes at a place; or why that has no counterpart."""
        if self.parallel:
            return self._around(place)
        if not isinstance(self.residual, bool):
            return f"residual_before_ln: {self.residual} adds the residual stream twice"
        if not self.before:
            return Form("h", place.projection) if self.after else "without original_ln the residual stream is left out"
        if self.residual and not self.after:
            return "residual_before_ln without original_ln_after leaves the residual stream out"
        if not self.residual and self.after:
            return "original_ln_after without residual_before_ln adds the residual stream twice"
        return self._behind_the_sum(place)

    def _behind_the_sum(self, place: Place) -> Form | str:
        if place.norm is not None:
            if not self.residual:
                return Form("y", place.norm)
            return "ln_before stands behind the model's own norm" if self.norm_before else Form("s", place.norm, True)
        if place.sum is None:  # what is left in the end is the sum, whatever the residual
            return Form("h", place.projection, stream=place.stream)
        return Form("s" if self.residual else "y", place.sum)

    def _around(self, place: Place) -> Form | str:
        if not self.after:
            return "is_parallel without original_ln_after leaves the residual stream out"
        if place.around is None:
            return Form("h", place.projection, parallel=True, stream=place.stream)
        return Form("around", place.around, parallel=True)
