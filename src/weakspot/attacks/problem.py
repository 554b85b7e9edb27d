"""The contract of every attack: what is prepared before the search, what is verified after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weakspot.checks import check_classes, check_logits, check_region
from weakspot.classifier import Classifier, check_images, default_batch, evaluating, margin, predict
from weakspot.pairs import AttackResult


@dataclass(frozen=True)
class Problem:
    """Images to fool the classifier on, and where: everything checked, on the model's device.

    Attributes:
        classifier: in eval mode.
        clean: (N, C, H, W) in [0, 1].
        labels: (N,) classes to leave.
        targets: (N,) classes to reach, or None when leaving the label is enough.
        region: bool (N, 1, H, W), the sites that may change.
        batch_size: images that go through the model at once.
    """

    classifier: Classifier
    clean: Tensor
    labels: Tensor
    targets: Tensor | None
    region: Tensor
    batch_size: int

    def batches(self) -> list[Problem]:
        """The same problem in pieces of at most `batch_size` images."""
        return [
            self._part(slice(start, start + self.batch_size))
            for start in range(0, len(self.clean), self.batch_size)
        ]

    def _part(self, part: slice) -> Problem:
        targets = None if self.targets is None else self.targets[part]
        return Problem(
            self.classifier, self.clean[part], self.labels[part], targets, self.region[part], self.batch_size
        )

    def margins(self, logits: Tensor) -> Tensor:
        """(N,) what an attack drives below zero; there it has succeeded."""
        if self.targets is None:
            return margin(logits, self.labels)
        return -margin(logits, self.targets)

    def apply(self, perturbation: Tensor) -> Tensor:
        """The images with the perturbation inside the region, and their own bits outside it."""
        return torch.where(self.region, (self.clean + perturbation).clamp(0, 1), self.clean)

    def descent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Margins (N,) of the images and the direction (N, C, H, W) in which they fall, zero outside the region."""
        point = images.detach().requires_grad_()
        logits = self.classifier(point)
        self._check(logits)
        margins = self.margins(logits)
        if not margins.requires_grad:
            return margins.detach(), torch.zeros_like(images)
        (gradient,) = torch.autograd.grad(margins.sum(), point, allow_unused=True, materialize_grads=True)
        return margins.detach(), torch.where(self.region, -gradient, 0)

    def _check(self, logits: Tensor) -> None:
        check_logits(logits.detach(), self.classifier.name)
        for name, classes in (("labels", self.labels), ("targets", self.targets)):
            if classes is not None:
                check_classes(classes, len(logits), logits.shape[1], name=name)

    def noise(self, seed: int, restart: int) -> tuple[Tensor, Tensor]:
        """Gaussian and uniform noise (N, C, H, W), each image's from a generator of its own.

        The generator is seeded by `seed`, `restart` and the image's 8-bit content, so that neither its place
        in a batch nor the batch's size changes what an image is given.
        """
        levels = (self.clean * 255).round().byte().cpu().flatten(1).numpy()
        gaussian, uniform = [], []
        for pixels in levels:
            digest = hashlib.blake2b(
                pixels.tobytes(), digest_size=7, key=f"{seed} {restart}".encode()
            ).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            gaussian.append(torch.randn(self.clean.shape[1:], generator=generator))
            uniform.append(torch.rand(self.clean.shape[1:], generator=generator))
        return torch.stack(gaussian).to(self.clean), torch.stack(uniform).to(self.clean)

    def result(self, adversarial: Tensor, *, forwards: int, backwards: int) -> AttackResult:
        """Verify by a fresh forward pass, which is counted on top of the search's own forwards."""
        landed = predict(self.classifier, adversarial, self.batch_size).argmax(1)
        spent = torch.ones_like(self.labels)
        return AttackResult(
            clean=self.clean,
            adversarial=adversarial,
            labels=self.labels,
            targets=landed if self.targets is None else self.targets,
            success=landed != self.labels if self.targets is None else landed == self.targets,
            forwards=spent * (forwards + 1),
            backwards=spent * backwards,
        )


@contextmanager
def attacking(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    region: Tensor | None,
    targets: Tensor | None,
    batch_size: int | None,
) -> Iterator[Problem]:
    """The checked problem while the model is in eval mode.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    with evaluating(model) as classifier:
        clean = check_images(images, classifier)
        count, device = len(clean), clean.device
        check_classes(labels, count)
        # Copies: tensors made in inference mode cannot take part in gradients.
        labels = labels.to(device, torch.long, copy=True)
        if targets is not None:
            check_classes(targets, count, name="targets")
            targets = targets.to(device, torch.long, copy=True)
            if bool((targets == labels).any()):
                same = int((targets == labels).nonzero()[0])
                raise ValueError(
                    f"targets[{same}] is the image's label, {int(labels[same])}; ask for another class"
                )
        if region is None:
            region = torch.ones(1, 1, *clean.shape[2:], dtype=torch.bool)
        check_region(region, clean)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted is a whole number of at least 1")
        region = region.to(device, copy=True).expand(count, -1, -1, -1)
        yield Problem(classifier, clean, labels, targets, region, batch_size or default_batch(clean))
