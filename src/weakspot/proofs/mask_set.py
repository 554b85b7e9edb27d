"""Sets of masks of which at least one covers a patch, wherever it is, and an image under one of them and under two."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import check_count, is_number
from weakspot.classifier import Classifier, predict
from weakspot.logits import margin

Patch = int | float
NONE = -1  # in place of a mask's number: the image as it is


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
        height, tops = _cover(image[0], side, int(masks))
        width, lefts = _cover(image[1], side, int(masks))
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
    whole = isinstance(patch, int | np.integer) and not isinstance(patch, bool)
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


class MaskedImage:
    """One image under the masks of a set, by whole passes of the network.

    Masked images go in the same batches always: all masks, in their order, on the image or on top of one of them. A row
    then does not depend on what the others show, not even in its last bit; it does on how many they are.

    Attributes:
        hidden: bool (M, 1, H, W), the pixels that each mask hides.
        n_forward: masked images classified so far.
    """

    def __init__(self, classifier: Classifier, cover: MaskSet, image: Tensor) -> None:
        """Prepare an image (1, C, H, W)."""
        self.classifier, self.image = classifier, image
        self.hidden, self.fill = cover.hidden(image.device), fill_color(classifier, image)
        self.n_forward = 0
        self._logits: dict[int, Tensor] = {}

    def masked(self, number: int) -> Tensor:
        """(1, C, H, W) the image under one mask, or as it is."""
        return self.image if number == NONE else torch.where(self.hidden[number], self.fill, self.image)

    def logits(self, base: int) -> Tensor:
        """(M, K) under a mask, or `NONE`, and each of all masks."""
        if base not in self._logits:
            self.n_forward += len(self.hidden)
            images = torch.where(self.hidden, self.fill, self.masked(base))
            self._logits[base] = predict(self.classifier, images)
        return self._logits[base]

    def margin(self, base: int, number: int, label: int) -> float:
        """The least margin of a class under two masks, whichever comes first, or under one, alone or onto itself."""
        # The same picture in either order, from two batches, which may round differently.
        second = number if base == NONE else base
        return float(
            margins_of(torch.stack([self.logits(base)[number], self.logits(number)[second]]), label).min()
        )

    def votes(self) -> Tensor:
        """Votes (K,) of double masking."""
        first = self.logits(NONE)
        return count_votes(first.argmax(1), first.shape[1], lambda base: self.logits(base).argmax(1))


def fill_color(classifier: Classifier, images: Tensor) -> Tensor:
    """(1, C, 1, 1) of hidden pixels: the mean that the classifier subtracts. It must not depend on the image.

    A mean color of the image would: a patch could then act through its mask.
    """
    return classifier.mean.to(images).clamp(0, 1).expand(1, images.shape[1], 1, 1)


def count_votes(first: Tensor, classes: int, second: Callable[[int], Tensor]) -> Tensor:
    """Votes (K,) of double masking on one image.

    Args:
        first: (M,) classes under each mask.
        classes: number K.
        second: returns the classes (M,) under one mask, by its number, and each of all masks.
    """
    votes = torch.bincount(first, minlength=classes)
    majority = votes.argmax()
    for number in (first != majority).nonzero()[:, 0].tolist():
        if bool((second(number) == first[number]).all()):
            # More votes than there are masks, so that no majority has as many.
            votes[first[number]] = len(first) + 1
            break
    return votes.float()


def margins_of(logits: Tensor, label: int) -> Tensor:
    """(n,) margins of a class in logits (n, K)."""
    return margin(logits, torch.full_like(logits[:, 0], label, dtype=torch.long))
