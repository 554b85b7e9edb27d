"""Steady batches: an image's logits are the same to the last bit, whatever images it comes with.

The kernels of a convolution or a matrix product choose their order of summation by the number of images; an attack
then follows the last bit to another perturbation. So every pass goes in groups of one size. What is left is the place
in the group, which tells where rows of an odd number of features begin in memory; shards and lots keep it.

Isolation: work on many images of which some fail, or for which memory is too small, done by halves.

Machine: the network as an audit uses it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from weakspot._checks import NotFiniteError, describe_error, warn
from weakspot.audit.plan.plan import Plan
from weakspot.audit.work.donors import Donors
from weakspot.classifier import Classifier, default_batch
from weakspot.models.probe import Watch

if TYPE_CHECKING:
    import pyarrow as pa


LARGEST_GROUP = 16  # on CPUs as fast as larger ones; more would fill up more of the last group of a batch


class FixedBatchClassifier(Classifier):
    """A classifier whose network is given exactly `group` images at a time, the last of them repeated to fill up.

    Attributes:
        group: how many; may be halved where memory runs out, at the price of the last bits.
        smallest_group: what it cannot be made smaller than.
    """

    def __init__(self, classifier: Classifier, group: int | None = None) -> None:
        super().__init__(
            classifier.network,
            mean=classifier.mean.flatten().tolist(),
            std=classifier.std.flatten().tolist(),
            input_size=classifier.input_size,
            class_names=classifier.class_names,
            name=classifier.name,
        )
        self.channels = classifier.channels
        self.to(classifier.mean.device)
        self.smallest_group = classifier.fixed_batch or 1
        self.group = classifier.fixed_batch or group or usual_group(classifier)

    @property
    def group(self) -> int:
        return self.fixed_batch or 1

    @group.setter
    def group(self, size: int) -> None:
        self.fixed_batch = size

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == self.group:
            return super().forward(images)
        parts = [
            super(FixedBatchClassifier, self).forward(part) for part in self.filled(images).split(self.group)
        ]
        return torch.cat(parts)[: len(images)]


def usual_group(classifier: Classifier) -> int:
    """How many images of the classifier's size go through it at once, unless a plan says otherwise."""
    image = torch.empty(1, 1, *classifier.input_size, device="meta")
    return min(LARGEST_GROUP, default_batch(image))


T = TypeVar("T")
Found = list[tuple[Tensor, T]]
MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
# What the machine says of itself; any other OSError is a model's or an attack's own, about the image at hand.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
NOT_FINITE = "the model returned NaN or infinity"


def bisect_failures(
    work: Callable[[Tensor], T], rows: Tensor, troubles: dict[int, str], what: str
) -> Found[T]:
    """`work` on all rows, or where that fails on either half, down to the images that fail alone.

    Args:
        work: takes row numbers (n,).
        rows: (N,) row numbers.
        troubles: the row numbers that fail are entered here, each with the reason.
        what: the work in words.

    Returns:
        Row numbers and what came out of them, in order.

    Raises:
        MemoryError: or torch's own, as soon as memory runs out.
        OSError: if the machine fails (disk full, too many open files), which is no image's fault.
    """
    if not len(rows):
        return []
    try:
        return [(rows, work(rows))]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if out_of_memory(error) or (isinstance(error, OSError) and error.errno in MACHINE):
            raise
        if len(rows) == 1:
            troubles[int(rows[0])] = f"{what}: {sentence(error)}"
            return []
    half = (len(rows) + 1) // 2
    return bisect_failures(work, rows[:half], troubles, what) + bisect_failures(
        work, rows[half:], troubles, what
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory has run out, of whatever device."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in MEMORY)
    )


def sentence(error: BaseException) -> str:
    """What a row says of an error."""
    if isinstance(error, NotFiniteError):
        return NOT_FINITE
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, ValueError) and first else describe_error(error)


class AdaptiveBatches:
    """How many images are worked on at once: as many as were asked for, or as memory allows.

    Args:
        batch_size: as many as were asked for; None for a whole shard.
        classifier: what goes in groups and may have its group halved at last, or None where lots go down to one image.
    """

    def __init__(self, batch_size: int | None, classifier: FixedBatchClassifier | None) -> None:
        self.classifier = classifier
        self.size = None if batch_size is None else -(-batch_size // self.group) * self.group

    @property
    def group(self) -> int:
        """How many images go through the model at once."""
        return 1 if self.classifier is None else self.classifier.group

    def each(
        self, work: Callable[[Tensor], T], rows: Tensor, troubles: dict[int, str], what: str
    ) -> Found[T]:
        """`isolated` work, lot by lot; a lot for which memory runs out is done again in halves.

        An image for which memory runs out even alone is entered among the troubles, and the sizes are put back: it is
        probably the image, not the memory.

        Raises:
            OSError: as `isolated`.
        """
        found: Found[T] = []
        start, before, alone = 0, (self.size, self.group), False
        while start < len(rows):
            lot = rows[start : start + (self.size or len(rows))]
            fresh: dict[int, str] = {}
            try:
                found += bisect_failures(work, lot, fresh, what)
            except BaseException as error:
                if not out_of_memory(error):
                    raise
                said = f"{what}: {sentence(error)}"
            else:
                troubles.update(fresh)
                start += len(lot)
                continue
            # Outside the handler, whose traceback keeps the memory in use.
            if not self._shrink(len(lot)):
                alone = True
                if len(lot) == 1:
                    troubles[int(lot[0])] = f"{said} (with 1 image at a time)"
                    start += 1
                self.size = 1
        if alone:
            self.size = before[0]
            if self.classifier is not None:
                self.classifier.group = before[1]
        elif self.group < before[1]:
            warn(
                f"memory does not hold {before[1]} images at once; they go through the model {self.group} at a time "
                "from here on, which can change last digits",
                RuntimeWarning,
            )
        return found

    def _shrink(self, count: int) -> bool:
        """Halve what is worked on at once; False if that is as small as can be."""
        if count > self.group:
            self.size = max(self.group, count // 2 // self.group * self.group)
        elif self.classifier is not None and self.group > self.classifier.smallest_group:
            self.size = self.classifier.group = self.group // 2
        else:
            return False
        return True


@dataclass(eq=False)
class AuditModel:
    """The network as an audit uses it, and what it has learned about its memory.

    Attributes:
        classifier: as it was loaded; analyses look inside it.
        steady: the same network for attacks.
        lots: how many images are attacked at once.
        pairs: how many are explained at once, or have their regions found.
        watch: whether the network is still what it was.
        donors: the other images of the run.
    """

    classifier: Classifier
    steady: FixedBatchClassifier
    lots: AdaptiveBatches
    pairs: AdaptiveBatches
    watch: Watch
    donors: Donors

    @classmethod
    def of(
        cls, classifier: Classifier, plan: Plan, listing: pa.Table, batch_size: int | None = None
    ) -> AuditModel:
        """For a plan; without a batch size all images of a shard are attacked at once, fewer when memory runs out."""
        steady = FixedBatchClassifier(classifier, plan.group)
        donors = Donors(listing, classifier, plan.seed)
        return cls(
            classifier,
            steady,
            AdaptiveBatches(batch_size, steady),
            AdaptiveBatches(None, None),
            Watch(classifier),
            donors,
        )

    def predict(self, images: Tensor, troubles: dict[int, str]) -> Tensor:
        """Logits (N, K), in groups; NaN as they come, and where the network raised, which is entered as a trouble."""

        def go(mine: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat([self.steady(images[part]) for part in mine.split(self.steady.group)])

        rows = torch.arange(len(images), device=images.device)
        found = self.lots.each(go, rows, troubles, f"a pass through {self.steady.name}")
        known = found[0][1] if found else torch.empty(0, max(2, self.watch.probe.logits.shape[1]))
        logits = known.new_full((len(images), known.shape[1]), torch.nan, device=images.device)
        for mine, own in found:
            logits[mine] = own
        return logits
