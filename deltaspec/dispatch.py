"""The forwards that stand in a prepared model's modules: they ask, call by call, whether rows are running."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.programs import Forward

if TYPE_CHECKING:
    from deltaspec.mixing import Mixer

Kinds = tuple[str, ...]
"""The kind in each slot, by a key that no other kind of this process has."""


class Dispatch:
    """The forward of a host while rows are armed."""

    __signature__ = property(lambda self: inspect.signature(self.own))  # generate passes what a forward takes by name

    def __init__(self, mixer: Mixer, own: Forward, mixed: Mapping[Kinds, Forward]) -> None:
        self._mixer, self.own, self._mixed = mixer, own, mixed
        self.plain = own
        """What is attached."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host: by rows if this forward has some, else as it is attached."""
        kinds = self._mixer.running
        if kinds is None:
            return self.plain(*args, **kwargs)
        return self._mixed.get(kinds, self.own)(*args, **kwargs)


class Entering:
    """The forward of the whole model under rows: takes the size of the batch, and proves that sites are reached."""

    def __init__(self, mixer: Mixer, forward: Forward) -> None:
        self._mixer, self._forward = mixer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        self._mixer.batch.measure(args, kwargs)
        return self._mixer.proving(self._forward, *args, **kwargs)
