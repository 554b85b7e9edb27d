"""Sound bounds of an image's margins while one pixel takes any color in a box, for many pixels and boxes at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot.proofs.affine_forms import Form, written_out
from weakspot.proofs.backward_errors import moved_by_rounding
from weakspot.proofs.linear_steps import differences
from weakspot.proofs.network_steps import BoundNetwork
from weakspot.proofs.propagation import Propagation
from weakspot.proofs.rounding_errors import TINY, own

# Rounding is followed backward where bounds are so near to zero, in multiples of what it takes from clean margins, and
# unless that is such a multiple of the margin.
NEAR, PLAUSIBLE = 2, 100
BACKWARD_AT_ONCE, MARGINS_AT_ONCE = 32, 16  # boxes, and margins of each, that are followed at once


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
            self.clean = self._closer(
                self.clean, self.exact.clean, self._propagation.clean, self._propagation.overflows
            )

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
        near = ((margins.bound <= 0) & (margins.bound > -NEAR * self._lost)).nonzero()[:, 0]
        for part in near.split(BACKWARD_AT_ONCE) if len(near) else ():
            exact = self.exact.bounds(*(values[part] for values in boxes), deep=deep)
            positive = exact.bound > 0
            if bool(positive.any()):
                chosen = part[positive]
                form = _form_of(*(values[chosen] for values in boxes))
                forms = self._propagation.run(form, deep=False, keep=True)
                closer = self._closer(
                    margins.select(chosen), exact.select(positive), forms, self._propagation.overflows
                )
                margins.lower[chosen], margins.upper[chosen] = closer.lower, closer.upper
        return margins

    def _closer(
        self, margins: Margins, exact: Margins, forms: Mapping[int, Form], overflows: Tensor
    ) -> Margins:
        """Bounds as run, closer where rounding decides: it is followed backward, which takes more time and less margin.

        Args:
            margins: bounds as run.
            exact: in real numbers.
            forms: of the same boxes.
            overflows: (M,) where float32 may overflow.
        """
        # So much rounding that it is not known which activations act.
        hopeless = self._lost > PLAUSIBLE * exact.bound.abs()
        open_margins = ((margins.lower <= 0) & (exact.lower > 0) & ~hopeless[:, None]).any(0)
        if not bool(open_margins.any()):
            return margins
        return margins.within(exact, self._moved_by_rounding(forms, overflows, open_margins.nonzero()[:, 0]))

    def _moved_by_rounding(self, forms: Mapping[int, Form], overflows: Tensor, chosen: Tensor) -> Tensor:
        """(M, K - 1) how far rounding may move the margins with the chosen numbers; infinity for the others."""
        wholes = self._propagation.on_whole_maps(forms)
        logits = forms[self.network.logits].center[0]
        derivatives = torch.eye(logits.numel(), dtype=torch.float64).view(-1, *logits.shape)
        if self.network.last is None:
            others = [k for k in range(len(derivatives)) if k != self.label]
            derivatives = derivatives[self.label] - derivatives[others]
        moved = torch.full((len(overflows), len(derivatives)), torch.inf, dtype=torch.float64)
        for part in chosen.split(MARGINS_AT_ONCE):
            moved[:, part] = moved_by_rounding(
                self._propagation.steps,
                wholes,
                lambda step: self._propagation.own_rounding(step, wholes),
                (self.network.logits, derivatives[part]),
                self.network.recording.count,
            )
        return moved.masked_fill((overflows | self._clean_overflows)[:, None], torch.inf)

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
            generators = flat.generators[:, :, own_part] - flat.generators[:, :, others]
            radius = flat.radius[:, own_part] + flat.radius[:, others]
            sizes = flat.magnitude[:, own_part] + flat.magnitude[:, others]
            form = flat.with_values(center, generators, radius * (1 + 2**-50) + own(2) * sizes)
        lower, upper = form.ends
        # Where float32 may overflow, or float64 did, nothing is known.
        unbounded = (
            self._propagation.overflows | self._clean_overflows | (lower.isnan() | upper.isnan()).any(1)
        )
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
        torch.diag_embed(reach).view(count, channels, 1, 1, channels),
        center.new_zeros(count, 1, 1, channels),
        ((-1, channels),),
        rows,
        columns,
    )
