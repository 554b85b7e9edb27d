"""An image under one mask and under two, as the masked classifier runs the network on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weakspot.classifier import Classifier, predict
from weakspot.logits import margin
from weakspot.proofs.mask_set import MaskSet

NONE = -1  # in place of a mask's number: the image as it is


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
