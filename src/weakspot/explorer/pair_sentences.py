"""What an attack inside a mask and the same attack at a place of equal area came to, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weakspot.statistics.number_format import number, percent, size_of_change


@dataclass(frozen=True)
class SideOutcome:
    """What came of one side.

    Attributes:
        success: whether the image fools the classifier.
        success_8bit: whether its 8-bit file does.
        predicted: class of the image.
        margin: the label's logit less the largest other one.
        size: of the change, for attacks that look for the smallest one; else None.
        norm: of `size`.
        target: the class to reach, by name; None if leaving the label is enough.
    """

    success: bool
    success_8bit: bool
    predicted: str
    margin: float
    size: float | None = None
    norm: str = "linf"
    target: str | None = None

    def __str__(self) -> str:
        margin = f"margin {number(self.margin)}"
        if not self.success:
            failed = "not fooled" if self.target is None else f"{self.target} not reached"
            return f"{failed}, {self.predicted} ({margin})"
        by = "" if self.size is None else f" with a change of {size_of_change(self.size, self.norm)}"
        rounded = "" if self.success_8bit else ", but not once rounded to an 8-bit file"
        return f"fooled{by}, {self.predicted} ({margin}){rounded}"


def outcome_sentence(
    mask: SideOutcome,
    control: SideOutcome | None,
    *,
    area: float,
    shared: float | None = None,
    needless: str = "",
    stopped: bool = False,
) -> str:
    """The pair in a few sentences, which claim no more than one place can show.

    Args:
        mask: inside the mask.
        control: at the place of equal area; None if there is none.
        area: fraction of the image in the mask.
        shared: fraction of the mask's pixels that are in the control, too, if that is much.
        needless: why the image needs no change; empty if it does.
        stopped: whether the attack was ended early.
    """
    if needless:
        return f"The image is {needless} without an attack, so that no place needs to change."
    start = "Stopped early. " if stopped else ""
    if control is None:
        none = (
            ""
            if mask.success
            else " No change was found that is enough; this does not mean that none exists."
        )
        return f"{start}Whole image: {mask}.{none}"
    both = f"Inside the mask, {percent(area)} of the image: {mask}. At a place of equal area: {control}."
    if shared is not None:
        return f"{start}{both} The two places share {percent(shared)} of their pixels, so comparing them says little."
    return f"{start}{both} {_compared(mask, control)}"


def _compared(mask: SideOutcome, control: SideOutcome) -> str:
    if mask.success and control.success:
        if mask.size is None or control.size is None:
            return "The mask is nothing special here: the other place was enough as well."
        if mask.size == control.size:
            return "The two places needed the same."
        less = "mask" if mask.size < control.size else "other place"
        return f"The {less} needed less; one other place is no test."
    if mask.success:
        return "Only the mask was enough; one other place is no test."
    if control.success:
        return "Only the other place was enough; inside the mask, no change was found that is."
    return "At neither place was a change found that is enough; this does not mean that none exists."


def with_cautions(warned: Sequence[str]) -> str:
    """What a search warned of, as sentences that precede its result."""
    return "".join(f"Caution: {text}. " for text in dict.fromkeys(warned))
