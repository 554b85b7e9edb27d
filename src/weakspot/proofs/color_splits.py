"""Branch and bound over the colors of pixels: bounds first, then splits of boxes, tests of centers, enumeration."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weakspot.proofs.allowed_colors import TOP, eight_bit_value
from weakspot.proofs.certificate import ENUMERATED, PER_RELU, SHARED, UNKNOWN, ColorBoxes
from weakspot.proofs.enumeration import NetworkRuns, enumerate_colors, levels_between
from weakspot.proofs.ledger import Ledger
from weakspot.proofs.margin_bounds import MarginBounds

AT_ONCE = 256  # boxes that are bounded at once
# With a generator for each unstable activation: as many as fit a tensor of this size. glibc asks the system anew for
# each larger one, which doubles the time.
DEEP_BYTES, DEEP_FIRST, DEEP_AT_ONCE = 16 * 2**20, 2, 32
MOST_BOXES = 256  # boxes of one pixel that are bounded with such generators before it stays unknown
LEAF = 512  # 8-bit colors of one box that are tried one by one instead of a split
TIME_UP = "the time was up"
WITHIN_ROUNDING = "its margin in one color is within the bound of rounding"
WHOLE = 8192  # 8-bit colors of one pixel that are tried one by one where bounds do not decide
# After so many boxes, the cheaper bounds are left out if they prove a smaller fraction.
TRIED, WORTHWHILE = 64, 0.1


@dataclass(frozen=True)
class OpenBoxes:
    """Boxes of colors that may hold one that changes the decision.

    Attributes:
        sites: (B,) numbers of pixels.
        low: (B, C) float64.
        high: (B, C) float64.
        bound: (B,) best lower bound of the margin so far.
    """

    sites: Tensor
    low: Tensor
    high: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.sites)

    def select(self, chosen: Tensor) -> OpenBoxes:
        return OpenBoxes(self.sites[chosen], self.low[chosen], self.high[chosen], self.bound[chosen])


class ColorSearch:
    """Branch and bound for the pixels of one image.

    Args:
        bounds: of the image; None if there are none, so that colors can only be tried.
        runs: of the image; its verdicts count under the statement "float32 as run".
        ledger: where results go.
        as_run: whether the statement is "float32 as run".
        eight_bit: whether only 8-bit colors are allowed.
        deadline: by `time.monotonic`.
    """

    def __init__(
        self,
        bounds: MarginBounds | None,
        runs: NetworkRuns,
        ledger: Ledger,
        *,
        as_run: bool,
        eight_bit: bool,
        deadline: float,
    ) -> None:
        self.bounds, self.runs, self.ledger, self.as_run = bounds, runs, ledger, as_run
        self.eight_bit, self.deadline = eight_bit, deadline
        self._proven: list[ColorBoxes] = []
        count = len(ledger.reason)
        # Of each site: the least margin of a color tried, that color, and whether it is new.
        self._least = torch.full((count,), torch.inf, dtype=torch.float64)
        self._worst = torch.zeros(count, ledger.images.shape[1], dtype=torch.float64)
        self._news = torch.zeros(count, dtype=torch.bool)
        self._spent = torch.zeros_like(ledger.reason, dtype=torch.long)
        self._cheap = [0, 0]  # boxes of later rounds bounded by shared generators, and how many that proved

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def refute(self, sites: Tensor, colors: Tensor) -> Tensor:
        """Try one color (M, C) of each site; returns (M,) bool, those that changed the decision."""
        low, high = self.ledger.box(sites)
        colors = colors.float().double()  # as images have them, and maybe just outside for that
        inside = ((colors >= low) & (colors <= high)).all(1).nonzero()[:, 0]
        flips = torch.zeros(len(sites), dtype=torch.bool)
        for part in inside.split(AT_ONCE):
            if self.late:
                break
            _, rows, columns = self.ledger.locate(sites[part])
            if self.bounds is None or self.as_run:
                flipped, predicted, margins = self.runs.refuting(rows, columns, colors[part])
                self._remember(sites[part], colors[part], margins.double().cpu())
            else:
                margins, near = self.runs.margins(rows, columns, colors[part])
                # Float32 is near enough to say which colors are worth bounds.
                doubtful = (~(margins >= near)).nonzero()[:, 0]
                predicted = torch.full_like(part, self.bounds.label)
                if len(doubtful):
                    # In real numbers: the margin to some class is below zero for certain.
                    predicted[doubtful] = self.bounds.certain_classes(
                        rows[doubtful], columns[doubtful], colors[part[doubtful]]
                    )
                flipped = predicted != self.bounds.label
            chosen = part[flipped]
            flips[chosen] = True
            self.ledger.refute(sites[chosen], colors[chosen], predicted[flipped])
        return flips

    def _remember(self, sites: Tensor, colors: Tensor, margins: Tensor) -> None:
        """Note a color of each site with the least margin so far, or nearly: a site may be given twice."""
        less = margins < self._least[sites]
        self._least[sites[less]] = margins[less]
        self._worst[sites[less]] = colors[less]
        self._news[sites[less]] = True

    def _within_rounding(self, boxes: OpenBoxes) -> OpenBoxes:
        """Leave pixels with a color whose margin is not above the bound of rounding: no box with it can be proven."""
        if self.bounds is None or not self.as_run or self.eight_bit:
            return boxes
        sites = boxes.sites.unique()
        # One pixel hardly changes how much rounding may take from the margin.
        lost = float((self.bounds.clean.upper - self.bounds.clean.lower).amax()) / 2
        sites = sites[self._news[sites] & (self._least[sites] < 2 * lost)]
        self._news[sites] = False
        for part in sites.split(AT_ONCE):
            if not len(part):
                break
            _, rows, columns = self.ledger.locate(part)
            colors = self._worst[part]
            lost = part[self.bounds.bounds(rows, columns, colors, colors).bound <= 0]
            self._lower(lost, boxes)
            self.ledger.give_up(lost, WITHIN_ROUNDING)
        return self._still_open(boxes)

    def prove_at_once(self, sites: Tensor) -> None:
        """Prove pixels by one box of all their allowed colors, with shared generators."""
        low, high = self.ledger.box(sites)
        boxes = OpenBoxes(sites, low, high, torch.full((len(sites),), -torch.inf, dtype=torch.float64))
        boxes, done = self._bound(boxes, deep=False)
        self.ledger.lower_bound[boxes.sites] = boxes.bound
        self.ledger.prove(done)

    def search(self, sites: Tensor, report: Callable[[float], None]) -> None:
        """Decide the sites that `prove_at_once` left open, as far as bounds, splits and enumeration can."""
        low, high = self.ledger.box(sites)
        boxes = self._within_rounding(OpenBoxes(sites, low, high, self.ledger.lower_bound[sites]))
        total = max(1, len(sites))
        first = True
        while len(boxes) and not self.late:
            # The boxes of the first round have had shared generators already, in `prove_at_once`.
            if not first and (self._cheap[0] < TRIED or self._cheap[1] >= WORTHWHILE * self._cheap[0]):
                before = len(boxes)
                boxes = self._left_by_bounds(boxes, deep=False)
                self._cheap = [self._cheap[0] + before, self._cheap[1] + before - len(boxes)]
            self._spent.index_add_(0, boxes.sites, torch.ones_like(boxes.sites))
            boxes = self._left_by_bounds(boxes, deep=True)
            boxes = self._test_centers(boxes)
            boxes = self._give_up(self._within_rounding(boxes))
            boxes = self._split(self._leaves(boxes))
            boxes = self._still_open(boxes)
            first = False
            report(1 - len(boxes.sites.unique()) / total)
        self._conclude(sites, boxes)

    def _left_by_bounds(self, boxes: OpenBoxes, *, deep: bool) -> OpenBoxes:
        boxes, done = self._bound(boxes, deep=deep)
        self._proven.append(done)
        return boxes

    def _bound(self, boxes: OpenBoxes, *, deep: bool) -> tuple[OpenBoxes, ColorBoxes]:
        """Bound boxes, worst first; those that are not proven, and those that are."""
        boxes = boxes.select(boxes.bound.argsort(stable=True))
        bound = boxes.bound.clone()
        fresh = torch.full_like(bound, -torch.inf)
        start = 0
        while start < len(boxes) and not self.late and self.bounds is not None:
            part = torch.arange(start, min(len(boxes), start + at_once(self.bounds, deep=deep)))
            start += len(part)
            _, rows, columns = self.ledger.locate(boxes.sites[part])
            margins = self.bounds.bounds(rows, columns, boxes.low[part], boxes.high[part], deep=deep)
            fresh[part] = margins.bound
        boxes = replace(boxes, bound=torch.maximum(bound, fresh))
        proven = boxes.bound > 0
        done = boxes.select(proven)
        return boxes.select(~proven), self._as_proof(done, PER_RELU if deep else SHARED)

    def _as_proof(self, boxes: OpenBoxes, method: int) -> ColorBoxes:
        pixels = torch.stack(self.ledger.locate(boxes.sites), 1)
        methods = torch.full((len(boxes),), method, dtype=torch.int8)
        return ColorBoxes(pixels, boxes.low, boxes.high, boxes.bound, methods)

    def _test_centers(self, boxes: OpenBoxes) -> OpenBoxes:
        """Try the center of each box, and drop the boxes of pixels that are refuted."""
        if not len(boxes) or self.late:
            return boxes
        centers = (boxes.low + boxes.high) / 2
        if self.eight_bit:
            first, last = levels_between(boxes.low, boxes.high)
            centers = eight_bit_value((first + last) // 2)
        # A center in float64 may round out of a box no wider than float32's spacing.
        centers = torch.minimum(torch.maximum(centers.float().double(), boxes.low), boxes.high)
        self.refute(boxes.sites, centers)
        return self._still_open(boxes)

    def _still_open(self, boxes: OpenBoxes) -> OpenBoxes:
        return boxes.select(
            (self.ledger.status[boxes.sites] == UNKNOWN) & (self.ledger.reason[boxes.sites] < 0)
        )

    def _give_up(self, boxes: OpenBoxes) -> OpenBoxes:
        """Leave pixels that have had their number of boxes."""
        sites = boxes.sites.unique()
        spent = sites[self._spent[sites] >= MOST_BOXES]
        self._lower(spent, boxes)
        self.ledger.give_up(spent, f"the bounds were still too loose after {MOST_BOXES} boxes of its colors")
        return self._still_open(boxes)

    def enumerate_whole(self, sites: Tensor) -> None:
        """Decide pixels that are still open by trying all their 8-bit colors, as the network runs, if there are few."""
        low, high = self.ledger.box(sites)
        boxes = OpenBoxes(sites, low, high, self.ledger.lower_bound[sites])
        left, done = self._enumerate(boxes, WHOLE)
        self.ledger.prove(done)
        unexplained = left.sites[self.ledger.reason[left.sites] < 0]
        if not self.late:
            self.ledger.give_up(
                unexplained, f"its 8-bit colors are more than {WHOLE}, too many to be tried one by one"
            )

    def _leaves(self, boxes: OpenBoxes) -> OpenBoxes:
        """Boxes that are left after small ones are decided color by color."""
        if not (self.eight_bit and self.as_run and len(boxes)):
            return boxes
        boxes, done = self._enumerate(boxes, LEAF)
        self._proven.append(done)
        return boxes

    def _enumerate(self, boxes: OpenBoxes, most: int) -> tuple[OpenBoxes, ColorBoxes]:
        """Try all 8-bit colors of boxes that have at most so many; undecided boxes, and those proven."""
        first, last = levels_between(boxes.low, boxes.high)
        few = (last - first + 1).double().prod(1) <= most
        leaves = boxes.select(few)
        if not len(leaves):
            return boxes, ColorBoxes.none(boxes.low.shape[1])
        _, rows, columns = self.ledger.locate(leaves.sites)
        levels = first[few], last[few]
        status, lowest, found, predicted = enumerate_colors(self.runs, rows, columns, levels, self.deadline)
        flips, fine = status < 0, status > 0
        self.ledger.refute(leaves.sites[flips], found[flips], predicted[flips])
        undone = ~few
        undone[few] = status == 0
        return boxes.select(undone), self._as_proof(replace(leaves, bound=lowest).select(fine), ENUMERATED)

    def _split(self, boxes: OpenBoxes) -> OpenBoxes:
        """Halve boxes along their widest side."""
        if not len(boxes):
            return boxes
        axis = (boxes.high - boxes.low).argmax(1, keepdim=True)
        low, high = boxes.low.gather(1, axis), boxes.high.gather(1, axis)
        if self.eight_bit:
            first, last = levels_between(low, high)
            middle = (first + last) // 2
            # The halves share no color: the upper one begins a level after the lower one ends.
            ends = eight_bit_value(middle), eight_bit_value((middle + 1).clamp(max=TOP))
        else:
            ends = ((low + high) / 2,) * 2
        lower = replace(boxes, high=boxes.high.scatter(1, axis, ends[0]))
        upper = replace(boxes, low=boxes.low.scatter(1, axis, ends[1]))
        # A box of one color cannot be split.
        points = (low >= high)[:, 0]
        self._lower(boxes.sites[points].unique(), boxes)
        self.ledger.give_up(
            boxes.sites[points], "its margin in one color is too near to zero for the bounds of rounding"
        )
        parts = [lower.select(~points), upper.select(~points)]
        return OpenBoxes(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("sites", "low", "high", "bound")
            )
        )

    def _lower(self, sites: Tensor, boxes: OpenBoxes) -> None:
        """Note the lowest bound over all boxes of sites that are given up."""
        if not len(sites):
            return
        owners = torch.cat([boxes.sites, *(self.ledger.sites_of(part.pixels) for part in self._proven)])
        values = torch.cat([boxes.bound, *(part.bound for part in self._proven)])
        least = torch.full_like(self.ledger.lower_bound, torch.inf).scatter_reduce(0, owners, values, "amin")
        self.ledger.lower_bound[sites] = torch.maximum(least, self.ledger.lower_bound)[sites]

    def _conclude(self, sites: Tensor, boxes: OpenBoxes) -> None:
        """Sites without an open box are proven by the boxes of theirs that were."""
        left = boxes.sites.unique()
        self._lower(left, boxes)
        self.ledger.give_up(left, TIME_UP)
        proven = torch.zeros_like(self.ledger.reason, dtype=torch.bool)
        proven[sites] = (self.ledger.status[sites] == UNKNOWN) & (self.ledger.reason[sites] < 0)
        done = ColorBoxes.concatenate([ColorBoxes.none(boxes.low.shape[1]), *self._proven])
        self.ledger.prove(done.select(proven[self.ledger.sites_of(done.pixels)]))


def at_once(bounds: MarginBounds, *, deep: bool) -> int:
    """How many boxes are bounded at once."""
    if not deep:
        return AT_ONCE
    if not bounds.deep_bytes:
        return DEEP_FIRST
    return max(1, min(DEEP_AT_ONCE, DEEP_BYTES // bounds.deep_bytes))


def box_bounds(bounds: MarginBounds, boxes: ColorBoxes) -> Tensor:
    """(B,) lower bounds of the margin in boxes of one image, each by the method of its box, unless it is enumeration.

    Args:
        bounds: of the image.
        boxes: of its pixels; those of enumerated boxes get infinity.
    """
    result = torch.full_like(boxes.bound, torch.inf)
    for method in (SHARED, PER_RELU):
        left = (boxes.method == method).nonzero()[:, 0]
        while len(left):
            size = at_once(bounds, deep=method == PER_RELU)
            part, left = left[:size], left[size:]
            _, rows, columns = boxes.pixels[part].unbind(1)
            margins = bounds.bounds(rows, columns, boxes.low[part], boxes.high[part], deep=method == PER_RELU)
            result[part] = margins.bound
    return result
