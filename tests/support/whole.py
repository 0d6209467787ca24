"""Cases of large products: some of each for every run, the others for `make test-whole` (marker `whole`).

Every method on every architecture proves little more than each method on some, and each architecture with some methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import settings

Item = TypeVar("Item")


def in_turn(items: Sequence[Item], number: int, count: int = 2) -> list[Item]:
    """Return `count` of these, those of the next number beginning one further."""
    return [items[(number + step) % len(items)] for step in range(count)]


def some_of_each(rows: Iterable[Any], columns: Sequence[Any], count: int = 2) -> list[tuple[Any, Any]]:
    """Return each row with `count` columns, so that each column has about as many rows as every other."""
    return [(row, column) for number, row in enumerate(rows) for column in in_turn(columns, number, count)]


def cases(product: Iterable[tuple[Any, ...]], chosen: Collection[tuple[Any, ...]]) -> list[Any]:
    """Return all cases; those that are not `chosen` are for `make test-whole` alone."""
    every = list(product)
    assert set(chosen) <= set(every), "a chosen case is none of the product"
    return [pytest.param(*case, marks=() if case in chosen else pytest.mark.whole) for case in every]


def examples(count: int) -> settings:
    """Return how many examples of hypothesis a test takes: all in `make test-whole`, else a fifth, at least 20."""
    long = settings.get_current_profile_name() == "whole"
    return settings(max_examples=count if long else max(count // 5, 20))
