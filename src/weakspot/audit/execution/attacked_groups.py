"""Groups of images under one attack in one region: a function of the plan and the images alone.

It writes nothing and knows no other group, so that any engine may call it.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weakspot._checks import quiet, warn
from weakspot.attacks import AttackOptions, find_attack
from weakspot.audit.execution.batches import NOT_FINITE, AuditModel, Errors, Parts
from weakspot.audit.execution.cell_results import CellResult, CleanImages, add_maps, cell_rows
from weakspot.audit.execution.job import Job
from weakspot.audit.execution.opened_images import OpenedImages, open_entries
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.image_list import Entry
from weakspot.audit.store.maps import CLEAN, GroupMaps, MapBlock
from weakspot.audit.store.records import as_rows, no_rows
from weakspot.audit.store.unfinished import GroupKey, GroupResult, ImageFacts
from weakspot.classifier import evaluating
from weakspot.explanations import Explanation, explain
from weakspot.models.identity import fixed_images
from weakspot.pairs import AttackResult
from weakspot.regions import read_region
from weakspot.regions.spec import RegionSpec

if TYPE_CHECKING:
    import pyarrow as pa

CHECK_EVERY = 30.0  # seconds between checks whether the model has changed
Progress = Callable[[float], None]


def attack_groups(
    model: AuditModel, job: Job, groups: Sequence[GroupKey], progress: Progress
) -> Iterator[GroupResult]:
    """Attack groups of one shard and explain every pair.

    Rows and maps depend on plan and images alone: not on other groups, nor on which were computed earlier. If something
    fails on one image (a network that returns NaN or raises), its row states the error, and the other images are not
    affected.

    Args:
        model: the network.
        job: of the audit.
        groups: in the order of `Job.groups`.
        progress: called with the number of attacks done in the group that is computed.

    Raises:
        ValueError: if an attack or an analysis fails on all images and on neutral ones, too.
    """
    checked = time.perf_counter()
    for _, cells in groupby(groups, key=lambda key: key.start):
        images: _Images | None = None  # opened once for all attacks and regions
        for key in cells:
            started = time.perf_counter()
            images = images or _Images(model, job, job.entries_of(key))
            with _without_numbers() as messages:
                rows, maps = images.attack(key, progress)
            # What was computed before a change of the model may be stored already, so it is looked for now and then.
            remarks: tuple[str, ...] = ()
            if key == groups[-1] or time.perf_counter() - checked >= CHECK_EVERY:
                remarks, checked = tuple(model.watch.remarks()), time.perf_counter()
            # Without gradients, an attack that fails says nothing about the network.
            flat = (text for text in messages if "is zero everywhere" in text)
            remarks += tuple(f"{text[:1].upper()}{text[1:]}." for text in flat)
            facts = ImageFacts(
                tuple(images.opened.digests), tuple(images.opened.skipped), tuple(images.missing)
            )
            yield GroupResult(key, rows, maps, facts, time.perf_counter() - started, remarks)


class _Images:
    """The images of a group, and the work on them.

    Attributes:
        opened: what could be read of them.
        missing: (name, reason) of unavailable images, and of images that were attacked without one of their controls.
    """

    def __init__(self, model: AuditModel, job: Job, entries: Sequence[Entry]) -> None:
        self.model, self.plan = model, job.plan
        self.opened = open_entries(entries, model.classifier)
        self.missing = list(self.opened.missing)
        self.count = len(entries)
        self.places = [entry.index - entries[0].index for entry in self.opened.entries]
        self.regions: dict[str, tuple[Tensor, Errors]] = {}
        self.errors: Errors = {}
        # Nothing could be read: `attack` then returns no rows and needs none of the following.
        if not self.opened.entries:
            return
        images = self.opened.images.to(model.fixed.mean.device)
        with evaluating(model.fixed):
            logits = model.predict(images, self.errors)
        # A label of -1 is replaced by the model's own prediction.
        given = torch.tensor([entry.label for entry in self.opened.entries], device=images.device)
        labels = torch.where(given >= 0, given, logits.argmax(1))
        self.clean = CleanImages(self.opened, images, labels, logits)
        for row in (~self.clean.finite).nonzero()[:, 0].tolist():
            self.errors.setdefault(row, f"{NOT_FINITE} for the clean image")

    def attack(self, key: GroupKey, progress: Progress) -> tuple[pa.Table, Mapping[str, MapBlock]]:
        """The rows and maps of one attack in one region."""
        if not self.opened.entries:
            return as_rows(no_rows()), {}
        attack, text = self.plan.attacks[key.attack], self.plan.regions[key.region]
        with evaluating(self.model.fixed):
            result = self._cell(attack, text, lambda fraction: progress(fraction * self.count))
        maps = GroupMaps(self.count)
        # The clean pictures are stored once, with the first cell.
        if self.plan.maps and key.attack == key.region == 0:
            about = {"title": "Clean image", "kind": "picture"}
            maps.add(CLEAN, self.places, self.clean.images.cpu().numpy(), about)
        if self.plan.maps:
            add_maps(maps, [self.places[row] for row in result.rows.tolist()], result)
        return as_rows(cell_rows(self.clean, self.model.classifier, result)), maps.blocks

    def _region_of(self, text: str) -> tuple[Tensor, Errors]:
        """Bool (N, 1, H, W), and the errors of images that have none; made once for all attacks."""
        if text not in self.regions:
            spec = RegionSpec.parse(text)
            if spec.donor is None:
                self.regions[text] = self._region(text)
            else:
                # The controlled region may itself be absent from the plan; it is made for its area then.
                controlled = str(spec.control_of)
                # All controls of a region are made at once, because one draw of other images serves them.
                self.regions |= self._donated_regions(controlled, self._region_of(controlled))
        return self.regions[text]

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

    def _donor_region(self, text: str) -> Callable[[OpenedImages], Tensor | None]:
        """Makes the region of that text on one other image; None if the model or the region fails on it."""

        def make(opened: OpenedImages) -> Tensor | None:
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

    def _cell(self, attack: AttackPlan, text: str, progress: Progress) -> CellResult:
        """Attack every image in its region and explain the pairs."""
        region, errors = self._region_of(text)
        # A copy: errors of one attack must not exclude images from the next.
        errors = dict(errors)
        started = time.perf_counter()
        rows, result = self._attack(attack, text, region, errors, progress)
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
            # None and not a region of everything, because some attacks take no region.
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
                compare=False,  # with the other images of the group, which is no property of an image
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
def _without_numbers() -> Iterator[list[str]]:
    """Replace the numbers of images in warnings, so that those of several groups are equal and shown once.

    Yields a list, which holds the texts of the warnings in the end.
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for warning in caught:
        text = re.sub(r"images? \d+(, \d+)*( and \d+ more)?", "some images", str(warning.message))
        text = re.sub(r"[\d,]+ of [\d,]+ images?", "some images", text)
        messages.append(text)
        warn(text, warning.category)
