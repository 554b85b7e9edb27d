"""Two-mask agreement: a certificate against patches, for any network behind double masking.

PatchCleanser (Xiang, Mahloujifar and Mittal 2022, arXiv 2108.09135). A set of masks covers every patch of a size:
wherever the patch is, one mask hides it whole. If the network gives the label under every two masks of an image, then
the classifier that masks twice, `DoubleMasking`, gives the label whatever a patch shows: the mask that hides the patch
always has a say, and no other mask is believed against it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weakspot._checks import check_batch, check_classes
from weakspot._progress import Checkpoints, ProgressOption, shown
from weakspot.classifier import Classifier, as_classifier, check_images, evaluating, predict
from weakspot.edits import Edits, Prepared, prepare
from weakspot.logits import logit_scale
from weakspot.proofs.certificate import (
    AS_RUN,
    digest,
    float32_settings,
    network_record,
    versions,
    write_record,
)
from weakspot.proofs.determinism import check_deterministic
from weakspot.proofs.mask_set import NONE, MaskedImage, MaskSet, Patch, count_votes, margins_of
from weakspot.statistics.number_format import counted

# `Edits` is exact to 1e-4 of the range of the logits; a margin is a difference of two, here and where it is used. What
# is nearer to a tie is run by the network itself.
SLACK = 4e-4
PATCH_FORMAT = "weakspot patch certificate 1"


class DoubleMasking(nn.Module):
    """A classifier that hides parts of the image and takes the answer that a patch cannot have made.

    It classifies the image under each mask. If all masks agree, that class is the answer. Otherwise each mask that
    disagrees with the majority is combined with all masks: if its class stays the same under all of these, it is the
    answer. Otherwise the majority is (algorithm 1 of arXiv 2108.09135).

    Its logits (N, K) are the number of masks for each class; a class that the second round chose has one more than all
    masks. They have no gradients. The network runs on whole masked images, without the shortcuts of the certificate.
    Those of one image make a batch, so that the answer does not depend on the other images.

    Attributes:
        classifier: the network behind the masks.
        patch: side in pixels, or fraction of the image, of the patches to withstand.
        masks: along each side, at most.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    >>> DoubleMasking(network, patch=2, masks=3)(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 2])
    """

    def __init__(self, model: nn.Module, *, patch: Patch = 0.02, masks: int = 6) -> None:
        super().__init__()
        self.classifier, self.patch, self.masks = as_classifier(model), patch, masks
        self.training = self.classifier.training
        self.fixed_batch = None  # batches are made inside

    def forward(self, images: Tensor) -> Tensor:
        """Votes (N, K) on images (N, C, H, W) in [0, 1].

        Raises:
            ValueError: if they are not a batch of images.
        """
        check_batch(images)
        cover = MaskSet.covering((images.shape[2], images.shape[3]), self.patch, self.masks)
        return torch.stack(
            [MaskedImage(self.classifier, cover, image).votes() for image in images.detach().split(1)]
        )


@dataclass(frozen=True, eq=False)
class PatchCertificate:
    """Which images the double-masked classifier gives their labels, whatever a patch shows.

    It is about `DoubleMasking(model, ...)` in float32 as run, and not about the model without the masks. Masked
    images are classified by windows (`weakspot.edits`), which are assumed to be within 1e-4 of the range of the logits:
    tested, not proven. What windows leave within 4e-4 of a tie was run by the network itself, in the batches of
    `DoubleMasking`.

    Attributes:
        certified: (N,) bool.
        labels: (N,).
        margin: (N,) lowest margin of the label seen under two masks, as a fraction of the range of the image's logits;
            above zero if the image is certified. Masks are no longer tried once an image has failed.
        pair: (N, 2) long, numbers of the two masks with that margin; equal for one mask alone.
        predicted: (N,) class of the double-masked classifier without a patch.
        masks: that were used.
        images: (N, C, H, W).
        n_forward: (N,) masked images that were classified.
        network: name and fingerprint of the network, see `network_record`.
        names: N names of the images, or empty.
    """

    certified: Tensor
    labels: Tensor
    margin: Tensor
    pair: Tensor
    predicted: Tensor
    masks: MaskSet
    images: Tensor
    n_forward: Tensor
    network: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.certified)

    def __repr__(self) -> str:
        return f"PatchCertificate({int(self.certified.sum())} of {len(self)} certified, {self.masks.words})"

    @property
    def statement(self) -> str:
        """What a certified image is certified for, and of which classifier."""
        height, width = self.masks.mask
        return (
            f"behind double masking ({len(self.masks)} masks of {height} x {width} pixels), in float32 as run, the "
            f"classifier gives the label whatever a patch of up to {self.masks.words} shows, anywhere, as long as "
            "logits computed by windows are within 1e-4 of their range of the network's own, which is tested "
            "and not proven; masked images within 4e-4 of a tie by windows were run by the network itself, in the "
            "batches of the masked classifier; nothing is certified of the classifier without the masks"
        )

    @property
    def sentence(self) -> str:
        """The result on all images."""
        correct = int((self.predicted == self.labels).sum())
        return (
            f"Behind double masking, the label of {int(self.certified.sum())} of {counted(len(self))} withstands every "
            f"patch of up to {self.masks.words}, anywhere; without a patch, {counted(correct)} "
            f"{'is' if correct == 1 else 'are'} classified as labeled. This certifies the classifier behind the masks, "
            "not the network alone."
        )

    def to_json(self, path: Path | str) -> Path:
        """Write the certificate, atomically."""
        return write_record(path, self.record())

    def record(self) -> dict[str, object]:
        """What `to_json` writes."""
        return {
            "format": PATCH_FORMAT,
            "statement": AS_RUN,
            "meaning": self.statement,
            "network": dict(self.network),
            "versions": versions(),
            "settings": float32_settings(),
            "image_shape": list(self.images.shape[1:]),
            "images": [digest(image) for image in self.images],
            "names": list(self.names),
            "labels": self.labels.tolist(),
            "patch": self.masks.patch,
            "mask": list(self.masks.mask),
            "tops": list(self.masks.tops),
            "lefts": list(self.masks.lefts),
            "certified": self.certified.int().tolist(),
            "margin": self.margin.tolist(),
            "pair": self.pair.tolist(),
            "predicted": self.predicted.tolist(),
            "n_forward": self.n_forward.tolist(),
        }


def certify_patches(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    patch: Patch = 0.02,
    masks: int = 6,
    progress: ProgressOption = None,
    on_checkpoint: Callable[[PatchCertificate], object] | None = None,
) -> PatchCertificate:
    """Certify the classifier behind double masking against every patch of a size, at every place.

    An image is certified if the network gives the label under every two masks (theorem 1 of arXiv 2108.09135): 666
    masked images at six masks a side. Where windows leave the margin within 4e-4 of the range of the logits, the
    network itself decides, in the batches in which `DoubleMasking` asks it.

    Args:
        model: any classifier of images in [0, 1], left as it was.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        patch: side of a square in pixels (an integer), or its area as a fraction of the image, rounded up to whole
            pixels. A patch of any shape that fits into such a square is covered.
        masks: along each side, at most. More masks are smaller, hide less and take longer.
        progress: True for a bar, or a function of the fraction done.
        on_checkpoint: a function that gets the certificate of the images that are done, about every 20 seconds.

    Raises:
        ValueError: if an argument does not fit, or the network does not give an image the same logits each time.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    >>> network[1].weight.data, network[1].bias.data = torch.ones(2, 64), torch.tensor([1.0, 0.0])
    >>> certify_patches(network, torch.rand(3, 1, 8, 8), torch.tensor([0, 0, 1]), patch=2)
    PatchCertificate(2 of 3 certified, 2 x 2 pixels (6.25% of the image))
    """
    with evaluating(model) as classifier, torch.no_grad():
        images = check_images(images, classifier)
        cover = MaskSet.covering((images.shape[2], images.shape[3]), patch, masks)
        count = predict(classifier, images[:1]).shape[1]
        check_classes(labels, len(images), count)
        check_deterministic(classifier, images[:1])
        labels = labels.to(images.device)
        prepared = prepare(classifier, images[:1])
        rows: list[_Row] = []

        def known() -> PatchCertificate:
            done, device = len(rows), images.device
            return PatchCertificate(
                torch.tensor([row.certified for row in rows], device=device),
                labels[:done],
                torch.tensor([row.margin for row in rows], device=device),
                torch.tensor([row.pair for row in rows], device=device),
                torch.tensor([row.predicted for row in rows], device=device),
                cover,
                images[:done],
                torch.tensor([row.n_forward for row in rows], device=device),
                network=network_record(classifier),
            )

        save = Checkpoints(on_checkpoint)
        with shown(progress, "masking twice", total=len(images)) as report:
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                rows.append(_Masked(classifier, prepared, cover, image).certify(label))
                save(known)
                if report is not None:
                    report((number + 1) / len(images))
        return known()


class _Row(NamedTuple):
    certified: bool
    margin: float
    pair: tuple[int, int]
    predicted: int
    n_forward: int


class _Masked:
    """One image under one and two masks: by windows, and near a tie by the network itself."""

    def __init__(self, classifier: Classifier, prepared: Prepared, cover: MaskSet, image: Tensor) -> None:
        self.classifier, self.prepared, self.cover = classifier, prepared, cover
        self.whole = MaskedImage(classifier, cover, image[None])
        self.tops, self.lefts = cover.places(image.device)
        self.every = torch.arange(len(cover), device=image.device)
        self.by_windows = 0

    def certify(self, label: int) -> _Row:
        """The verdict on this image."""
        first = self.windows(NONE, self.every)
        scale = float(logit_scale(first))
        margins = self.margins(NONE, self.every, first, label, scale)
        lowest, number = margins.min(0)
        worst = (float(lowest), (int(number), int(number)))
        # The masks that leave the label the least margin are the likeliest to fail with another one.
        order = margins.argsort()
        for position, base in enumerate(order.tolist()):
            if worst[0] <= 0:
                break
            # Pairs with the masks before this one have been tried.
            others = order[position + 1 :]
            if len(others):
                pairs = self.margins(base, others, self.windows(base, others), label, scale)
                least, place = pairs.min(0)
                worst = min(worst, (float(least), (base, int(others[place]))))
        # Of a certified image every mask alone gives the label, so that no votes need be counted.
        certified, predicted = worst[0] > 0, label
        if not certified:
            votes = count_votes(
                self.classes(NONE, first, scale),
                first.shape[1],
                lambda base: self.classes(base, self.windows(base, self.every), scale),
            )
            predicted = int(votes.argmax())
        return _Row(certified, *worst, predicted, self.by_windows + self.whole.n_forward)

    def margins(self, base: int, numbers: Tensor, logits: Tensor, label: int, scale: float) -> Tensor:
        """(n,) margins as fractions of the scale, by windows' logits (n, K) under a mask and some masks (n,)."""
        margins = margins_of(logits, label) / scale
        for place in (margins.abs() <= SLACK).nonzero()[:, 0].tolist():
            margins[place] = self.whole.margin(base, int(numbers[place]), label) / scale
        return margins

    def classes(self, base: int, logits: Tensor, scale: float) -> Tensor:
        """(M,) classes under a mask and each of all, by windows' logits (M, K)."""
        top = logits.topk(2, 1).values
        # The network runs all masks in the same batches always, so one near tie decides for all of them.
        near = bool((top[:, 0] - top[:, 1] <= SLACK * scale).any())
        return (self.whole.logits(base) if near else logits).argmax(1)

    def windows(self, base: int, numbers: Tensor) -> Tensor:
        """(n, K) under a mask and each of some masks (n,), to 1e-4 of the range of the logits."""
        self.by_windows += len(numbers)
        edits = Edits(self.classifier, self.whole.masked(base), self.prepared)
        # Masks are edits: rectangles in the fill color, on the image under the first mask.
        patches = self.whole.fill.expand(len(numbers), -1, *self.cover.mask)
        return edits.logits(torch.zeros_like(numbers), self.tops[numbers], self.lefts[numbers], patches)
