"""Execution: one shard of images under every attack in every region. A function of the plan and the images alone.

It writes nothing and knows of no other shard, so that anything may call it: a loop here, or workers elsewhere.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import quiet, warn
from weakspot.attacks import AttackOptions, find_attack
from weakspot.attacks.eight_bit import stored
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.image_list import Entry
from weakspot.audit.plan.plan import Plan, is_other, other_region
from weakspot.audit.store.maps import BlockBuilder, MapBlock, curve_name
from weakspot.audit.work.batches import NOT_FINITE, AuditModel
from weakspot.audit.work.cell_rows import cell_rows, no_rows
from weakspot.audit.work.shard_images import Opened, open_entries
from weakspot.classifier import evaluating
from weakspot.explanations import explain
from weakspot.explanations.analysis import Series
from weakspot.models.probe import probe_images
from weakspot.pairs import AttackResult
from weakspot.regions import read_region

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.explanations import Explanation


Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What came out of one shard.

    Attributes:
        rows: one per image that could be read x attack x region.
        maps: of all images of the shard, also of those that could not be read.
        skipped: (name, reason) of files that are no pictures.
        missing: (name, reason) of files that are not to be had: the shard is to be done again once they are.
        contents: digests of all images of the shard, in order; None of those that were not read.
        read: images that could be read.
        seconds: wall time.
        remarks: what is to be said of the model by now.
    """

    rows: pd.DataFrame
    maps: Mapping[str, MapBlock]
    skipped: Sequence[tuple[str, str]]
    missing: Sequence[tuple[str, str]]
    contents: Sequence[str | None]
    read: int
    seconds: float
    remarks: Sequence[str]


def audit_shard(
    machine: AuditModel, plan: Plan, entries: Sequence[Entry], progress: Progress | None = None
) -> ShardResult:
    """Attack the images in every way of the plan and explain every pair.

    Rows and maps depend on plan and images alone: not on the batch size, nor on other shards. What fails on one image
    (a network that returns NaN or raises) is said in its row and hinders no other.

    Args:
        machine: the network.
        plan: resolved.
        entries: of one shard.
        progress: called with the share done.

    Raises:
        ValueError: if an attack or an analysis fails on all images and on neutral ones, too.
    """
    import pandas as pd

    started = time.perf_counter()
    opened = open_entries(entries, machine.classifier)
    builder = BlockBuilder(len(entries), len(plan.attacks), len(plan.regions))
    if not opened.entries:
        return ShardResult(
            no_rows(),
            {},
            opened.skipped,
            opened.missing,
            opened.digests,
            0,
            time.perf_counter() - started,
            (),
        )
    with evaluating(machine.steady):  # once, so that a warning of train mode comes once
        shard = _Shard(machine, plan, opened, [entry.index - entries[0].index for entry in opened.entries])
        frames = shard.run(builder, progress)
    rows = pd.concat(frames, ignore_index=True)
    order = np.lexsort((np.repeat(np.arange(len(frames)), len(opened.entries)), rows["index"].to_numpy()))
    return ShardResult(
        rows.iloc[order].reset_index(drop=True),
        builder.blocks if plan.maps else {},
        opened.skipped,
        [*opened.missing, *shard.missing],
        opened.digests,
        len(opened.entries),
        time.perf_counter() - started,
        machine.watch.remarks(),
    )


class _Shard:
    """The images of one shard and what is known of them before any attack."""

    def __init__(self, machine: AuditModel, plan: Plan, opened: Opened, places: Sequence[int]) -> None:
        self.machine, self.plan, self.opened, self.places = machine, plan, opened, places
        device = machine.steady.mean.device
        self.images = opened.images.to(device)
        self.lost: dict[int, str] = {}
        self.missing: list[tuple[str, str]] = []  # images that were attacked without one of their controls
        self.clean = machine.predict(self.images, self.lost)
        given = torch.tensor([entry.label for entry in opened.entries], device=device)
        self.labels = torch.where(given >= 0, given, self.clean.argmax(1))
        self.sound = self.clean.isfinite().all(1)
        for row in (~self.sound).nonzero()[:, 0].tolist():
            self.lost.setdefault(row, f"{NOT_FINITE} for the clean image")

    def run(self, builder: BlockBuilder, progress: Progress | None) -> list[pd.DataFrame]:
        if self.plan.maps:
            builder.add_pictures("clean", self.places, self.images.cpu().numpy(), {"title": "Clean image"})
        sound = self.sound.nonzero()[:, 0]
        regions = {text: self._region(text, sound) for text in self.plan.reported_regions}
        for text in dict.fromkeys(other_region(text)[0] for text in self.plan.regions if is_other(text)):
            regions.update(self._other_regions(text, regions.get(text) or self._region(text, sound)))
        frames = []
        cells = len(self.plan.attacks) * len(self.plan.regions)
        for a, attack in enumerate(self.plan.attacks):
            for r, text in enumerate(self.plan.regions):
                start = (a * len(self.plan.regions) + r) / cells

                def advance(share: float, start: float = start) -> None:
                    if progress is not None:
                        progress(start + share / cells)

                frames.append(self._cell(builder, (a, r), attack, text, regions[text], advance))
        return frames

    def _region(self, text: str, rows: Tensor) -> tuple[Tensor, dict[int, str]]:
        """Bool (N, 1, H, W) of the images of these rows, and what was wrong with others."""
        region = torch.zeros_like(self.images[:, :1], dtype=torch.bool)
        troubles = dict(self.lost)
        for mine, found in self._made(text, self.images, self.labels, rows, troubles):
            region[mine] = found
        return region, troubles

    def _made(
        self, text: str, images: Tensor, labels: Tensor, rows: Tensor, troubles: dict[int, str]
    ) -> list[tuple[Tensor, Tensor]]:
        """The region of that text on these rows of images."""

        def find(mine: Tensor) -> Tensor:
            with _numbers_left_out():
                return read_region(
                    text,
                    self.machine.classifier,
                    images[mine],
                    labels[mine],
                    fraction=self.plan.fraction,
                    seed=self.plan.seed,
                )

        return self.machine.pairs.each(find, rows, troubles, f"region {text}")

    def _other_regions(
        self, text: str, own: tuple[Tensor, dict[int, str]]
    ) -> dict[str, tuple[Tensor, dict[int, str]]]:
        """What `_region` is, for each draw that the plan has of a region made for other images."""
        drawn = {
            other: (torch.zeros_like(own[0]), dict(own[1]))
            for other in self.plan.regions
            if is_other(other) and other_region(other)[0] == text
        }
        count = max(other_region(other)[1] for other in drawn)
        for row, content in enumerate(self.opened.contents):
            if row in own[1]:
                continue
            found, missing = self.machine.donors.regions(
                text, self._donated(text), content, own[0][row], count
            )
            if missing:
                name = self.opened.entries[row].name
                self.missing.append((name, f"its controls need an image that is missing ({missing[0]})"))
            for other, (region, troubles) in drawn.items():
                number = other_region(other)[1]
                if number <= len(found):
                    region[row] = found[number - 1]
                else:
                    troubles[row] = f"fewer than {number} other images have a region {text} of similar area"
        return drawn

    def _donated(self, text: str) -> Callable[[Opened], Tensor | None]:
        """Makes the region of that text on one other image; None where the model or the region fails on it."""

        def make(opened: Opened) -> Tensor | None:
            images = opened.images.to(self.images.device)
            logits = self.machine.predict(images, {})
            if not bool(logits.isfinite().all()):
                return None
            label = opened.entries[0].label
            labels = torch.tensor([label if label >= 0 else int(logits.argmax())], device=images.device)
            with quiet():  # what there is to say is said where the image itself is attacked
                found = self._made(text, images, labels, torch.zeros_like(labels), {})
            return found[0][1] if found else None

        return make

    def _cell(
        self,
        builder: BlockBuilder,
        cell: tuple[int, int],
        attack: AttackPlan,
        text: str,
        place: tuple[Tensor, dict[int, str]],
        progress: Progress,
    ) -> pd.DataFrame:
        region, troubles = place[0], dict(place[1])
        begun = time.perf_counter()
        rows, result = self._attacked(attack, text, region, troubles, lambda share: progress(share / 2))
        if result is not None and result.success_8bit is None:
            result = self._stored(result, attack)
        attacked = time.perf_counter()
        logits = None
        if result is not None:
            own: dict[int, str] = {}
            logits = self.machine.predict(result.adversarial, own)
            troubles.update({int(rows[row]): why for row, why in own.items()})
        # Where other images' regions lie, the attack is a control: only how it ended counts.
        explained = (
            [] if result is None or is_other(text) else self._explained(attack, text, rows, result, troubles)
        )
        self._keep(builder, cell, rows, result, explained)
        spent = (attacked - begun, time.perf_counter() - attacked)
        count = max(1, len(rows))
        progress(1.0)
        return cell_rows(
            self.opened,
            self.machine.classifier,
            attack,
            text,
            labels=self.labels,
            clean=self.clean,
            region=region,
            rows=rows,
            result=result,
            adversarial=logits,
            explained=explained,
            troubles=troubles,
            seconds=(spent[0] / count, spent[1] / count),
        )

    def _attacked(
        self, attack: AttackPlan, text: str, region: Tensor, troubles: dict[int, str], progress: Progress
    ) -> tuple[Tensor, AttackResult | None]:
        """The rows that could be attacked, and what became of them."""
        described, settings = find_attack(attack.name), attack.own_settings()
        rows = torch.tensor(
            [row for row in range(len(self.images)) if row not in troubles],
            dtype=torch.long,
            device=region.device,
        )

        def go(mine: Tensor) -> AttackResult:
            options = AttackOptions(
                budget=attack.parsed_budget(),
                region=None if text == "none" else region[mine],
                seed=self.plan.seed,
                batch_size=self.machine.steady.group,
                progress=progress,
            )
            return described.run(self.machine.steady, self.images[mine], self.labels[mine], options, settings)

        what = f"attack {attack.label} in region {text}"
        found = self.machine.lots.each(go, rows, troubles, what)
        if not found:
            self._check_possible(attack, text, rows, troubles, explained=False)
            return rows[:0], None
        return torch.cat([mine for mine, _ in found]), AttackResult.concatenate([one for _, one in found])

    def _stored(self, result: AttackResult, attack: AttackPlan) -> AttackResult:
        """The result with what becomes of its 8-bit files, which an attack of one's own need not say."""
        files, fits = stored(result.adversarial, result.clean, attack.parsed_budget())
        logits = self.machine.predict(files, {})  # where the model raises, a file fools nobody
        fooled = logits.isfinite().all(1) & (logits.argmax(1) != result.labels)
        return replace(result, success_8bit=fooled & fits)

    def _explained(
        self, attack: AttackPlan, text: str, rows: Tensor, result: AttackResult, troubles: dict[int, str]
    ) -> list[tuple[Tensor, Explanation]]:
        """Explanations of the pairs, each with the rows it is of; normally one."""
        if not self.plan.analyses:
            return []

        def look(mine: Tensor) -> Explanation:
            return explain(
                self.machine.classifier,
                result.select(mine),
                analyses=self.plan.analyses,
                seed=self.plan.seed,
                compare=False,  # with other images of its shard, which is no property of an image
            )

        own: dict[int, str] = {}
        everyone = torch.arange(len(rows), device=rows.device)
        found = self.machine.pairs.each(look, everyone, own, f"analyses {', '.join(self.plan.analyses)}")
        troubles.update({int(rows[row]): why for row, why in own.items()})
        if not found:
            self._check_possible(attack, text, rows, troubles, explained=True)
        return [(mine, explanation) for mine, explanation in found]

    def _check_possible(
        self, attack: AttackPlan, text: str, rows: Tensor, troubles: Mapping[int, str], *, explained: bool
    ) -> None:
        """Raise ValueError if what failed on every image fails on neutral images, too: no image is to blame then."""
        said = [troubles[row] for row in rows.tolist()]
        if not said or any(why.endswith(NOT_FINITE) for why in said):
            return
        classifier, plan = self.machine.classifier, self.plan
        images = probe_images(classifier)[:2]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                labels = self.machine.predict(images, {}).argmax(1)
                region = None
                if text != "none":
                    region = read_region(
                        text, classifier, images, labels, fraction=plan.fraction, seed=plan.seed
                    )
                options = AttackOptions(
                    budget=attack.parsed_budget(),
                    region=region,
                    seed=plan.seed,
                    batch_size=self.machine.steady.group,
                )
                pairs = find_attack(attack.name).run(
                    self.machine.steady, images, labels, options, attack.own_settings()
                )
                if explained:
                    explain(classifier, pairs, analyses=plan.analyses, seed=plan.seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(f"{said[0]} (the same on every image, and on neutral ones)") from error

    def _keep(
        self,
        builder: BlockBuilder,
        cell: tuple[int, int],
        rows: Tensor,
        result: AttackResult | None,
        explained: Sequence[tuple[Tensor, Explanation]],
    ) -> None:
        if result is None or not self.plan.maps:
            return
        places = [self.places[row] for row in rows.tolist()]
        about = {"title": "Adversarial image", "kind": "picture"}
        builder.add("adversarial", places, cell, result.adversarial.cpu().numpy(), about)
        for mine, explanation in explained:
            here = [places[row] for row in mine.tolist()]
            for name, maps in explanation.maps.items():
                picture = explanation.pictures[name]
                facts: dict[str, Any] = {"title": picture.title, "kind": picture.kind}
                if picture.categories:
                    facts["categories"] = list(picture.categories)
                builder.add(name, here, cell, maps[:, 0].numpy(), facts)
            for name, series in explanation.series.items():
                for size, (steps, alike) in _by_size(series).items():
                    facts = {"title": series.title, "steps": steps}
                    builder.add(f"{name}/{size}", here, cell, torch.stack(alike, 1).cpu().numpy(), facts)
                for curve, values in series.curves.items():
                    facts = {"title": series.title, "steps": list(series.steps), "curve": curve}
                    builder.add(curve_name(name, curve), here, cell, values.cpu().numpy(), facts)


def _by_size(series: Series) -> dict[str, tuple[list[str], list[Tensor]]]:
    """Layers and maps (n, h, w) of a series, those of one size together: a few arrays instead of dozens."""
    sizes: dict[str, tuple[list[str], list[Tensor]]] = {}
    for step, maps in zip(series.steps, series.maps, strict=True):
        steps, alike = sizes.setdefault("x".join(map(str, maps.shape[1:])), ([], []))
        steps.append(step)
        alike.append(maps)
    return sizes


@contextmanager
def _numbers_left_out() -> Iterator[None]:
    """Warnings about some images of a shard without their places in it, so that the reader is told once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = re.sub(r"images? \d+(, \d+)*( and \d+ more)?", "some images", str(warning.message))
        warn(text, warning.category)
