"""The job of an audit: its plan, network and images, resolved once; how the work is divided; what of it is done.

Images are stored in shards, and a shard is worked on in groups: one group under one attack in one region is what a
crash can lose. The size of a group is also the number of images per pass through the network, and kernels round
differently for other numbers. So it follows from an estimate of the cost and not from the clock, and run.json keeps it.

Order of writes: groups to unfinished/ every few seconds; once a shard has all its groups its maps, then its records,
whose existence implies the maps; then its unfinished files are removed. Each write is atomic and durable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from weakspot.attacks import find_attack
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.image_list import Entry, entries
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.maps import MapWriter
from weakspot.audit.store.records import count_rows, shard_files, write_shard
from weakspot.audit.store.run_info import RunInfo
from weakspot.audit.store.stores import LocalStore
from weakspot.audit.store.unfinished import GroupKey, GroupResult, merged, write_unfinished
from weakspot.classifier import Classifier, default_batch, evaluating

if TYPE_CHECKING:
    import pyarrow as pa

Backlog = Mapping[int, Sequence[GroupKey]]  # number of a shard -> its groups that are not computed yet
SAVE_EVERY = 5.0  # seconds between writes to unfinished/, beside the seconds that a group takes
SHARD_IMAGES = (16, 128)  # fewer cost more overhead; more have maps that do not fit in memory
SHARD_PIXELS = 32 * 128 * 128  # of the images of a shard
LARGEST_GROUP = 16  # larger ones are no faster on CPUs and waste more of the last, partly filled group
GROUP_FLOPS = 1e11  # of a group under one attack: 10 s on a CPU that does 10 GFLOP per second
# The product of these settings is a number of passes.
COUNTS = ("steps", "restarts", "generations", "population")
USUAL_PASSES = 100  # of an attack with none of these settings
BACKWARD = 3  # a pass forward and backward costs as much as three forward
ANALYSIS_PIXELS = 1024  # an analysis edits an image in cells: one pass for so many pixels


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that an audit needs to compute groups; what it has computed is elsewhere.

    Attributes:
        plan: resolved, with the sizes of shards and groups.
        classifier: as it was loaded in this process.
        listing: all images.
        shard: number of images of a shard.
        group: number of images of a group, and per pass through the network.
    """

    plan: Plan
    classifier: Classifier
    listing: pa.Table
    shard: int
    group: int

    @classmethod
    def of(cls, plan: Plan, classifier: Classifier, listing: pa.Table) -> Job:
        """The job of a plan that may leave the sizes open."""
        shard = plan.shard or default_shard(classifier)
        # A network that was exported for one number of images takes no other, whatever the plan says.
        group = classifier.fixed_batch or plan.group or affordable_group(plan, classifier)
        return cls(replace(plan, shard=shard, group=group), classifier, listing, shard, group)

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        # Rounded up, because the last shard may be partly filled.
        return range(-(-len(self.listing) // self.shard))

    @property
    def attacks(self) -> int:
        """Number of attacks on single images: images x attacks x regions."""
        return len(self.listing) * len(self.plan.cells)

    def size(self, number: int) -> int:
        """The number of images of one shard."""
        return min(self.shard, len(self.listing) - number * self.shard)

    def shape(self, number: int) -> tuple[int, int, int]:
        """Numbers of images, attacks and regions of one shard."""
        return self.size(number), len(self.plan.attacks), len(self.plan.regions)

    def groups(self, number: int) -> list[GroupKey]:
        """The groups of one shard, in the order in which they are computed."""
        size, attacks, regions = self.shape(number)
        starts = range(0, size, self.group)
        return [GroupKey(number, *key) for key in product(starts, range(attacks), range(regions))]

    def entries(self, number: int, start: int = 0, count: int | None = None) -> list[Entry]:
        """Images of one shard, by default all."""
        stop = self.size(number) if count is None else min(start + count, self.size(number))
        return entries(self.listing, number * self.shard + start, stop - start)

    def entries_of(self, key: GroupKey) -> list[Entry]:
        """The images of one group."""
        return self.entries(key.shard, key.start, self.group)


def default_shard(classifier: Classifier) -> int:
    """The number of images that are stored together, unless a plan states another."""
    height, width = classifier.input_size
    return max(SHARD_IMAGES[0], min(SHARD_IMAGES[1], SHARD_PIXELS // (height * width)))


def default_group(classifier: Classifier) -> int:
    """The largest number of images per pass that is worthwhile."""
    image = torch.empty(1, 1, *classifier.input_size, device="meta")
    return min(LARGEST_GROUP, default_batch(image))


def affordable_group(plan: Plan, classifier: Classifier) -> int:
    """The number of images whose most expensive attack, with its analyses, takes seconds even on a slow CPU.

    At least one: an attack on a single image is never divided.
    """
    largest = default_group(classifier)
    if classifier.mean.device.type != "cpu":
        return largest
    pixels = math.prod(classifier.input_size)
    passes = max(estimated_passes(attack) for attack in plan.attacks)
    passes += len(plan.analyses) * pixels // ANALYSIS_PIXELS
    affordable = int(GROUP_FLOPS / max(1.0, passes * BACKWARD * forward_flops(classifier)))
    # A power of two, so that shards consist of whole groups.
    return 1 << (max(1, min(largest, affordable)).bit_length() - 1)


def estimated_passes(attack: AttackPlan) -> int:
    """About how many passes through the network the attack needs for an image."""
    described = find_attack(attack.name)
    settings = {name: one.default for name, one in described.parameters.items()} | dict(attack.settings)
    counts = [value for name in COUNTS if isinstance(value := settings.get(name), int)]
    if not counts:
        return USUAL_PASSES if described.open_ended else 1
    return max(1, math.prod(counts))


def forward_flops(classifier: Classifier) -> float:
    """Floating-point operations of the matrix products and convolutions of one image's forward pass."""
    gray = torch.full((1, classifier.channels, *classifier.input_size), 0.5, device=classifier.mean.device)
    count = _FlopCount()
    # With gradients, as attacks need them: otherwise transformers run fused layers that are not counted.
    with evaluating(classifier), count:
        classifier(gray.requires_grad_())
    return count.flops


class _FlopCount(TorchDispatchMode):
    """Counts operations of this thread alone, without hooks on the network."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class Ledger:
    """Stores results as they arrive. On leaving the block, everything that arrived is on the disk.

    Args:
        store: of the run.
        job: of the audit.
        info: content of run.json.
        kept: results of groups that an earlier session has stored.

    Attributes:
        info: as the last write left it.
        unread: (name, reason) of the images of shards that are not stored, because all of their images are missing.
        done: number of attacks done: images x attacks x regions, of files that could not be read as well.
        saved: number of attacks whose records are on the disk.
    """

    def __init__(self, store: LocalStore, job: Job, info: RunInfo, kept: Sequence[GroupResult] = ()) -> None:
        self.store, self.job, self.info = store, job, info
        existing = shard_files(store.folder)
        self.results: dict[int, dict[GroupKey, GroupResult]] = {
            number: {} for number in job.shards if number not in existing
        }
        for result in kept:
            self.results[result.key.shard][result.key] = result
        self.unsaved: list[GroupResult] = []
        self.unread: list[tuple[str, str]] = []
        self.done = sum(job.size(number) for number in existing) * len(job.plan.cells)
        self.done += sum(len(result.images.contents) for result in kept)
        self.saved = count_rows(existing.values()) + sum(len(result.rows) for result in kept)
        self.saved_at = time.monotonic()
        self.written: Future[None] | None = None
        self.maps: MapWriter | None = None
        if job.plan.maps:
            labels = [attack.label for attack in job.plan.attacks]
            self.maps = MapWriter(store.folder, len(job.listing), labels, job.plan.regions, job.shard)

    @property
    def backlog(self) -> Backlog:
        """The groups that are left to compute, shard by shard."""
        left = {
            number: [key for key in self.job.groups(number) if key not in results]
            for number, results in self.results.items()
        }
        return {number: keys for number, keys in left.items() if keys}

    def add(self, result: GroupResult) -> None:
        """Store a result soon; raises OSError if an earlier one could not be stored."""
        self.results[result.key.shard][result.key] = result
        self.unsaved.append(result)
        self.done += len(result.images.contents)
        self._store_complete(result.key.shard)
        if time.monotonic() - self.saved_at >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Store the results that are not on the disk yet."""
        waiting, self.unsaved = self.unsaved, []
        for number in {result.key.shard for result in waiting}:
            results = [result for result in waiting if result.key.shard == number]
            # A file for each shard, because it is removed as soon as its shard is stored.
            self._submit(partial(self._write_unfinished, results))
        self.saved_at = time.monotonic()

    def _store_complete(self, number: int) -> None:
        if len(self.results[number]) == len(self.job.groups(number)):
            results = self.results.pop(number)
            new = [result for result in self.unsaved if result.key.shard == number]
            self.unsaved = [result for result in self.unsaved if result.key.shard != number]
            # Rows in unfinished files have been counted as saved already.
            rows = sum(len(result.rows) for result in new)
            self._submit(partial(self._write_shard, number, list(results.values()), rows))

    def _submit(self, write: Callable[[], None]) -> None:
        # One write at a time: what waits is in memory.
        if self.written is not None:
            self.written.result()
        self.written = self.writer.submit(write)

    def _write_unfinished(self, results: list[GroupResult]) -> None:
        self.store.add_unfinished(write_unfinished(self.store.folder, results))
        self.saved += sum(len(result.rows) for result in results)

    def _write_shard(self, number: int, results: list[GroupResult], rows: int) -> None:
        shard = merged(results, self.job.shape(number))
        # Without a file the shard counts as missing, so that the next session tries it again.
        if shard.note.missing and not shard.note.read:
            self.unread += shard.note.missing
            return
        # A remark is on the disk before the shard that it concerns: a crash in between cannot lose it.
        remarks = [remark for result in results for remark in result.remarks]
        if set(remarks) - set(self.info.remarks):
            self.info = self.info.with_remarks(remarks)
            self.info.write(self.store.folder)
        files = {} if self.maps is None else self.maps.write(number, shard.maps)
        self.store.add(write_shard(self.store.folder, number, shard.rows, replace(shard.note, maps=files)))
        self.saved += rows
        # Last: until the shard is stored, these files are all that a crash would leave of it.
        self.store.drop_unfinished({number})

    def __enter__(self) -> Ledger:
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="weakspot-writer")
        # A session may have ended between the last group of a shard and the shard.
        for number in list(self.results):
            self._store_complete(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Waits for the write that is under way, even after an error.
        with self.writer:
            # After an error of the disk, what could not be written is computed again.
            if not isinstance(error, OSError):
                self.save()
                if self.written is not None:
                    self.written.result()
