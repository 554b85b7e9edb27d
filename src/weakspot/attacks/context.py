"""What all attacks share: their common arguments, the problem they search on, and the verified result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import (
    ModelWarning,
    check_budget,
    check_classes,
    check_region,
    check_seed,
    checked_batch_size,
    warn,
)
from weakspot._progress import Progress, ProgressOption, shown
from weakspot.attacks.eight_bit import stored
from weakspot.attacks.losses import Loss, check_values, conservative_margin, margin
from weakspot.attacks.observers import Observer, current_observer, notify
from weakspot.budgets import SSIM, Budget, Linf, PreparedBudget, prepare
from weakspot.classifier import Classifier, check_images, check_logits, evaluating, predict
from weakspot.edits import Crops, Prepared
from weakspot.fusion import fused, measured_batch
from weakspot.pairs import AttackResult
from weakspot.statistics.number_format import counted

DEFAULT_BUDGET = Linf(4 / 255)


@dataclass(frozen=True, eq=False)
class AttackOptions:
    """The arguments that attacks share, each of which takes those that apply to it, by these names.

    All attacks also take a `model`, any classifier of images in [0, 1], which they leave as it was; `images`
    (N, C, H, W) in [0, 1]; and `labels` (N,), the classes to leave. They return an `AttackResult`, raise ValueError if
    an argument does not fit, and warn with ModelWarning of train mode, of probabilities instead of logits and, if they
    descend along gradients, of zero gradients, and with ImageWarning of values outside [0, 1].

    Attributes:
        budget: how much may change. An attack that looks for the smallest change takes none.
        region: bool (N, 1, H, W) or (1, 1, H, W), the sites that may change; all sites if None. Pixels outside it are
            returned bit for bit.
        targets: (N,) classes to reach; if None, leaving the label is enough.
        seed: of everything random. Each image draws by seed and its own content, so that its result does not depend on
            other images.
        batch_size: images that go through the model at once; it bounds the memory and changes no result beyond
            rounding. If None, it is chosen by measuring.
        progress: True for a bar on standard error or in the notebook, or a function that is called with the fraction
            done, 0 to 1.
    """

    budget: Budget | None = None
    region: Tensor | None = None
    targets: Tensor | None = None
    seed: int = 0
    batch_size: int | None = None
    progress: ProgressOption = None


class LossGradient(NamedTuple):
    """A loss at some images, and how to lower it.

    Attributes:
        margins: (N,) below zero where the images fool the classifier.
        values: (N,) of the loss.
        direction: (N, C, H, W) minus its gradient, zero outside the region.
    """

    margins: Tensor
    values: Tensor
    direction: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """Images to fool a classifier on, with everything checked and on the model's device.

    An attack works on all images at once. Problem sends them through the model in batches and counts each.

    Attributes:
        classifier: in eval mode.
        clean: (N, C, H, W) in [0, 1].
        labels: (N,) classes to leave.
        targets: (N,) classes to reach, or None if leaving the label is enough.
        region: bool (N, 1, H, W), the sites that may change.
        batch_size: images that go through the model at once.
        seed: of everything random.
        keys: (N,) of each image's random numbers.
        rows: (N,) the numbers of these images among those given to the attack.
        n_forward: forward passes of each image given, counted as they happen.
        n_backward: gradients of each image given.
        budget: how much may change, or None.
        everywhere: whether the region is every site of every image; masks are then skipped.
        loss_targets: (N,) classes that losses aim at instead of `targets`; success is judged by `targets`.
        prepared: the classifier's recording, if edits of one pixel go by windows.
        lead: another classifier whose logits and gradients losses get; success is judged by `classifier`.
        crops: if not None, `clean` and `region` are these parts of whole images, and the rest of them is fixed.
        progress: called with the fraction done, 0 to 1.
        observer: sees every image that is evaluated, and may end the attack.
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
    budget: Budget | None = None
    everywhere: bool = False
    loss_targets: Tensor | None = None
    prepared: Prepared | None = None
    lead: Classifier | None = None
    crops: Crops | None = None
    progress: Progress | None = None
    observer: Observer | None = field(default_factory=current_observer)

    def __len__(self) -> int:
        return len(self.clean)

    def select(self, chosen: Tensor) -> Problem:
        """The same problem for some of its images, by number or by a bool mask (N,)."""
        if chosen.dtype == torch.bool and bool(chosen.all()):
            return self
        return replace(
            self,
            clean=self.clean[chosen],
            labels=self.labels[chosen],
            targets=None if self.targets is None else self.targets[chosen],
            loss_targets=None if self.loss_targets is None else self.loss_targets[chosen],
            region=self.region[chosen],
            keys=self.keys[chosen],
            rows=self.rows[chosen],
            crops=None if self.crops is None else self.crops.select(chosen),
        )

    def fused_model(self) -> AbstractContextManager[None]:
        """The classifier in its fused form, for the search. Verification does without."""
        return fused(self.classifier, self.clean[:1])

    @cached_property
    def ball(self) -> PreparedBudget:
        """The budget around the clean images."""
        if self.budget is None:
            raise ValueError("budget must be a budget such as Linf(4 / 255), got None")
        return prepare(self.budget, self.clean)

    def apply(self, perturbation: Tensor) -> Tensor:
        """The images with the perturbation inside the region, and their own bits outside it."""
        changed = (self.clean + perturbation).clamp_(0, 1)
        return changed if self.everywhere else torch.where(self.region, changed, self.clean)

    def project(self, perturbation: Tensor) -> Tensor:
        """The perturbation brought inside budget, box and region."""
        return self.ball.project(perturbation, None if self.everywhere else self.region)

    def evaluate(self, images: Tensor, owners: Tensor | None = None) -> Tensor:
        """(M,) margins of images (M, C, H, W), below zero where they fool; `owners` (M,) numbers their clean images."""
        return self.logits(images, owners)[0]

    def logits(self, images: Tensor, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Margins (M,) as from `evaluate`, and logits (M, K)."""
        if owners is None:
            owners = torch.arange(len(self), device=images.device)
        margins, batches = [], []
        with torch.no_grad():
            for part in torch.arange(len(images), device=images.device).split(self.batch_size):
                logits = self._logits(images[part], owners[part])
                margins.append(self.margins(logits, owners[part]))
                batches.append(logits)
                notify(self.observer, images[part], owners[part], margins[-1], self.rows, self.crops)
        return torch.cat(margins), torch.cat(batches)

    def _logits(self, images: Tensor, owners: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images) if self.crops is None else self.crops.logits(images, owners)
        return logits

    def margins(self, logits: Tensor, owners: Tensor) -> Tensor:
        """(M,) margins of logits (M, K), whose forward passes are counted; `owners` (M,) numbers their clean images."""
        targets = None if self.targets is None else self.targets[owners]
        self._check(logits, self.labels[owners], targets)
        self.count_forwards(owners)
        return conservative_margin(logits, self.labels[owners], targets).to(self.clean)

    def file_margins(self, images: Tensor, margins: Tensor) -> Tensor:
        """(N,) margins that are below zero only if the image's 8-bit file, within the budget, fools as well.

        An image that fools but whose file does not gets margin zero: it is not adversarial yet, but nearer to it than
        any image that does not fool. Only files of images that fool are evaluated.
        """
        rows = (margins < 0).nonzero()[:, 0]
        if not len(rows):
            return margins
        part = self.select(rows)
        files, fits = stored(images[rows], part.clean, self.budget)
        of_files = part.evaluate(files)
        # Image and file must both fool: the larger of the two margins counts.
        both = torch.where(fits & (of_files < 0), torch.maximum(of_files, margins[rows]), 0)
        return margins.index_copy(0, rows, both)

    def loss_and_gradient(self, images: Tensor, loss: Loss = margin) -> LossGradient:
        """Margins, loss and descent direction of the images (N, C, H, W), each in its own row."""
        batches = []
        for part in torch.arange(len(images), device=images.device).split(self.batch_size):
            point = images[part].detach().requires_grad_()
            labels, targets = self.labels[part], None if self.targets is None else self.targets[part]
            # With a lead, the classifier only judges: its gradients are not needed.
            with torch.set_grad_enabled(self.lead is None):
                logits = self._logits(point, part)
            self._check(logits.detach(), labels, targets)
            led = logits if self.lead is None else self.lead(point)
            values = loss(led, labels, targets if self.loss_targets is None else self.loss_targets[part])
            check_values(values, len(part))
            if values.requires_grad:
                # The sum over images has each image's own gradient in its row.
                (gradient,) = torch.autograd.grad(
                    values.sum(), point, allow_unused=True, materialize_grads=True
                )
            else:  # a network that detaches its input
                gradient = torch.zeros_like(point)
            direction = gradient.neg().contiguous()  # the fused form's gradient is channels last
            if not self.everywhere:
                direction = torch.where(self.region[part], direction, 0)
            margins = conservative_margin(logits.detach(), labels, targets)
            batches.append((margins.to(self.clean), values.detach().to(self.clean), direction))
            notify(self.observer, point.detach(), part, margins, self.rows, self.crops)
        every = torch.arange(len(self), device=images.device)
        self.count_forwards(every)
        self.count_backwards(every)
        return LossGradient(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    def count_forwards(self, owners: Tensor) -> None:
        """Count a forward pass of each of these images, (M,) numbers within this problem."""
        self.n_forward.index_add_(0, self.rows[owners], torch.ones_like(owners))

    def count_backwards(self, owners: Tensor) -> None:
        """Count a gradient of each of these images."""
        self.n_backward.index_add_(0, self.rows[owners], torch.ones_like(owners))

    def warn_of_zero_gradients(self, direction: Tensor) -> None:
        """Warn about images whose gradient is zero in the whole region, on which a gradient attack is meaningless."""
        flat = (direction == 0).flatten(1).all(1) & self.region.flatten(1).any(1)
        if bool(flat.any()):
            place = "everywhere" if self.everywhere else "everywhere in the region"
            where = f"zero {place} for {int(flat.sum())} of {counted(len(flat))}"
            why = "a gradient attack cannot judge it (masked or saturated gradients)"
            warn(f"the gradient of {self.classifier.name} is {where}: {why}", ModelWarning)

    def _check(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> None:
        check_logits(logits, self.classifier, self.clean)
        check_classes(labels, len(logits), logits.shape[1])
        if targets is not None:
            check_classes(targets, len(logits), logits.shape[1], name="targets")

    def result(self, adversarial: Tensor) -> AttackResult:
        """Verify images (N, C, H, W) by fresh forward passes, as they are and as 8-bit files within the budget."""
        files, fits = stored(adversarial, self.clean, self.budget)
        adversarial_class, file_class = (
            predict(self.classifier, images, self.batch_size).argmax(1) for images in (adversarial, files)
        )
        self.n_forward.add_(2)  # one as it is, one as a file
        success, file_success = (
            classes != self.labels if self.targets is None else classes == self.targets
            for classes in (adversarial_class, file_class)
        )
        result = AttackResult(
            clean=self.clean,
            adversarial=adversarial,
            labels=self.labels,
            targets=adversarial_class if self.targets is None else self.targets,
            success=success,
            n_forward=self.n_forward,
            n_backward=self.n_backward,
            success_8bit=file_success & fits,
            seed=torch.full_like(self.labels, self.seed),
        )
        if not isinstance(self.budget, SSIM):
            return result
        spent = self.ball.distance(adversarial - self.clean)
        if self.budget.mode == "local":
            return replace(result, ssim_local_budget_spent=spent)
        return replace(result, ssim_budget_spent=spent)


@contextmanager
def attack_context(
    model: nn.Module, images: Tensor, labels: Tensor, options: AttackOptions | None = None
) -> Iterator[Problem]:
    """Check all arguments and hold the model in eval mode.

    Raises:
        ValueError: if an argument does not fit, naming it.
    """
    options = options or AttackOptions()
    check_seed(options.seed)
    if options.budget is not None:
        check_budget(options.budget)
    count = len(images) if isinstance(images, Tensor) else 0  # `check_images` refuses what is no tensor
    with (
        evaluating(model) as classifier,
        shown(options.progress, "attacking", total=count, counted=False) as progress,
    ):
        clean = check_images(images, classifier)
        count, device = len(clean), clean.device
        check_classes(labels, count)
        # Copies, because tensors made in inference mode cannot take part in gradients.
        labels = labels.to(device, torch.long, copy=True)
        targets = options.targets
        if targets is not None:
            check_classes(targets, count, name="targets")
            targets = targets.to(device, torch.long, copy=True)
            same = (targets == labels).nonzero()[:, 0].tolist()
            if same:
                raise ValueError(
                    f"targets must differ from labels, got {int(labels[same[0]])} for both of image {same[0]}"
                )
        region = options.region
        if region is None:
            region = torch.ones(1, 1, *clean.shape[2:], dtype=torch.bool)
        check_region(region, clean)
        batch_size = checked_batch_size(options.batch_size)
        yield Problem(
            classifier,
            clean,
            labels,
            targets,
            region=region.to(device, copy=True).expand(count, -1, -1, -1),
            batch_size=batch_size or measured_batch(classifier, clean),
            seed=options.seed,
            keys=_random.keys(clean, options.seed),
            rows=torch.arange(count, device=device),
            n_forward=torch.zeros_like(labels),
            n_backward=torch.zeros_like(labels),
            budget=options.budget,
            everywhere=bool(region.all()),
            progress=progress,
        )
