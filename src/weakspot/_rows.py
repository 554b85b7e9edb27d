"""Rows of a batch, chosen by numbers, slices, masks or names."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import unknown_choice

Rows = int | str | slice | Tensor | Sequence[int] | Sequence[bool] | Sequence[str]


def row_number(index: int | str, names: Sequence[str], count: int) -> int:
    """The number of the pair that a number, which may be negative, or a name stands for.

    Args:
        index: a number or a name.
        names: of the pairs; may be empty.
        count: how many pairs there are.

    Raises:
        IndexError: if there is no pair of this number.
        ValueError: if there is no pair, or more than one, of this name.
    """
    if isinstance(index, str):
        rows = [row for row, name in enumerate(names) if name == index]
        if len(rows) > 1:
            raise ValueError(f"name must be that of one pair, got {index!r} of pairs {rows} (give a number)")
        if not rows:
            remedy = "" if names else "give the pairs names with pairs.named(names)"
            raise ValueError(unknown_choice("name", index, names, remedy=remedy))
        return rows[0]
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise IndexError(f"index must be the number or the name of a pair, got {index!r}")
    number = operator.index(index)
    if not count:
        raise IndexError(f"index must be the number of a pair, got {number} (there are no pairs)")
    if not -count <= number < count:
        raise IndexError(f"index must be from {-count} to {count - 1}, got {number}")
    return number % count


def row_numbers(rows: Rows, names: Sequence[str], count: int) -> Tensor:
    """The numbers (n,) of the pairs that an index stands for.

    Args:
        rows: a number, a slice, a list or tensor of numbers, a bool mask (count,), a name or a list of names.
        names: of the pairs; may be empty.
        count: how many pairs there are.

    Raises:
        IndexError: if there is no pair of this number, or a mask has another length.
        ValueError: if there is no pair, or more than one, of this name.
    """
    every = torch.arange(count)
    if isinstance(rows, Tensor):
        rows = rows.tolist()
    if isinstance(rows, slice):
        return torch.tensor([*range(count)[rows]], dtype=torch.long)  # torch has no negative steps
    if isinstance(rows, int | str | np.integer) and not isinstance(rows, bool):
        return every[row_number(rows, names, count)][None]
    if not isinstance(rows, Sequence):
        raise IndexError(
            f"pairs must be indexed by numbers, a slice, a mask or names, got {type(rows).__name__}"
        )
    if rows and all(isinstance(row, bool) for row in rows):
        if len(rows) != count:
            raise IndexError(f"a mask of {count} pairs must have as many entries, got {len(rows)}")
        return every[torch.tensor(rows)]
    return every[[row_number(row, names, count) for row in rows]]
