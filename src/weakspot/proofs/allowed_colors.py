"""The colors that a pixel may take: a box for each pixel, of all real colors or of the 8-bit ones among them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot._checks import is_number, with_plain_numbers
from weakspot.budgets.parse import read_amount

TOP = 255  # the highest of the 256 levels
# A radius such as 8/255 is rounded, and so are the levels of an image: less than this of a level is rounding.
NEAR = 1e-3


@dataclass(frozen=True)
class AllowedColors:
    """Which colors one pixel may take.

    Attributes:
        radius: the largest change of a channel; 1 for every color.
        eight_bit: whether only the colors k/255 are meant.

    Raises:
        ValueError: if the radius is not above 0 and at most 1, or reaches no other 8-bit color.
    """

    radius: float = 1.0
    eight_bit: bool = False

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        if not is_number(self.radius) or not 0 < self.radius <= 1:
            hint = ""
            if is_number(self.radius) and 1 < self.radius <= TOP:
                hint = f" (did you mean {self.radius:g}/255?)"
            raise ValueError(f"colors must have a radius above 0 and at most 1, got {self.radius!r}{hint}")
        if self.eight_bit and self.radius < 1 / TOP - NEAR / TOP:
            raise ValueError(
                f"colors must have a radius of at least 1/255 to reach other 8-bit colors, got {self.radius!r}"
            )

    def __str__(self) -> str:
        near = "" if self.radius >= 1 else f" within {TOP * self.radius:.4g}/255 of the pixel's own"
        return f"{'8-bit colors' if self.eight_bit else 'colors'}{near}"

    def box(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest allowed value of each channel of each pixel, both (N, C, H, W) in float64.

        For 8-bit colors both are levels k/255, rounded to float32 as 8-bit images are.
        """
        own = images.double()
        if not self.eight_bit:
            if self.radius >= 1:
                return torch.zeros_like(own), torch.ones_like(own)
            # Outward by more than the rounding of the two sums.
            reach = self.radius * (1 + 2**-50) + 2**-52
            return (own - reach).clamp(min=0), (own + reach).clamp(max=1)
        # The levels within the radius; NEAR keeps those at its ends, which rounding may put just outside.
        low = (TOP * (own - self.radius) - NEAR).ceil().clamp(0, TOP)
        high = (TOP * (own + self.radius) + NEAR).floor().clamp(0, TOP)
        return eight_bit_value(low), eight_bit_value(high)


def eight_bit_value(levels: Tensor) -> Tensor:
    """The values of levels 0 to 255 in float64, rounded to float32 as in images read from 8-bit files."""
    return (levels.float() / TOP).double()


def float32_below(values: Tensor) -> Tensor:
    """The largest float32 numbers that are at most the given float64 ones, in float64."""
    # Rounded to nearest, then one number further down where that went up.
    nearest = values.float()
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest.double() > values, below, nearest).double()


def parse_colors(colors: str | float | AllowedColors) -> AllowedColors:
    """Read "full", "8bit", a radius such as 8/255 (a number or text), or "8bit:8/255".

    Raises:
        ValueError: if it is none of these.

    >>> parse_colors("8bit:8/255").eight_bit
    True
    """
    if isinstance(colors, AllowedColors):
        return colors
    kind, colon, amount = str(colors).strip().lower().partition(":")
    eight_bit = kind == "8bit"
    if not colon and kind in {"full", "8bit"}:
        return AllowedColors(eight_bit=eight_bit)
    # Any other text with a colon is read whole, which is no number and refused.
    return AllowedColors(_radius(amount if eight_bit and colon else colors), eight_bit)


def _radius(value: object) -> float:
    try:
        radius = float(value) if is_number(value) else read_amount(str(value))  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        radius = math.nan
    if not math.isfinite(radius):
        raise ValueError(
            'colors must be "full", "8bit", a radius such as 8/255, or "8bit:8/255" (the 8-bit colors within a '
            f"radius), got {value!r}"
        )
    return radius
