"""Sets of masks of which at least one covers a patch, wherever it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot._checks import check_count, is_number

Patch = int | float


@dataclass(frozen=True)
class MaskSet:
    """Masks of one size, of which at least one covers every patch of another.

    Attributes:
        image: height and width of the images.
        patch: side of the patch in pixels.
        mask: height and width of the masks.
        tops: first rows of the masks.
        lefts: first columns; there is a mask at every top and left.
    """

    image: tuple[int, int]
    patch: int
    mask: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def covering(cls, image: tuple[int, int], patch: Patch, masks: int) -> MaskSet:
        """The masks for patches of a size.

        Args:
            image: height and width.
            patch: an integer is the side of a square in pixels, a fraction that of its area of the image.
            masks: at most so many along each side.

        Raises:
            ValueError: if the patch does not fit into the image.
        """
        side = patch_side(patch, image)
        check_count("masks", masks, least=2)
        height, tops = _cover(image[0], side, masks)
        width, lefts = _cover(image[1], side, masks)
        return cls(image, side, (height, width), tops, lefts)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @property
    def fraction(self) -> float:
        """Area of the patch as a fraction of the image."""
        return self.patch**2 / math.prod(self.image)

    @property
    def words(self) -> str:
        """The patch in pixels and as a fraction of the image.

        >>> MaskSet.covering((224, 224), 0.02, 6).words
        '32 x 32 pixels (2.04% of the image)'
        """
        return f"{self.patch} x {self.patch} pixels ({100 * self.fraction:.3g}% of the image)"

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tops and lefts (M,) of the masks, row by row."""
        tops, lefts = (torch.tensor(starts, device=device) for starts in (self.tops, self.lefts))
        return tops.repeat_interleave(len(lefts)), lefts.repeat(len(tops))

    def hidden(self, device: torch.device) -> Tensor:
        """Bool (M, 1, H, W), the pixels that each mask hides."""
        tops, lefts = self.places(device)
        rows, columns = (torch.arange(length, device=device) for length in self.image)
        # (M, H) and (M, W), of which each mask is the outer product.
        down = (rows >= tops[:, None]) & (rows < tops[:, None] + self.mask[0])
        across = (columns >= lefts[:, None]) & (columns < lefts[:, None] + self.mask[1])
        return down[:, None, :, None] & across[:, None, None, :]


def patch_side(patch: Patch, image: tuple[int, int]) -> int:
    """Side in pixels of the smallest square of at least this size; see `MaskSet.covering`.

    Raises:
        ValueError: if such a square does not fit into the image.

    >>> patch_side(0.02, (224, 224)), patch_side(5, (32, 32))
    (32, 5)
    """
    most = min(image)
    # True is an integer in Python, but no side of a patch.
    whole = isinstance(patch, int) and not isinstance(patch, bool)
    if not is_number(patch) or not (patch >= 1 if whole else 0 < patch < 1):
        raise ValueError(
            f"patch must be a side in pixels such as 32, or a fraction of the image such as 0.02, got {patch!r}"
        )
    # Rounding of the root must not add a pixel to a side that is whole.
    side = int(patch) if whole else math.ceil(math.sqrt(patch * math.prod(image)) - 1e-9)
    if side > most:
        raise ValueError(f"patch must be at most {most} pixels a side in such images, got {patch!r}")
    return side


def _cover(length: int, patch: int, masks: int) -> tuple[int, tuple[int, ...]]:
    """Length of the masks along one side, and where they start.

    With stride s = ceil((n - p + 1) / k) and masks of p + s - 1, the mask that starts at a covers the patches that
    start at a, ..., a + s - 1; the last mask ends with the image (the paper's mask set generation).
    """
    # A patch has length - patch + 1 places; negated twice, the quotient is rounded up.
    stride = -(-(length - patch + 1) // masks)
    mask = patch + stride - 1
    return mask, tuple(dict.fromkeys([*range(0, length - mask, stride), length - mask]))
