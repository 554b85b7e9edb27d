"""Sound bounds of an image's margins while one pixel takes any color in a box, for many pixels and boxes at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot.proofs.affine_forms import Form, written_out
from weakspot.proofs.affine_steps import differences
from weakspot.proofs.backward_errors import moved_by_rounding
from weakspot.proofs.network_steps import BoundNetwork
from weakspot.proofs.propagation import Propagation
from weakspot.proofs.rounding_errors import TINY, own

# Rounding is followed backward for boxes whose bound is above -NEAR times what forward rounding takes from the clean
# margins, unless that is more than PLAUSIBLE times the exact bound.
NEAR, PLAUSIBLE = 2, 100
# Margins times values of the network that are followed at most, for one box (about 25 ms) and for the clean image.
WORK, CLEAN_WORK = 2**19, 2**25
BACKWARD_BYTES, BACKWARD_AT_ONCE = 64 * 2**20, 32  # of one tensor, and boxes


@dataclass(frozen=True)
class Margins:
    """Bounds of z_label - z_other for every other class, over M boxes.

    Attributes:
        lower: (M, K - 1) float64, rounded down.
        upper: (M, K - 1) float64, rounded up.
    """

    lower: Tensor
    upper: Tensor

    @property
    def bound(self) -> Tensor:
        """(M,) lower bound of the margin to the nearest class."""
        return self.lower.amin(1)

    def select(self, chosen: Tensor) -> Margins:
        return Margins(self.lower[chosen], self.upper[chosen])

    def within(self, exact: Margins, moved: Tensor) -> Margins:
        """Bounds that also know that these margins are no further than `moved` (M, K - 1) from exact ones."""
        # Infinity less infinity is NaN, which below becomes a bound that says nothing.
        lower, upper = exact.lower - moved, exact.upper + moved
        lower = lower - own(1) * (exact.lower.abs() + moved)
        upper = upper + own(1) * (exact.upper.abs() + moved)
        return Margins(
            torch.maximum(self.lower, lower.nan_to_num(-torch.inf, torch.inf, -torch.inf)),
            torch.minimum(self.upper, upper.nan_to_num(torch.inf, torch.inf, -torch.inf)),
        )


class MarginBounds:
    """Bounds of the margins of one image, one pixel of which may take any color in a box.

    Attributes:
        clean: bounds of the unchanged image, M = 1.
        exact: the same bounds for the network in real numbers.

    Args:
        network: as steps on affine forms.
        image: (1, C, H, W).
        label: of the image.
        as_run: whether bounds hold for the network in float32, or for the network in real numbers.
    """

    def __init__(self, network: BoundNetwork, image: Tensor, label: int, *, as_run: bool) -> None:
        self.network, self.label, self.as_run = network, label, as_run
        image = image.detach().cpu().double()
        steps = list(network.steps)
        if network.last is not None:
            merged = differences(network.last, label)
            steps = [*steps, merged] if merged else steps
        self._propagation = Propagation(steps, network.logits, image, network.recording.count, as_run=as_run)
        self._clean_overflows = bool(self._propagation.overflows.any())
        self.clean = self._margins(self._propagation.clean)
        self.exact = self
        if as_run:
            self.exact = MarginBounds(network, image, label, as_run=False)
            # Nothing varies in the unchanged image: half the width of its bounds is what rounding takes.
            self._lost = float((self.clean.upper - self.clean.lower).amax()) / 2
            follow = self._to_follow(self.clean, self.exact.clean, CLEAN_WORK)
            if bool(follow.any()):
                moved = self._moved_by_rounding(self._propagation.clean, self._propagation.overflows, follow)
                self.clean = self.clean.within(self.exact.clean, moved)

    @property
    def deep_bytes(self) -> int:
        """The most memory that the generators of one box took so far, where each activation has its own."""
        return self._propagation.deep_bytes

    def bounds(
        self, rows: Tensor, columns: Tensor, low: Tensor, high: Tensor, *, deep: bool = False
    ) -> Margins:
        """Bounds over boxes of colors low to high, (M, C) each in float64, of pixels at rows and columns (M,).

        Args:
            rows: of the pixels.
            columns: of the pixels.
            low: lowest value of each channel.
            high: highest value of each channel.
            deep: whether each unstable activation gets a generator of its own: tighter, and slower.
        """
        boxes = (rows, columns, low, high)
        margins = self._margins(self._propagation.run(_form_of(*boxes), deep=deep))
        if not self.as_run:
            return margins
        # Only boxes that rounding alone may have kept from being proven.
        near = ((margins.bound <= 0) & (margins.bound > -NEAR * self._lost)).nonzero()[:, 0]
        for part in near.split(self._boxes_at_once) if len(near) else ():
            exact = self.exact.bounds(*(values[part] for values in boxes), deep=deep)
            follow = self._to_follow(margins.select(part), exact)
            worthwhile = follow.any(1)
            if bool(worthwhile.any()):
                chosen = part[worthwhile]
                form = _form_of(*(values[chosen] for values in boxes))
                # Never deep: `on_whole_maps` keeps only how far each value may move.
                forms = self._propagation.run(form, deep=False, keep=True)
                moved = self._moved_by_rounding(forms, self._propagation.overflows, follow[worthwhile])
                closer = margins.select(chosen).within(exact.select(worthwhile), moved)
                margins.lower[chosen], margins.upper[chosen] = closer.lower, closer.upper
        return margins

    def certain_classes(self, rows: Tensor, columns: Tensor, colors: Tensor) -> Tensor:
        """(M,) a class whose logit exceeds the label's for certain while pixels have colors (M, C); else the label."""
        least = self.bounds(rows, columns, colors, colors).upper.min(1)
        # There is no margin over the label itself: the numbers of later classes are one higher.
        others = least.indices + (least.indices >= self.label)
        return torch.where(least.values < 0, others, self.label)

    @property
    def _values(self) -> int:
        """How many values the network computes for one image."""
        return sum(form.center.numel() for form in self._propagation.clean.values())

    @property
    def _boxes_at_once(self) -> int:
        return max(1, min(BACKWARD_AT_ONCE, BACKWARD_BYTES // (8 * self._values)))

    def _to_follow(self, margins: Margins, exact: Margins, work: int = WORK) -> Tensor:
        """(M, K - 1) bool, the margins as run for which rounding is followed backward, given those in real numbers.

        Each box is judged by itself, so that its bounds do not depend on the others.
        """
        follow = (margins.lower <= 0) & (exact.bound > 0)[:, None]
        # With so much rounding, following it backward will hardly help.
        hopeless = self._lost > PLAUSIBLE * exact.bound
        return follow & ~(hopeless | (follow.sum(1) * self._values > work))[:, None]

    def _moved_by_rounding(self, forms: Mapping[int, Form], overflows: Tensor, follow: Tensor) -> Tensor:
        """(M, K - 1) how far rounding may move the margins in `follow`; infinity for the others.

        Args:
            forms: of the boxes.
            overflows: (M,) where float32 may overflow.
            follow: (M, K - 1) bool.
        """
        whole_forms = self._propagation.on_whole_maps(forms)
        logits = forms[self.network.logits].center[0]
        # A row for each margin, if a last matrix was merged; else for each logit, and margins follow.
        derivatives = torch.eye(logits.numel(), dtype=torch.float64).view(-1, *logits.shape)
        if self.network.last is None:
            others = [k for k in range(len(derivatives)) if k != self.label]
            derivatives = derivatives[self.label] - derivatives[others]
        moved = torch.full(follow.shape, torch.inf, dtype=torch.float64)
        # Of each box its own margins, as many as the box with the most has.
        chosen = follow.double().topk(int(follow.sum(1).max()), 1).indices
        largest = max(form.center.numel() for form in whole_forms.values())
        for part in chosen.split(max(1, BACKWARD_BYTES // (8 * largest)), 1):
            found = moved_by_rounding(
                self._propagation.steps,
                whole_forms,
                lambda step: self._propagation.own_rounding(step, whole_forms),
                (self.network.logits, derivatives[part]),
                self.network.recording.count,
            )
            # Where a box has fewer margins to follow than others, further ones were followed and are masked.
            moved.scatter_(1, part, found)
        unknown = (overflows | self._clean_overflows)[:, None] | ~follow
        return moved.masked_fill(unknown, torch.inf)

    def _margins(self, forms: Mapping[int, Form]) -> Margins:
        """Margins of the last run, whose last form is that of logits, or of their differences."""
        form = written_out(forms[self.network.logits])
        if self.network.last is None:
            flat = form.with_values(
                form.center.flatten(1), form.generators.flatten(2), form.radius.flatten(1)
            )
            others = [k for k in range(flat.center.shape[1]) if k != self.label]
            own_part = slice(self.label, self.label + 1)
            center = flat.center[:, own_part] - flat.center[:, others]
            # What moves both logits alike cancels; radii, whose signs are unknown, add up.
            generators = flat.generators[:, :, own_part] - flat.generators[:, :, others]
            radius = flat.radius[:, own_part] + flat.radius[:, others]
            sizes = flat.magnitude[:, own_part] + flat.magnitude[:, others]
            form = flat.with_values(center, generators, radius * (1 + 2**-50) + own(2) * sizes)
        lower, upper = form.ends
        # Where float32 may overflow, or float64 did, nothing is known.
        broken = (lower.isnan() | upper.isnan() | (lower > upper)).any(1)
        unbounded = self._propagation.overflows | self._clean_overflows | broken
        lower = lower.masked_fill(unbounded[:, None], -torch.inf)
        upper = upper.masked_fill(unbounded[:, None], torch.inf)
        return Margins(lower, upper)


def _form_of(rows: Tensor, columns: Tensor, low: Tensor, high: Tensor) -> Form:
    """Boxes of colors of pixels as a form, a window of one site each."""
    count, channels = low.shape
    center = (low + high) / 2
    # Rounded up: the box must lie inside center -+ reach.
    reach = torch.maximum(high - center, center - low) * (1 + 2**-50)
    reach = torch.where(high > low, reach + TINY, 0.0)
    return Form(
        center.view(count, 1, 1, channels),
        # Generator k moves channel k alone.
        torch.diag_embed(reach).view(count, channels, 1, 1, channels),
        center.new_zeros(count, 1, 1, channels),
        ((-1, channels),),
        rows,
        columns,
    )
