"""The contract of every attack: what is prepared before the search, what is verified after it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_batch_size, check_classes, check_region, check_seed
from weakspot.attacks.eight_bit import stored
from weakspot.attacks.losses import Loss, check_values, conservative_margin, margin
from weakspot.budgets import SSIM, Budget
from weakspot.budgets.base import MEMO
from weakspot.classifier import Classifier, check_images, check_logits, evaluating, predict
from weakspot.edits import Prepared
from weakspot.fusion import fused, measured_batch
from weakspot.pairs import AttackResult


class LossGradient(NamedTuple):
    """Where an objective falls.

    Attributes:
        margins: (N,) below zero where the images fool the classifier.
        values: (N,) of the objective.
        direction: (N, C, H, W) minus its gradient, zero outside the region.
    """

    margins: Tensor
    values: Tensor
    direction: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """Images to fool the classifier on, and where: everything checked, on the model's device.

    An attack works on all images at once; what goes through the model goes in batches and is counted here.

    Attributes:
        classifier: in eval mode.
        clean: (N, C, H, W) in [0, 1].
        labels: (N,) classes to leave.
        targets: (N,) classes to reach, or None when leaving the label is enough.
        region: bool (N, 1, H, W), the sites that may change.
        batch_size: images that go through the model at once.
        seed: of everything random.
        keys: (N,) of each image's random numbers.
        rows: (N,) which of the images that were given these are.
        forwards: of each image given, how many of it went through the model; counted as they do.
        backwards: likewise, gradients taken.
        whole: whether the region is every site of every image; what masks would do is then left out.
        aims: (N,) classes that objectives are told to aim at instead of `targets`; success is judged by the latter.
        prepared: the classifier's recording, where edits of one pixel go by windows.
        lead: another classifier, whose logits and gradients objectives are given; success is judged by `classifier`.
    """

    classifier: Classifier
    clean: Tensor
    labels: Tensor
    targets: Tensor | None
    region: Tensor
    batch_size: int
    seed: int
    keys: Tensor
    rows: Tensor
    n_forward: Tensor
    n_backward: Tensor
    whole: bool = False
    aims: Tensor | None = None
    prepared: Prepared | None = None
    lead: Classifier | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.clean, MEMO):
            setattr(self.clean, MEMO, {})

    def __len__(self) -> int:
        return len(self.clean)

    def select(self, chosen: Tensor) -> Problem:
        """The same problem for some of its images, by number or by a bool mask (N,)."""
        if chosen.dtype == torch.bool and bool(chosen.all()):
            return self
        targets, aims = (None if known is None else known[chosen] for known in (self.targets, self.aims))
        return replace(
            self,
            clean=self.clean[chosen],
            labels=self.labels[chosen],
            targets=targets,
            aims=aims,
            region=self.region[chosen],
            keys=self.keys[chosen],
            rows=self.rows[chosen],
        )

    def aiming(self, aims: Tensor) -> Problem:
        """The same problem, objectives aiming at these classes (N,); any success counts as before."""
        return replace(self, aims=aims)

    def fused_model(self) -> AbstractContextManager[None]:
        """The classifier in its fused form, for the search; the verification is done without."""
        return fused(self.classifier, self.clean[:1])

    def apply(self, perturbation: Tensor) -> Tensor:
        """The images with the perturbation inside the region, and their own bits outside it."""
        changed = (self.clean + perturbation).clamp_(0, 1)
        return changed if self.whole else torch.where(self.region, changed, self.clean)

    def project(self, budget: Budget, perturbation: Tensor) -> Tensor:
        """The perturbation brought inside budget, box and region."""
        if self.whole:
            return budget.project(perturbation, self.clean)
        wanted = torch.where(self.region, perturbation, 0)
        if "region" in inspect.signature(budget.project).parameters:
            return budget.project(wanted, self.clean, region=self.region)
        return torch.where(self.region, budget.project(wanted, self.clean), 0)

    def evaluate(self, images: Tensor, owners: Tensor | None = None) -> Tensor:
        """(M,) margins of images (M, C, H, W), below zero where they fool; `owners` (M,) says whose each is."""
        return self.logits(images, owners)[0]

    def standing_margins(self, images: Tensor, margins: Tensor, budget: Budget) -> Tensor:
        """(N,) margins that are below zero only where the images' 8-bit files, within the budget, fool too.

        An image that fools and whose file does not has margin zero: it stands, and is nearer than any that does not
        fool. Files are evaluated for images that fool only.
        """
        rows = (margins < 0).nonzero()[:, 0]
        if not len(rows):
            return margins
        part = self.select(rows)
        files, fits = stored(images[rows], part.clean, budget)
        found = part.evaluate(files)
        kept = torch.where(fits & (found < 0), torch.maximum(found, margins[rows]), 0)
        return margins.index_copy(0, rows, kept)

    def logits(self, images: Tensor, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Margins (M,) as `evaluate` gives, and logits (M, K)."""
        if owners is None:
            owners = torch.arange(len(self), device=images.device)
        margins, every = [], []
        with torch.no_grad():
            for part in torch.arange(len(images), device=images.device).split(self.batch_size):
                logits = self.classifier(images[part])
                margins.append(self.judge(logits, owners[part]))
                every.append(logits)
        return torch.cat(margins), torch.cat(every)

    def judge(self, logits: Tensor, owners: Tensor) -> Tensor:
        """(M,) margins of logits (M, K) of images that went through the model; `owners` (M,) says whose each is."""
        targets = None if self.targets is None else self.targets[owners]
        self._check(logits, self.labels[owners], targets)
        self.count_forwards(owners)
        return conservative_margin(logits, self.labels[owners], targets).to(self.clean)

    def loss_and_gradient(self, images: Tensor, loss: Loss = margin) -> LossGradient:
        """Margins, values and falling direction of the images (N, C, H, W), each in its own row."""
        found = []
        for part in torch.arange(len(images), device=images.device).split(self.batch_size):
            point = images[part].detach().requires_grad_()
            labels, targets = self.labels[part], None if self.targets is None else self.targets[part]
            with torch.set_grad_enabled(self.lead is None):
                logits = self.classifier(point)
            self._check(logits.detach(), labels, targets)
            led = logits if self.lead is None else self.lead(point)
            values = loss(led, labels, targets if self.aims is None else self.aims[part])
            check_values(values, len(part))
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(
                    values.sum(), point, allow_unused=True, materialize_grads=True
                )
            else:
                gradient = torch.zeros_like(point)
            direction = gradient.neg().contiguous()  # the fused form's gradient is channels last
            if not self.whole:
                direction = torch.where(self.region[part], direction, 0)
            margins = conservative_margin(logits.detach(), labels, targets)
            found.append((margins.to(self.clean), values.detach().to(self.clean), direction))
        everyone = torch.arange(len(self), device=images.device)
        self.count_forwards(everyone)
        self.count_backwards(everyone)
        return LossGradient(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def count_forwards(self, owners: Tensor) -> None:
        """Images of these went through the model: (M,) numbers of mine."""
        self.n_forward.index_add_(0, self.rows[owners], torch.ones_like(owners))

    def count_backwards(self, owners: Tensor) -> None:
        """Likewise, gradients."""
        self.n_backward.index_add_(0, self.rows[owners], torch.ones_like(owners))

    def _check(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> None:
        check_logits(logits, self.classifier, self.clean)
        for name, classes in (("labels", labels), ("targets", targets)):
            if classes is not None:
                check_classes(classes, len(logits), logits.shape[1], name=name)

    def result(self, adversarial: Tensor, budget: Budget | None = None) -> AttackResult:
        """Verify by fresh forward passes, of the images as they are and as 8-bit files hold them; both are counted.

        Args:
            adversarial: (N, C, H, W).
            budget: that the files must keep within; None where the attack has none.
        """
        files, fits = stored(adversarial, self.clean, budget)
        adversarial_class, adversarial_class_8bit = (
            predict(self.classifier, images, self.batch_size).argmax(1) for images in (adversarial, files)
        )
        self.n_forward.add_(2)
        success, success_8bit = (
            found != self.labels if self.targets is None else found == self.targets
            for found in (adversarial_class, adversarial_class_8bit)
        )
        return AttackResult(
            clean=self.clean,
            adversarial=adversarial,
            labels=self.labels,
            targets=adversarial_class if self.targets is None else self.targets,
            success=success,
            n_forward=self.n_forward,
            n_backward=self.n_backward,
            success_8bit=success_8bit & fits,
            seed=torch.full_like(self.labels, self.seed),
            **self._spent(adversarial, budget),
        )

    def _spent(self, adversarial: Tensor, budget: Budget | None) -> dict[str, Tensor]:
        """What the attack spent of an SSIM budget, under the name of its definition."""
        if not isinstance(budget, SSIM):
            return {}
        name = "ssim_local_budget_spent" if budget.mode == "local" else "ssim_budget_spent"
        return {name: budget.distance(adversarial - self.clean, self.clean)}


@contextmanager
def attack_context(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    region: Tensor | None,
    targets: Tensor | None,
    batch_size: int | None,
    seed: int = 0,
) -> Iterator[Problem]:
    """The checked problem while the model is in eval mode.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_seed(seed)
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
        check_batch_size(batch_size)
        region = region.to(device, copy=True).expand(count, -1, -1, -1)
        problem = Problem(
            classifier,
            clean,
            labels,
            targets,
            region,
            batch_size or measured_batch(classifier, clean),
            seed,
            _random.keys(clean, seed),
            torch.arange(count, device=device),
            torch.zeros_like(labels),
            torch.zeros_like(labels),
            whole=bool(region.all()),
        )
        try:
            yield problem
        finally:
            delattr(clean, MEMO)
