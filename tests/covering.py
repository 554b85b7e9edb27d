"""Samples of products of test cases: every two values of different factors still occur together."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of the product of the factors in which every two values of different factors occur together.

    A covering array of strength two, chosen greedily and the same in every run.

    >>> len(pairwise("abc", [1, 2, 3], [True, False])), len(pairwise("ab", [1, 2]))
    (9, 4)
    """
    values = [list(factor) for factor in factors]
    rows = list(product(*(range(len(factor)) for factor in values)))
    places = list(combinations(range(len(values)), 2))
    missing = {(i, j, row[i], row[j]) for row in rows for i, j in places}
    chosen: list[tuple[Any, ...]] = []
    while missing:
        best = max(rows, key=lambda row: sum((i, j, row[i], row[j]) in missing for i, j in places))
        missing -= {(i, j, best[i], best[j]) for i, j in places}
        chosen.append(tuple(factor[index] for factor, index in zip(values, best, strict=True)))
    return chosen


def sampled(names: str, *factors: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` with pairs of values instead of the whole product.

    Args:
        names: of the arguments, separated by commas.
        factors: values of each.
    """
    return pytest.mark.parametrize(names, pairwise(*factors))
