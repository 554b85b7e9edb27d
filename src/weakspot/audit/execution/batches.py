"""Batches whose results do not depend on what is in them, and their recovery from errors and from lack of memory."""

import errno
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from weakspot._checks import NotFiniteError, warn
from weakspot._errors import describe_error, first_line
from weakspot.audit.execution.job import Job
from weakspot.audit.execution.opened_images import Donors
from weakspot.classifier import Classifier
from weakspot.models.identity import Watch

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
# Errors of the machine; any other OSError comes from a model or an attack and concerns the image at hand.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
NOT_FINITE = "the model returned NaN or infinity"
T = TypeVar("T")
Parts = list[tuple[Tensor, T]]  # row numbers (n,) and the result for these rows
Errors = dict[int, str]  # row number -> why it failed


class FixedBatchClassifier(Classifier):
    """A classifier whose network always gets exactly `group` images, the last ones repeated to fill up.

    Kernels of convolutions and matrix products choose their order of summation by the number of images, and an attack
    turns a difference in the last bit into another perturbation. With a fixed number, an image has the same logits to
    the last bit whatever images it comes with. What remains is the image's place in the group (it decides the
    alignment in memory of rows with an odd number of features), which the division into groups preserves.

    Attributes:
        group: number of images per pass; may be halved if memory runs out, which can change the last bits.
        smallest_group: lower limit of `group`.
    """

    def __init__(self, classifier: Classifier, group: int) -> None:
        super().__init__(
            classifier.network,
            mean=classifier.mean.flatten().tolist(),
            std=classifier.std.flatten().tolist(),
            input_size=classifier.input_size,
            class_names=classifier.class_names,
            name=classifier.name,
        )
        self.channels = classifier.channels
        # A network without tensors does not say its device, and its normalization would be on the CPU.
        self.to(classifier.mean.device)
        # A network exported for one batch size accepts no other group.
        self.smallest_group = classifier.fixed_batch or 1
        self.group = classifier.fixed_batch or group

    @property
    def group(self) -> int:
        return self.fixed_batch or 1

    @group.setter
    def group(self, size: int) -> None:
        self.fixed_batch = size

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == self.group:
            return super().forward(images)
        # Bound here: `super()` without arguments does not work in a comprehension.
        forward = super().forward
        logits = [forward(part) for part in self.filled(images).split(self.group)]
        return torch.cat(logits)[: len(images)]


def bisect_failures(work: Callable[[Tensor], T], rows: Tensor, errors: Errors, description: str) -> Parts[T]:
    """Work on all rows or, if that fails, on either half, down to the images that fail alone.

    Args:
        work: takes row numbers (n,).
        rows: (N,) row numbers.
        errors: gets the reason for every row that fails.
        description: of the work, for the reasons.

    Returns:
        Row numbers and results, in order.

    Raises:
        MemoryError: or torch's own, as soon as memory runs out.
        OSError: if the machine fails (disk full, too many open files), for which no image is to blame.
    """
    if not len(rows):
        return []
    try:
        return [(rows, work(rows))]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in MACHINE_ERRORS):
            raise
        if len(rows) == 1:
            errors[int(rows[0])] = f"{description}: {sentence(error)}"
            return []
    # Outside the handler, so that the failed attempt's tensors are freed before the halves are tried.
    half = (len(rows) + 1) // 2
    # An image that fails costs about 2 log2(N) extra attempts; N - 1 good ones stay in large parts.
    first = bisect_failures(work, rows[:half], errors, description)
    return first + bisect_failures(work, rows[half:], errors, description)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory has run out, on any device."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in message for phrase in OUT_OF_MEMORY)
    )


def sentence(error: BaseException) -> str:
    """An exception as the records state it."""
    if isinstance(error, NotFiniteError):
        return NOT_FINITE
    return (
        first_line(error) if isinstance(error, ValueError) and str(error).strip() else describe_error(error)
    )


class AdaptiveBatches:
    """Splits work into batches of the size that memory allows; all images at once if it can.

    Args:
        classifier: whose groups fill a batch, and whose group is halved as a last resort; None if a batch may shrink
            to one image.
    """

    def __init__(self, classifier: FixedBatchClassifier | None) -> None:
        self.classifier = classifier
        self.size: int | None = None

    @property
    def group(self) -> int:
        """Number of images per pass through the model."""
        return 1 if self.classifier is None else self.classifier.group

    def each(self, work: Callable[[Tensor], T], rows: Tensor, errors: Errors, description: str) -> Parts[T]:
        """`bisect_failures` batch by batch; a batch that exhausts memory is repeated in halves.

        If memory does not even hold one image, that image gets an error and the sizes are restored: the image is
        probably to blame, not the memory.

        Raises:
            OSError: see `bisect_failures`.
        """
        parts: Parts[T] = []
        # Sizes learned from memory errors persist for later calls, unless one image alone was to blame.
        start, before, alone = 0, (self.size, self.group), False
        while start < len(rows):
            batch = rows[start : start + (self.size or len(rows))]
            # Errors of a batch that runs out of memory are dropped: its halves will report them again.
            own: Errors = {}
            try:
                parts += bisect_failures(work, batch, own, description)
            except BaseException as error:
                if not is_out_of_memory(error):
                    raise
                reason = f"{description}: {sentence(error)}"
            else:
                errors.update(own)
                start += len(batch)
                continue
            # Outside the handler: the traceback would keep the memory in use.
            if not self._shrink(len(batch)):
                alone = True
                if len(batch) == 1:
                    errors[int(batch[0])] = f"{reason} (with 1 image at a time)"
                    start += 1
                self.size = 1
        if alone:
            self.size = before[0]
            if self.classifier is not None:
                self.classifier.group = before[1]
        elif self.group < before[1]:
            warn(
                f"memory does not hold {before[1]} images at once; from now on {self.group} at a time go through the "
                "model, which can change the last digits",
                RuntimeWarning,
            )
        return parts

    def _shrink(self, count: int) -> bool:
        """Halve the batch, then the group; False if neither can be halved."""
        # Halves stay multiples of the group, so that every image keeps its place in its group.
        if count > self.group:
            self.size = max(self.group, count // 2 // self.group * self.group)
        elif self.classifier is not None and self.group > self.classifier.smallest_group:
            self.size = self.classifier.group = self.group // 2
        else:
            return False
        return True


class AuditModel:
    """The network of a job as its audit uses it, and what is known about memory.

    Attributes:
        classifier: as it was loaded; analyses look inside it.
        fixed: the same network for attacks.
        attack_batches: how many images are attacked at once.
        analysis_batches: how many are analyzed at once, or get their regions made.
        watch: notices if the network changes.
        donors: the other images of the run.
    """

    def __init__(self, job: Job) -> None:
        self.classifier = job.classifier
        self.fixed = FixedBatchClassifier(job.classifier, job.group)
        self.attack_batches = AdaptiveBatches(self.fixed)
        self.analysis_batches = AdaptiveBatches(None)
        self.watch = Watch(job.classifier)
        self.donors = Donors(job.listing, job.classifier, job.plan.seed)

    def predict(self, images: Tensor, errors: Errors) -> Tensor:
        """Logits (N, K), computed in groups; NaN for images on which the network raised, which get an error."""

        def predict_rows(rows: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat([self.fixed(images[part]) for part in rows.split(self.fixed.group)])

        everything = torch.arange(len(images), device=images.device)
        parts = self.attack_batches.each(
            predict_rows, everything, errors, f"a pass through {self.fixed.name}"
        )
        # If the network failed on everything, the number of classes comes from the probe.
        first = parts[0][1] if parts else torch.empty(0, max(2, self.watch.probe.logits.shape[1]))
        logits = first.new_full((len(images), first.shape[1]), torch.nan, device=images.device)
        for rows, part in parts:
            logits[rows] = part
        return logits
