"""Checking a certificate against patches: that its masks cover every patch, and what the network says under them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from weakspot._random import numpy_generator
from weakspot.classifier import Classifier, predict
from weakspot.logits import logit_scale
from weakspot.proofs.mask_set import NONE, MaskedImage, MaskSet, count_votes, fill_color, margins_of
from weakspot.proofs.two_masks import SLACK, PatchCertificate
from weakspot.statistics.number_format import counted

AT_ONCE = 64  # masked images


class PatchCheck:
    """The check of one certificate against patches.

    Args:
        classifier: of the certificate.
        certificate: as read, with its images.
        sample: how many pairs of masks are tried on each certified image, beside all single masks.
        seed: of the sample.
    """

    def __init__(self, classifier: Classifier, certificate: PatchCertificate, sample: int, seed: int) -> None:
        self.classifier, self.certificate, self.sample = classifier, certificate, sample
        self.random = numpy_generator(seed)
        self.fill = fill_color(classifier, certificate.images)
        self.pairs_run = 0
        self._nearest = math.inf  # of the two largest logits of a masked image

    @property
    def _pairs(self) -> int:
        """Pairs of different masks on all certified images."""
        return int(self.certificate.certified.sum()) * math.comb(len(self.certificate.masks), 2)

    @property
    def complete(self) -> bool:
        """Whether every pair of masks was tried on every certified image."""
        return self.pairs_run == self._pairs

    def checked(self) -> tuple[str, ...]:
        """What was checked."""
        one = self.certificate
        return (
            f"{int(one.certified.sum())} of {counted(len(one), 'image')} certified for {one.masks.words}",
            "the masks cover every patch",
            f"every image run again under each of {counted(len(one.masks), 'mask')}",
            f"{self.pairs_run:,} of {counted(self._pairs, 'pair')} of masks on certified images run again",
        )

    def problems(self) -> Iterator[str]:
        """Everything that is wrong."""
        one = self.certificate
        problem = cover_problem(one.masks)
        if problem:
            yield problem
            return
        classes = predict(self.classifier, one.images[:1]).shape[1]
        if bool(((one.labels < 0) | (one.labels >= classes)).any()):
            yield f"its labels are not classes between 0 and {classes - 1}"
            return
        if bool(((one.pair < 0) | (one.pair >= len(one.masks))).any()):
            yield f"its pairs are not masks between 0 and {len(one.masks) - 1}"
            return
        hidden = one.masks.hidden(one.images.device)
        for number in range(len(one)):
            yield from self._image_problems(number, hidden)

    def _image_problems(self, number: int, hidden: Tensor) -> Iterator[str]:
        """What is wrong with one image, under the masks (M, 1, H, W)."""
        one = self.certificate
        label, certified = int(one.labels[number]), bool(one.certified[number])
        name = one.names[number] if one.names else f"image {number + 1}"
        self._nearest = math.inf
        whole = MaskedImage(self.classifier, one.masks, one.images[number : number + 1])
        single = self._noted(whole.logits(NONE))
        scale = float(logit_scale(single))
        # The margin under the two masks that the certificate names, computed anew.
        a, b = one.pair[number].tolist()
        named = float(margins_of(self._logits(number, hidden[a : a + 1] | hidden[b : b + 1]), label)) / scale
        stated = float(one.margin[number])
        if certified != (stated > 0):
            yield f"{name} has a margin of {stated:.3g}, but is {'' if certified else 'not '}certified"
        if certified:
            lowest = self._lowest(number, whole, single, hidden) / scale
            if not lowest > 0:
                yield f"{name} is not certified: under two of the masks, another class wins or is as near"
                return
            if not stated <= lowest + SLACK:
                yield f"the margin of {name} is {lowest:.3g} under two of the masks, less than stated"
                return
            if int(one.predicted[number]) != label:
                yield f"{name} is certified, but said to be misclassified without a patch"
        # Where two classes were as near as rounding, either answer may have been given, but no class beyond the last.
        elif int(one.predicted[number]) != self._predicted(number, single, hidden) and not (
            self._nearest <= SLACK * scale and 0 <= int(one.predicted[number]) < single.shape[1]
        ):
            yield f"behind the masks, {name} is not classified as stated"
        if not abs(stated - named) <= SLACK * max(1.0, abs(named)):
            yield f"the margin of {name} is {named:.3g} under the two masks that it names, not as stated"

    def _lowest(self, number: int, whole: MaskedImage, single: Tensor, hidden: Tensor) -> float:
        """The least margin under single masks, by their logits (M, K), and under a sample of pairs."""
        label = int(self.certificate.labels[number])
        alone = margins_of(single, label)
        if len(hidden) == 1:  # a mask as large as the image has no partner
            return float(alone.min())
        scale = float(logit_scale(single))
        first, second = torch.triu_indices(len(hidden), len(hidden), 1)
        chosen = torch.from_numpy(self.random.choice(len(first), min(self.sample, len(first)), replace=False))
        self.pairs_run += len(chosen)
        first, second = first[chosen], second[chosen]
        both = margins_of(self._logits(number, hidden[first] | hidden[second]), label)
        # These pairs ran in batches of another size than those of the masked classifier.
        for place in (both.abs() <= SLACK * scale).nonzero()[:, 0].tolist():
            both[place] = whole.margin(int(first[place]), int(second[place]), label)
        return float(torch.cat([alone, both]).min())

    def _predicted(self, number: int, single: Tensor, hidden: Tensor) -> int:
        """The class of an image behind the masks, from its logits (M, K) under each."""

        def second(base: int) -> Tensor:
            return self._logits(number, hidden[base] | hidden).argmax(1)

        return int(count_votes(single.argmax(1), single.shape[1], second).argmax())

    def _logits(self, number: int, hidden: Tensor) -> Tensor:
        """(n, K) of an image with pixels hidden, bool (n, 1, H, W)."""
        image = self.certificate.images[number]
        masked = (torch.where(some, self.fill, image) for some in hidden.split(AT_ONCE))
        return self._noted(torch.cat([predict(self.classifier, images) for images in masked]))

    def _noted(self, logits: Tensor) -> Tensor:
        """The logits (n, K), with the least distance of two classes noted."""
        if logits.shape[1] > 1:
            top = logits.topk(2, 1).values
            self._nearest = min(self._nearest, float((top[:, 0] - top[:, 1]).min()))
        return logits


def cover_problem(masks: MaskSet) -> str:
    """What is wrong with masks that are to cover every patch; empty if nothing is."""
    for length, mask, starts in (
        (masks.image[0], masks.mask[0], masks.tops),
        (masks.image[1], masks.mask[1], masks.lefts),
    ):
        if not 1 <= masks.patch <= length or any(start < 0 or start + mask > length for start in starts):
            return "its patch or its masks do not lie inside the image"
        # Every place is tried, because the masks are those of a file and need not follow any formula.
        for first in range(length - masks.patch + 1):
            if not any(start <= first and first + masks.patch <= start + mask for start in starts):
                return f"no mask covers a patch of {masks.patch} pixels that starts at pixel {first}"
    return ""
