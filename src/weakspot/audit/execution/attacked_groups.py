"""One shard of images under every attack in every region: a function of the plan and the images alone.

It writes nothing and knows no other shard, so that any engine may call it.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import quiet, warn
from weakspot.attacks import AttackOptions, find_attack
from weakspot.attacks.eight_bit import stored
from weakspot.audit.execution.batches import NOT_FINITE, AuditModel, Errors, Parts
from weakspot.audit.execution.cell_results import CellResult, CleanImages, add_maps, cell_rows
from weakspot.audit.execution.opened_images import ShardImages, open_entries
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.image_list import Entry
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.maps import BlockBuilder, MapBlock
from weakspot.audit.store.records import no_rows
from weakspot.classifier import evaluating
from weakspot.explanations import Explanation, explain
from weakspot.models.probe import fixed_images
from weakspot.pairs import AttackResult
from weakspot.regions import read_region

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class ShardResult:
    """The outcome of one shard.

    Attributes:
        rows: one per image that could be read x attack x region.
        maps: of all images of the shard, including those that could not be read.
        skipped: (name, reason) of files that are no pictures.
        missing: (name, reason) of unavailable files; the shard is computed again once they are back.
        contents: digests of all images of the shard, in order; None for those that were not read.
        read: number of images that could be read.
        seconds: wall time.
        remarks: about the model so far.
    """

    rows: pd.DataFrame
    maps: Mapping[str, MapBlock]
    skipped: Sequence[tuple[str, str]]
    missing: Sequence[tuple[str, str]]
    contents: Sequence[str | None]
    read: int
    seconds: float
    remarks: Sequence[str] = ()


def audit_shard(
    model: AuditModel, plan: Plan, entries: Sequence[Entry], progress: Progress | None = None
) -> ShardResult:
    """Attack the images in every way of the plan and explain every pair.

    Rows and maps depend on plan and images alone: not on the batch size, nor on other shards. If something fails on one
    image (a network that returns NaN or raises), its row states the error, and the other images are not affected.

    Args:
        model: the network.
        plan: resolved.
        entries: of one shard.
        progress: called with the fraction done.

    Raises:
        ValueError: if an attack or an analysis fails on all images and on neutral ones, too.
    """
    import pandas as pd

    started = time.perf_counter()
    opened = open_entries(entries, model.classifier)
    if not opened.entries:
        seconds = time.perf_counter() - started
        return ShardResult(no_rows(), {}, opened.skipped, opened.missing, opened.digests, 0, seconds)
    builder = BlockBuilder(len(entries), len(plan.attacks), len(plan.regions)) if plan.maps else None
    with evaluating(model.fixed):  # once, so that a warning about train mode comes once
        shard = _Shard(model, plan, opened, [entry.index - entries[0].index for entry in opened.entries])
        frames = shard.run(builder, progress or (lambda _: None))
    rows = pd.concat(frames, ignore_index=True)
    # By image, then by cell: the last key of lexsort is the first to sort by.
    order = np.lexsort((np.repeat(np.arange(len(frames)), len(opened.entries)), rows["index"].to_numpy()))
    return ShardResult(
        rows.iloc[order].reset_index(drop=True),
        {} if builder is None else builder.blocks,
        opened.skipped,
        [*opened.missing, *shard.missing],
        opened.digests,
        len(opened.entries),
        time.perf_counter() - started,
        model.watch.remarks(),
    )


class _Shard:
    """The images of one shard, and the work on them."""

    def __init__(self, model: AuditModel, plan: Plan, opened: ShardImages, places: Sequence[int]) -> None:
        self.model, self.plan, self.places = model, plan, places
        images = opened.images.to(model.fixed.mean.device)
        self.errors: Errors = {}
        self.missing: list[tuple[str, str]] = []  # images that were attacked without one of their controls
        logits = model.predict(images, self.errors)
        # A label of -1 is replaced by the model's own prediction.
        given = torch.tensor([entry.label for entry in opened.entries], device=images.device)
        labels = torch.where(given >= 0, given, logits.argmax(1))
        self.clean = CleanImages(opened, images, labels, logits)
        for row in (~self.clean.finite).nonzero()[:, 0].tolist():
            self.errors.setdefault(row, f"{NOT_FINITE} for the clean image")

    def run(self, builder: BlockBuilder | None, progress: Progress) -> list[pd.DataFrame]:
        """The rows of every cell; adds the maps to the builder."""
        if builder is not None:
            pictures = self.clean.images.cpu().numpy()
            builder.add_pictures("clean", self.places, pictures, {"title": "Clean image"})
        # Regions depend on the clean image alone, so all attacks share them.
        regions = {text: self._region(text) for text in self.plan.reported_regions}
        donated = [str(spec.control_of) for spec in self.plan.specs.values() if spec.donor is not None]
        # The controlled region may itself be absent from the plan; it is made for its area then.
        for text in dict.fromkeys(donated):
            regions.update(self._donated_regions(text, regions.get(text) or self._region(text)))
        frames: list[pd.DataFrame] = []
        cells = len(self.plan.attacks) * len(self.plan.regions)
        for a, attack in enumerate(self.plan.attacks):
            for r, text in enumerate(self.plan.regions):
                start = len(frames)

                def advance(fraction: float, start: int = start) -> None:
                    progress((start + fraction) / cells)

                result = self._cell(attack, text, *regions[text], advance)
                if builder is not None:
                    add_maps(builder, (a, r), [self.places[row] for row in result.rows.tolist()], result)
                frames.append(cell_rows(self.clean, self.model.classifier, result))
                advance(1.0)
        return frames

    def _region(self, text: str) -> tuple[Tensor, Errors]:
        """Bool (N, 1, H, W) of the images that the model classifies, and the errors of the others."""
        region = torch.zeros_like(self.clean.images[:, :1], dtype=torch.bool)
        # A region needs a prediction: images on which the model failed keep their error.
        errors, rows = dict(self.errors), self.clean.finite.nonzero()[:, 0]
        for part, made in self._made(text, self.clean.images, self.clean.labels, rows, errors):
            region[part] = made
        return region, errors

    def _made(self, text: str, images: Tensor, labels: Tensor, rows: Tensor, errors: Errors) -> Parts[Tensor]:
        """The region of that text on these rows of images."""

        def make(part: Tensor) -> Tensor:
            with _without_numbers():
                return self._read_region(text, images[part], labels[part])

        return self.model.analysis_batches.each(make, rows, errors, f"region {text}")

    def _read_region(self, text: str, images: Tensor, labels: Tensor) -> Tensor:
        plan = self.plan
        return read_region(
            text, self.model.classifier, images, labels, fraction=plan.fraction, seed=plan.seed
        )

    def _donated_regions(self, text: str, own: tuple[Tensor, Errors]) -> dict[str, tuple[Tensor, Errors]]:
        """The result of `_region` for every control that is this region as made on other images."""
        controls = {
            control: (spec.donor, torch.zeros_like(own[0]), dict(own[1]))
            for control, spec in self.plan.specs.items()
            if spec.donor is not None and str(spec.control_of) == text
        }
        # Draws are nested: the first of five donors is the first of two, so fewer controls are a subset.
        count = max(number for number, _, _ in controls.values())
        make = self._donor_region(text)
        for row, content in enumerate(self.clean.opened.contents):
            if row in own[1]:
                continue
            regions, missing = self.model.donors.regions(text, make, content, own[0][row], count)
            if missing:
                reason = f"its controls need an image that is missing ({missing[0]})"
                self.missing.append((self.clean.opened.entries[row].name, reason))
            for number, region, errors in controls.values():
                if number <= len(regions):
                    region[row] = regions[number - 1]
                else:
                    errors[row] = f"fewer than {number} other images have a region {text} of similar area"
        return {control: (region, errors) for control, (_, region, errors) in controls.items()}

    def _donor_region(self, text: str) -> Callable[[ShardImages], Tensor | None]:
        """Makes the region of that text on one other image; None if the model or the region fails on it."""

        def make(opened: ShardImages) -> Tensor | None:
            images = opened.images.to(self.clean.images.device)
            logits = self.model.predict(images, {})
            if not bool(logits.isfinite().all()):
                return None
            label = opened.entries[0].label
            labels = torch.tensor([label if label >= 0 else int(logits.argmax())], device=images.device)
            with quiet():  # its warnings are raised when the image itself is attacked
                parts = self._made(text, images, labels, torch.zeros_like(labels), {})
            return parts[0][1] if parts else None

        return make

    def _cell(
        self, attack: AttackPlan, text: str, region: Tensor, errors: Errors, progress: Progress
    ) -> CellResult:
        """Attack every image in its region and explain the pairs; `errors` are those of making the region."""
        # A copy: errors of one attack must not exclude images from the next.
        errors = dict(errors)
        started = time.perf_counter()
        rows, result = self._attack(attack, text, region, errors, progress)
        # Success is counted on the 8-bit file that a user would store.
        if result is not None and result.success_8bit is None:
            result = self._with_eight_bit(result, attack)
        attacked = time.perf_counter()
        logits, explained = None, []
        if result is not None:
            own: Errors = {}
            logits = self.model.predict(result.adversarial, own)
            errors.update({int(rows[number]): reason for number, reason in own.items()})
            # In the regions of other images the attack is a control: only its success counts.
            if self.plan.analyses and self.plan.specs[text].donor is None:
                explained = self._explain(attack, text, rows, result, errors)
        count = max(1, len(rows))
        seconds = ((attacked - started) / count, (time.perf_counter() - attacked) / count)
        return CellResult(attack, text, region, rows, result, logits, explained, errors, seconds)

    def _attack(
        self, attack: AttackPlan, text: str, region: Tensor, errors: Errors, progress: Progress
    ) -> tuple[Tensor, AttackResult | None]:
        """The rows that could be attacked, and the result for them."""
        # Images with an error are not attacked; their rows state why.
        intact = [row for row in range(len(region)) if row not in errors]
        rows = torch.tensor(intact, dtype=torch.long, device=region.device)

        def run(part: Tensor) -> AttackResult:
            confined = None if text == "none" else region[part]
            images, labels = self.clean.images[part], self.clean.labels[part]
            # An attack is half of a cell's work, its analyses are the other half.
            return self._call(attack, images, labels, confined, lambda fraction: progress(fraction / 2))

        description = f"attack {attack.label} in region {text}"
        # Random numbers follow from seed and image, so results do not depend on how rows are batched.
        parts = self.model.attack_batches.each(run, rows, errors, description)
        if not parts:
            self._check_possible(attack, text, rows, errors, explained=False)
            return rows[:0], None
        return torch.cat([part for part, _ in parts]), AttackResult.concatenate(
            [result for _, result in parts]
        )

    def _call(
        self, attack: AttackPlan, images: Tensor, labels: Tensor, region: Tensor | None, progress: Progress
    ) -> AttackResult:
        options = AttackOptions(
            budget=attack.parsed_budget(),
            region=region,
            seed=self.plan.seed,
            batch_size=self.model.fixed.group,
            progress=progress,
        )
        described = find_attack(attack.name)
        return described.run(self.model.fixed, images, labels, options, attack.own_settings())

    def _with_eight_bit(self, result: AttackResult, attack: AttackPlan) -> AttackResult:
        """The result with the success of its 8-bit files, which attacks of users need not state."""
        files, within_budget = stored(result.adversarial, result.clean, attack.parsed_budget())
        logits = self.model.predict(files, {})  # a file on which the model raises is no success
        fooled = logits.isfinite().all(1) & (logits.argmax(1) != result.labels)
        return replace(result, success_8bit=fooled & within_budget)

    def _explain(
        self, attack: AttackPlan, text: str, rows: Tensor, result: AttackResult, errors: Errors
    ) -> Parts[Explanation]:
        """Explanations of the pairs with the numbers of these pairs; usually one."""

        def run(part: Tensor) -> Explanation:
            return explain(
                self.model.classifier,
                result[part],
                analyses=self.plan.analyses,
                seed=self.plan.seed,
                compare=False,  # with the other images of the shard, which is no property of an image
            )

        own: Errors = {}
        numbers = torch.arange(len(rows), device=rows.device)
        description = f"analyses {', '.join(self.plan.analyses)}"
        parts = self.model.analysis_batches.each(run, numbers, own, description)
        errors.update({int(rows[number]): reason for number, reason in own.items()})
        if not parts:
            self._check_possible(attack, text, rows, errors, explained=True)
        return parts

    def _check_possible(
        self, attack: AttackPlan, text: str, rows: Tensor, errors: Errors, *, explained: bool
    ) -> None:
        """Raise ValueError if what failed on every image also fails on neutral images: the plan is to blame then."""
        reasons = [errors[row] for row in rows.tolist()]
        # NaN is a property of the network on an image, never of the plan.
        if not reasons or any(reason.endswith(NOT_FINITE) for reason in reasons):
            return
        images = fixed_images(self.model.classifier)[:2]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                labels = self.model.predict(images, {}).argmax(1)
                region = None if text == "none" else self._read_region(text, images, labels)
                pairs = self._call(attack, images, labels, region, lambda _: None)
                if explained:
                    explain(self.model.classifier, pairs, analyses=self.plan.analyses, seed=self.plan.seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(f"{reasons[0]} (the same on every image, and on neutral ones)") from error


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Replace the numbers of images in warnings, so that those of several shards are equal and shown once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = re.sub(r"images? \d+(, \d+)*( and \d+ more)?", "some images", str(warning.message))
        warn(text, warning.category)
