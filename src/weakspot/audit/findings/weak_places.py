"""Weak spots over a data set: how little must change in each place, and the smallest squares that were enough.

Both come from the analysis "weak_spots", which looks at the clean image and takes only the size of the change from the
attack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot._random import numpy_generator
from weakspot.audit.findings.outcomes import evenly_spread, in_blocks, read_cell, recorded_columns
from weakspot.audit.store.run import Run
from weakspot.explanations.weakest_places import GRID
from weakspot.statistics import LEAST_RUN
from weakspot.statistics.number_format import counted, p_value, size_of_change, tenths

ESTIMATE = "first_order"  # the stored map
SQUARE = "smallest_square"  # prefix of its scores
COLUMNS = tuple(f"{SQUARE}_{name}" for name in ("budget", "side", "fraction", "top", "left"))
PERMUTATIONS = 999
LEAST = 1e-9  # of a size, for its logarithm
LEAST_DRAWN = 1e-6  # the smallest size that has a color of its own
MAX_P = 0.05


@dataclass(frozen=True, eq=False)
class WeakPlaces:
    """Where the correctly classified images of a run are weak.

    Attributes:
        cell: (attack, region) numbers in the plan, of the pairs whose size of change was taken.
        budget: by how much values may change inside a square, for all these images alike.
        squares: one row per image, smallest square first, with the columns index, image, side (NaN if not found),
            fraction, top, left.
        left_out: correctly classified images whose pair has no change, or one of another size.
        median: (rows, columns) of a grid: the median over images of the change that is needed there if only this cell
            may change, estimated from gradients; 1 stands for 1 or more.
        weakest: row and column of the cell that ranks weakest on average.
        p: of the null hypothesis that position does not matter, for the mean rank of that cell; NaN below 10 images.
            Without stored maps, median is empty.
    """

    cell: tuple[int, int]
    budget: float
    squares: pd.DataFrame
    left_out: int
    median: NDArray[np.float64]
    weakest: tuple[int, int]
    p: float

    def __repr__(self) -> str:
        return (
            f"WeakPlaces({counted(len(self.squares))}, {self.median.shape[0]} x {self.median.shape[1]} cells)"
        )

    def sentences(self) -> list[str]:
        """How small a square is enough, and whether the images are weak in the same place."""
        sides = np.sort(self.squares["side"].fillna(np.inf).to_numpy(float))
        found, images = int(np.isfinite(sides).sum()), counted(len(sides), "correctly classified image")
        change = f"changed by at most {size_of_change(self.budget, 'linf')}"
        if not found:
            where = (
                f"In none of {images}"
                if len(sides) > 1
                else "In the one correctly classified image, no square"
            )
            square = (
                f"{where} was {'a square ' if len(sides) > 1 else ''}found that is enough to change the decision if it "
                f"is {change}; this does not mean that none exists."
            )
        else:
            # At least half of the images have a square of this side or a smaller one, if half have any.
            half = sides[(len(sides) - 1) // 2]
            smallest = self.squares.iloc[0]
            square = (
                f"The smallest square found has {smallest['side']:.0f} x {smallest['side']:.0f} pixels, "
                f"{tenths(smallest['fraction'])} of the image {smallest['image']}: {change}, it is enough to change "
                f"the decision."
            )
            if len(sides) > 1 and np.isfinite(half):
                square += (
                    f" In at least half of {images}, one of at most {half:.0f} x {half:.0f} pixels was found."
                )
            if found < len(sides):
                square += f" No square was found in {counted(len(sides) - found, 'image')}."
        if self.left_out:
            square += (
                f" Left out: {counted(self.left_out, 'image')} that the attack did not change by this size."
            )
        return [square, self._place_sentence()]

    def _place_sentence(self) -> str:
        if not self.median.size:
            return (
                "Whether images are weak in the same place was not tested: the run stored no maps (--maps)."
            )
        if np.isnan(self.p):
            needed = f"the test needs at least {LEAST_RUN} images"
            return f"Whether images are weak in the same place was not tested: {needed}."
        if self.p > MAX_P:
            return (
                "No place was found to be weak in more images than chance explains, by the estimate "
                f"({p_value(self.p)} for the weakest of all cells)."
            )
        row, column = self.weakest
        rows, columns = self.median.shape
        return (
            f"By the estimate, images are weak in the same place more than chance explains ({p_value(self.p)}): most "
            f"in row {row + 1} of {rows}, column {column + 1} of {columns}. This may be where their subjects are."
        )


def weak_places(run: Run) -> WeakPlaces | None:
    """Squares and estimates of the correctly classified images; None if there are none.

    The change that is allowed inside a square is that of the pair, and squares are compared at one size of change: at
    the size that most images share, under the attack and in the region with the most such images.
    """
    if not set(COLUMNS) <= set(recorded_columns(run)):
        return None
    best, cell, correct = pd.DataFrame(), (0, 0), 0
    for attack, region in run.plan.reported_cells:
        rows = read_cell(run, attack.label, region, ["index", "image", "correct", *COLUMNS])
        rows.columns = pd.Index([str(name).removeprefix(f"{SQUARE}_") for name in rows.columns])
        rows = rows[rows["correct"].fillna(False).astype(bool)]
        known = rows[rows["budget"] > 0]
        # Of several sizes that are equally frequent, the largest counts.
        same = known[known["budget"].round(9) == known["budget"].round(9).mode().max()]
        if len(same) > len(best):
            cell = run.plan.attacks.index(attack), run.plan.regions.index(region)
            best, correct = same, len(rows)
    if best.empty:
        return None
    sizes = _estimates(run, best["index"].to_numpy(np.int64), cell)
    median = np.median(sizes, axis=0) if len(sizes) else np.full((0, 0), np.nan)
    areas = _areas(run.maps[ESTIMATE].shape[-2:]) if len(sizes) else np.empty((0, 0), np.int64)
    weakest, p = _common_place(sizes, areas, run.plan.seed)
    places = {name: best[name].astype(float) for name in ("side", "fraction", "top", "left")}  # None is NaN
    squares = best[["index", "image"]].assign(**places).sort_values(["side", "index"])
    budget = float(best["budget"].iloc[0])
    return WeakPlaces(cell, budget, squares.reset_index(drop=True), correct - len(best), median, weakest, p)


def strength(sizes: NDArray[np.floating]) -> NDArray[np.floating]:
    """How strongly each size of change is drawn, from 0 to 1: on a logarithmic scale, and less change more strongly."""
    needed = np.log(np.clip(sizes, LEAST_DRAWN, 1))
    drawn: NDArray[np.floating] = (needed.max() - needed) / (float(np.ptp(needed)) or 1.0)
    return drawn


def _estimates(run: Run, images: NDArray[np.int64], cell: tuple[int, int]) -> NDArray[np.float64]:
    """(n, rows, columns) of the images that have an estimate: the stored map at the middle of each cell."""
    if ESTIMATE not in set(run.maps):
        return np.empty((0, 0, 0))
    stored = run.maps[ESTIMATE]
    at = [
        ((np.arange(cells) + 0.5) * side / cells).astype(int)
        for side, cells in ((side, min(GRID, side)) for side in stored.shape[-2:])
    ]
    parts = [
        stored[block, cell[0], cell[1]][places][:, at[0][:, None], at[1]].astype(np.float64)
        for block, places in in_blocks(evenly_spread(np.sort(images)))
    ]
    sizes = np.concatenate(parts) if parts else np.empty((0, len(at[0]), len(at[1])))
    known: NDArray[np.float64] = sizes[np.isfinite(sizes).all((1, 2))]
    return known


def _areas(shape: Sequence[int]) -> NDArray[np.int64]:
    """(rows, columns) numbers of pixels of the cells, which differ where the grid does not divide the image."""
    lengths = [np.bincount(np.arange(side) * min(GRID, side) // side) for side in shape]
    return np.outer(*lengths)


def _common_place(
    sizes: NDArray[np.float64], areas: NDArray[np.int64], seed: int
) -> tuple[tuple[int, int], float]:
    """The cell of the lowest mean rank, and the p value of a mean rank this low in any cell.

    Cells are ranked by size times area: to first order, a cell of twice the pixels needs half the change. Differences
    below 1% are ties, because the stored estimates are rounded.

    Under the null hypothesis, each image's ranks are in random places. Neighboring cells are alike within an image, so
    their mean ranks are, too; drawing cells one by one makes the lowest of them lower than it would be: p errs upward.
    """
    from scipy.stats import rankdata

    if not len(sizes):
        return (0, 0), np.nan
    # A size of 1 stands for 1 or more, so that no area can correct it.
    needed = np.where(sizes < 1, np.log(np.maximum(sizes, LEAST) * areas).round(2), np.inf)
    ranks = rankdata(needed.reshape(len(sizes), -1), axis=1)
    means = ranks.mean(0)
    row, column = divmod(int(means.argmin()), sizes.shape[2])
    if len(sizes) < LEAST_RUN:
        return (row, column), np.nan
    rng = numpy_generator(seed)
    lowest = np.array([rng.permuted(ranks, axis=1).mean(0).min() for _ in range(PERMUTATIONS)])
    return (row, column), (1 + int((lowest <= means.min() + 1e-9).sum())) / (1 + PERMUTATIONS)
