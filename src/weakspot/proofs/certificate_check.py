"""Checking a certificate of pixels anew: its boxes, a sample of its bounds, and its counterexamples."""

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from weakspot._checks import check_count, check_seed
from weakspot._progress import Progress, ProgressOption, shown
from weakspot._random import numpy_generator
from weakspot.classifier import Classifier, check_images, evaluating, predict
from weakspot.edits import prepare
from weakspot.proofs.affine_steps import NotSupportedError
from weakspot.proofs.allowed_colors import eight_bit_value, float32_below
from weakspot.proofs.certificate import (
    AS_RUN,
    ENUMERATED,
    EXACT,
    PROVEN,
    REFUTED,
    ColorBoxes,
    PixelCertificate,
    float32_settings,
    network_record,
    versions,
)
from weakspot.proofs.certificate_file import CertificateFile
from weakspot.proofs.color_splits import box_bounds
from weakspot.proofs.cover_check import box_problems, cover_problems, pixel_name, proves, record_problems
from weakspot.proofs.determinism import check_deterministic
from weakspot.proofs.enumeration import NetworkRuns, enumerate_colors, levels_between
from weakspot.proofs.margin_bounds import MarginBounds
from weakspot.proofs.network_steps import BoundNetwork, bound_network
from weakspot.proofs.patch_check import PatchCheck
from weakspot.proofs.pixel_proofs import check_trial
from weakspot.proofs.rounding_errors import float32_troubles
from weakspot.statistics.number_format import counted

SAMPLE = 500  # boxes and counterexamples that are computed again
TRIED = 4  # random colors of each of these boxes that are run
# Of a bound: another number of threads or another batch rounds differently.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class CertificateCheck:
    """What checking a certificate found.

    Attributes:
        problems: sentences, none if the certificate holds.
        checked: what was checked, in words.
        complete: whether all bounds, counterexamples and masked images were computed again, and not a sample.
        seed: of the sample.
        notes: differences between the machine of the certificate and this one.
    """

    problems: tuple[str, ...]
    checked: tuple[str, ...]
    complete: bool
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def sentence(self) -> str:
        """The result."""
        if self.passed:
            part = "" if self.complete else " as far as a sample shows"
            drawn = () if self.complete else (f"the sample was drawn with seed {self.seed}",)
            return f"The certificate holds{part}: {'; '.join((*self.checked, *drawn))}."
        more = f" ({counted(len(self.problems) - 1, 'more problem')})" if len(self.problems) > 1 else ""
        return f"The certificate does not hold: {self.problems[0]}{more}."


def check_certificate(
    model: nn.Module,
    path: Path | str,
    images: Tensor,
    *,
    sample: int = SAMPLE,
    seed: int | None = None,
    progress: ProgressOption = None,
) -> CertificateCheck:
    """Check a certificate that `to_json` wrote, trusting only the network and the images.

    Of a certificate of pixels: the boxes of every proven pixel cover its allowed colors and do not overlap; the bounds
    of one box of every proven pixel, drawn at random, and of a sample of the others are computed again, and random
    colors inside them are run; a sample of counterexamples is run again. Of one against patches: the masks cover every
    patch, every image is run with each mask, and a sample of pairs of masks is run on each certified image.

    Args:
        model: the classifier that the certificate is about.
        path: of the file.
        images: (M, C, H, W) in [0, 1], among them those of the certificate.
        sample: how many further boxes, counterexamples and, of each image, pairs of masks are computed again.
        seed: of the sample. None draws one from the operating system: whoever forges a certificate must not know it.
        progress: True for a bar, or a function of the fraction done.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no certificate, or one of another network or other images, if this process rounds
            more than float32 does, or if the network does not give an image the same logits each time.
    """
    check_count("sample", sample)
    seed = secrets.randbelow(2**32) if seed is None else seed
    check_seed(seed)
    file = CertificateFile.open(path)
    with (
        evaluating(model) as classifier,
        torch.no_grad(),
        shown(progress, "checking the certificate", counted=False) as report,
    ):
        images = check_images(images, classifier)
        check_network(classifier, file)
        check_deterministic(classifier, images[:1])
        notes = tuple(_differences(file))
        statement = file.text("statement")
        trouble = None if statement == EXACT else float32_troubles(classifier)
        if trouble:
            raise ValueError(f"a certificate for float32 as run cannot be checked here: {trouble}")
        if file.of_patches:
            patches = file.patch_certificate(images)
            masked = PatchCheck(classifier, patches, sample, seed)
            problems = (*file.altered(patches.record()), *masked.problems())
            return CertificateCheck(problems, masked.checked(), masked.complete, seed, notes)
        certificate = file.pixel_certificate(images.cpu())
        check = _PixelCheck(classifier, certificate, sample, seed, report)
        problems = (*file.altered(certificate.record()), *check.problems())
        return CertificateCheck(problems, check.checked(), check.complete, seed, notes)


def check_network(classifier: Classifier, file: CertificateFile) -> None:
    """Raises ValueError unless the certificate is about this network."""
    own = network_record(classifier)
    name, fingerprint = file.text("network", "name"), file.text("network", "fingerprint")
    if own["fingerprint"] != fingerprint:
        raise ValueError(
            f"model must be the network of the certificate, {name} with fingerprint {fingerprint}, got {own['name']} "
            f"with {own['fingerprint']} (weights, normalization or layers differ)"
        )


def _differences(file: CertificateFile) -> Iterator[str]:
    """What rounds differently here than where the certificate was made."""
    for key, here in (("versions", versions()), ("settings", float32_settings())):
        stored = file.part(key)
        for name, value in here.items():
            before = stored.get(name) if isinstance(stored, dict) else None
            if before != value:
                yield f"made with {name} {before}, checked with {value}"


class _PixelCheck:
    """The check of one certificate of pixels."""

    def __init__(
        self,
        classifier: Classifier,
        certificate: PixelCertificate,
        sample: int,
        seed: int,
        report: Progress | None,
    ) -> None:
        self.classifier, self.certificate = classifier, certificate
        self.report = report or (lambda _: None)
        self.sample, self.random = sample, numpy_generator(seed)
        self.prepared = prepare(classifier, certificate.images[:1].to(classifier.mean.device))
        self.boxes_run = self.counterexamples_run = 0
        self.network: BoundNetwork | None = None
        self._latest: dict[int, MarginBounds] = {}  # of one image

    def checked(self) -> tuple[str, ...]:
        """What was checked."""
        one = self.certificate
        pixels = [int((one.status == status).sum()) for status in (PROVEN, REFUTED)]
        of_each = ", at least one of every proven pixel" if self.boxes_run < len(one.boxes) else ""
        return (
            f"{counted(pixels[0], 'pixel')} proven ({one.statement}), {pixels[1]:,} refuted",
            f"the boxes of every proven pixel cover its {one.colors}",
            f"{self.boxes_run:,} of {counted(len(one.boxes), 'bound')} computed again{of_each}",
            f"{self.counterexamples_run:,} of {counted(pixels[1], 'counterexample')} run again",
        )

    @property
    def complete(self) -> bool:
        """Whether all bounds and counterexamples were computed again."""
        one = self.certificate
        every = len(one.boxes), len(one.counterexample_pixels)
        return (self.boxes_run, self.counterexamples_run) == every

    def problems(self) -> Iterator[str]:
        """Everything that is wrong."""
        one = self.certificate
        classes = predict(self.classifier, one.images[:1].to(self.classifier.mean.device)).shape[1]
        # Generators, because each part relies on what those before it found in order; what follows relies on all.
        for part in (record_problems(one, classes), box_problems(one), cover_problems(one)):
            if serious := [*part]:
                yield from serious
                return
        self.report(0.2)
        try:
            yield from self.wrong_counterexamples()
            self.report(0.5)
            yield from self.wrong_bounds()
        except NotSupportedError as reason:
            yield f"its bounds cannot be computed again: {reason}"
        self.report(1.0)

    def wrong_counterexamples(self) -> Iterator[str]:
        """Counterexamples whose color is not allowed, or does not change the class."""
        one = self.certificate
        pixels = one.counterexample_pixels
        if not len(pixels):
            return
        lows, highs = one.colors.box(one.images)
        places = pixels[:, 0], slice(None), pixels[:, 1], pixels[:, 2]
        colors = one.color[places].double()
        inside = ((colors >= lows[places]) & (colors <= highs[places])).all(1)
        # A pixel's own color is allowed, on the 8-bit grid or off it: it refutes a misclassified image.
        own = (one.color[places] == one.images[places]).all(1)
        if one.colors.eight_bit:
            inside &= (eight_bit_value((255 * colors).round()) == colors).all(1)
        allowed = inside | own
        for pixel in pixels[~allowed]:
            yield f"the counterexample of {pixel_name(one, pixel)} has a color that is not allowed"
        chosen = self._chosen(len(pixels))
        chosen = chosen[allowed[chosen]]  # the network is not asked about colors that are no colors
        self.counterexamples_run = len(chosen)
        for image in pixels[chosen, 0].unique().tolist():
            rows = chosen[pixels[chosen, 0] == image]
            where = pixels[rows]
            classes = self._classes(image, where, colors[rows])
            for pixel, reached in zip(where, classes, strict=True):
                if reached == one.labels[image]:
                    yield f"the counterexample of {pixel_name(one, pixel)} does not change the class"
                elif reached != one.predicted[tuple(pixel)]:
                    yield f"the counterexample of {pixel_name(one, pixel)} leads to another class than stated"

    def _classes(self, image: int, pixels: Tensor, colors: Tensor) -> Tensor:
        """(M,) classes of an image with one pixel (M, 3) in a color (M, C), by the statement of the certificate."""
        _, rows, columns = pixels.unbind(1)
        if self.certificate.statement == AS_RUN:
            return self._runs(image).whole(rows, columns, colors)[1].cpu()
        return self._margin_bounds(image).certain_classes(rows, columns, colors)

    def wrong_bounds(self) -> Iterator[str]:
        """Boxes of the sample whose bound is lower when computed again, or that hold a color with a lower margin."""
        one = self.certificate
        boxes = one.boxes
        chosen = self._chosen_boxes()
        self.boxes_run = len(chosen)
        images = boxes.pixels[chosen, 0].unique().tolist()
        for number, image in enumerate(images):
            rows = chosen[boxes.pixels[chosen, 0] == image]
            part = boxes.select(rows)
            bounds = torch.minimum(self._bounds(image, part), self._sampled(image, part))
            slack = TOLERANCE * torch.maximum(part.bound.abs(), bounds.abs())
            # Negated, so that a bound that is NaN is wrong as well.
            wrong = ~proves(bounds, part.method) | ~(part.bound <= bounds + slack)
            for row in wrong.nonzero()[:, 0].tolist():
                yield (
                    f"a box of {pixel_name(one, part.pixels[row])} has the bound {float(part.bound[row]):.4g}, but "
                    f"{float(bounds[row]):.4g} when computed again"
                )
            self.report(0.5 + 0.5 * (number + 1) / len(images))

    def _bounds(self, image: int, boxes: ColorBoxes) -> Tensor:
        """(B,) bounds of boxes of one image, computed again by the method of each."""
        bounds = torch.full_like(boxes.bound, torch.inf)
        if bool((boxes.method != ENUMERATED).any()):
            bounds = box_bounds(self._margin_bounds(image), boxes)
        enumerated = (boxes.method == ENUMERATED).nonzero()[:, 0]
        if len(enumerated):
            _, rows, columns = boxes.pixels[enumerated].unbind(1)
            levels = levels_between(boxes.low[enumerated], boxes.high[enumerated])
            status, lowest, *_ = enumerate_colors(self._runs(image), rows, columns, levels, math.inf)
            bounds[enumerated] = torch.where(status == PROVEN, lowest, -torch.inf)
        return bounds

    def _sampled(self, image: int, boxes: ColorBoxes) -> Tensor:
        """(B,) lowest margins of the network at a few random colors of each box, and at two of its corners."""
        at = torch.from_numpy(self.random.random((TRIED + 2, *boxes.low.shape)))
        at[0], at[1] = 0, 1
        colors = boxes.low + at * (boxes.high - boxes.low)
        if self.certificate.colors.eight_bit:
            colors = eight_bit_value((255 * colors).round())
        else:  # float32 numbers inside the box
            inside = -float32_below(-boxes.low), float32_below(boxes.high)
            colors = torch.minimum(torch.maximum(colors.float().double(), inside[0]), inside[1])
        colors = colors.flatten(0, 1)
        _, rows, columns = boxes.pixels.repeat(len(at), 1).unbind(1)
        if self.certificate.statement == AS_RUN:
            margins = self._runs(image).whole(rows, columns, colors)[0].double().cpu()
        else:
            margins = self._margin_bounds(image).bounds(rows, columns, colors, colors).upper.amin(1)
        return margins.view(len(at), -1).amin(0)

    def _margin_bounds(self, image: int) -> MarginBounds:
        """Bounds of one image, for the statement of the certificate.

        Raises:
            NotSupportedError: if the network has none.
        """
        one = self.certificate
        if image not in self._latest:
            if self.network is None:
                self.network = bound_network(self.classifier, one.images[:1].to(self.classifier.mean.device))
            clean, label = one.images[image : image + 1], int(one.labels[image])
            bounds = MarginBounds(self.network, clean, label, as_run=one.statement == AS_RUN)
            check_trial(bounds.exact, self.classifier, clean.to(self.classifier.mean.device), label)
            self._latest = {image: bounds}
        return self._latest[image]

    def _chosen_boxes(self) -> Tensor:
        """Numbers of one random box of every pixel and of a sample of the others, in order."""
        pixels = self.certificate.boxes.pixels.numpy()
        order = self.random.permutation(len(pixels))
        # In a random order, the first box of each pixel is a random one of its boxes.
        firsts = np.sort(np.unique(pixels[order], axis=0, return_index=True)[1])
        others = np.delete(order, firsts)[: self.sample]
        return torch.from_numpy(np.sort(np.concatenate([order[firsts], others]))).long()

    def _chosen(self, count: int) -> Tensor:
        """Numbers of a sample of so many things, in order."""
        chosen = self.random.choice(count, min(self.sample, count), replace=False)
        return torch.from_numpy(np.sort(chosen)).long()

    def _runs(self, image: int) -> NetworkRuns:
        one = self.certificate
        device = self.classifier.mean.device
        clean, label = (values[image : image + 1].to(device) for values in (one.images, one.labels))
        return NetworkRuns(self.classifier, clean, label, self.prepared)
