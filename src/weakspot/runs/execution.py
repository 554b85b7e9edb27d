"""Execution: one shard of images under every attack in every region. A function of the plan and the images alone.

It writes nothing and knows of no other shard, so that anything may call it: a loop here, or workers elsewhere.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weakspot.attacks.registry import find_attack
from weakspot.classifier import Classifier, evaluating
from weakspot.explanations import explain
from weakspot.explanations.analysis import Series
from weakspot.pairs import AttackResult
from weakspot.regions import read_region
from weakspot.runs.attacking import call_attack, chosen, joined
from weakspot.runs.donors import Donors
from weakspot.runs.isolation import Lots
from weakspot.runs.listing import Entry
from weakspot.runs.maps import BlockBuilder, MapBlock, curve_name
from weakspot.runs.plan import AttackPlan, Plan, is_other, other_region
from weakspot.runs.reading import Opened, open_entries
from weakspot.runs.steady import SteadyClassifier
from weakspot.runs.tables import cell_rows, no_rows

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from weakspot.explanations import Explanation

Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What came out of one shard.

    Attributes:
        rows: one per image that could be read x attack x region.
        maps: of all images of the shard, also of those that could not be read.
        skipped: (name, reason) of those.
        read: images that could be read.
        seconds: wall time.
    """

    rows: pd.DataFrame
    maps: Mapping[str, MapBlock]
    skipped: Sequence[tuple[str, str]]
    read: int
    seconds: float


@dataclass(eq=False)
class Machine:
    """The network as an audit uses it, and what it has learnt about its memory.

    Attributes:
        classifier: as it was loaded; analyses look inside it.
        steady: the same network for attacks.
        lots: how many images are attacked at once.
        pairs: how many are explained at once, or have their regions found.
        donors: the other images of the run.
    """

    classifier: Classifier
    steady: SteadyClassifier
    lots: Lots
    pairs: Lots
    donors: Donors

    @classmethod
    def of(
        cls, classifier: Classifier, plan: Plan, listing: pa.Table, batch_size: int | None = None
    ) -> Machine:
        """For a plan; without a batch size all images of a shard are attacked at once, fewer when memory runs out."""
        steady = SteadyClassifier(classifier, plan.group)
        donors = Donors(listing, classifier, plan.seed)
        return cls(classifier, steady, Lots(batch_size, steady), Lots(None, None), donors)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (N, K), in groups; NaN as they come."""
        troubles: dict[int, str] = {}

        def go(mine: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat([self.steady(images[part]) for part in mine.split(self.steady.group)])

        rows = torch.arange(len(images), device=images.device)
        found = self.lots.each(go, rows, troubles, f"a pass through {self.steady.name}")
        if troubles:
            raise ValueError(next(iter(troubles.values())))
        return torch.cat([logits for _, logits in found])


def audit_shard(
    machine: Machine, plan: Plan, entries: Sequence[Entry], progress: Progress | None = None
) -> ShardResult:
    """Attack the images in every way of the plan and explain every pair.

    Rows and maps depend on plan and images alone: not on the batch size, nor on other shards. What fails on one image
    (a network that returns NaN) is said in its row and hinders no other.

    Args:
        machine: the network.
        plan: resolved.
        entries: of one shard.
        progress: called with the share done.
    """
    import pandas as pd

    started = time.perf_counter()
    opened = open_entries(entries, machine.classifier)
    builder = BlockBuilder(len(entries), len(plan.attacks), len(plan.regions))
    if not opened.entries:
        return ShardResult(no_rows(), {}, opened.skipped, 0, time.perf_counter() - started)
    with evaluating(machine.steady):  # once, so that a warning of train mode comes once
        shard = _Shard(machine, plan, opened, [entry.index - entries[0].index for entry in opened.entries])
        frames = shard.run(builder, progress)
    rows = pd.concat(frames, ignore_index=True)
    order = np.lexsort((np.repeat(np.arange(len(frames)), len(opened.entries)), rows["index"].to_numpy()))
    return ShardResult(
        rows.iloc[order].reset_index(drop=True),
        builder.blocks if plan.maps else {},
        opened.skipped,
        len(opened.entries),
        time.perf_counter() - started,
    )


class _Shard:
    """The images of one shard and what is known of them before any attack."""

    def __init__(self, machine: Machine, plan: Plan, opened: Opened, places: Sequence[int]) -> None:
        self.machine, self.plan, self.opened, self.places = machine, plan, opened, places
        device = machine.steady.mean.device
        self.images = opened.images.to(device)
        self.clean = machine.predict(self.images)
        given = torch.tensor([entry.label for entry in opened.entries], device=device)
        self.labels = torch.where(given >= 0, given, self.clean.argmax(1))
        self.sound = self.clean.isfinite().all(1)
        silent = (~self.sound).nonzero()[:, 0].tolist()
        self.lost = dict.fromkeys(silent, "the model returned NaN or infinity for the clean image")

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
                    keep=self.plan.keep,
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
            found = self.machine.donors.regions(text, self._donated(text), content, own[0][row], count)
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
            logits = self.machine.predict(images)
            if not bool(logits.isfinite().all()):
                return None
            label = opened.entries[0].label
            labels = torch.tensor([label if label >= 0 else int(logits.argmax())], device=images.device)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # what there is to say is said where the image itself is attacked
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
        attacked = time.perf_counter()
        logits = None if result is None else self.machine.predict(result.adversarial)
        # Where other images' regions lie, the attack is a control: only how it ended counts.
        explained = [] if result is None or is_other(text) else self._explained(rows, result, troubles)
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
        run, settings = find_attack(attack.name), attack.arguments()
        rows = torch.tensor(
            [row for row in range(len(self.images)) if row not in troubles],
            dtype=torch.long,
            device=region.device,
        )

        def go(mine: Tensor) -> AttackResult:
            known = {
                "region": None if text == "none" else region[mine],
                "seed": self.plan.seed,
                "batch_size": self.machine.steady.group,
                "progress": progress,
            }
            return call_attack(
                run, self.machine.steady, self.images[mine], self.labels[mine], known, settings
            )

        what = f"attack {attack.label} in region {text}"
        found = self.machine.lots.each(go, rows, troubles, what)
        if not found:
            return rows[:0], None
        return torch.cat([mine for mine, _ in found]), joined([one for _, one in found])

    def _explained(
        self, rows: Tensor, result: AttackResult, troubles: dict[int, str]
    ) -> list[tuple[Tensor, Explanation]]:
        """Explanations of the pairs, each with the rows it is of; normally one."""
        if not self.plan.analyses:
            return []

        def look(mine: Tensor) -> Explanation:
            return explain(
                self.machine.classifier,
                chosen(result, mine),
                analyses=self.plan.analyses,
                seed=self.plan.seed,
            )

        own: dict[int, str] = {}
        everyone = torch.arange(len(rows), device=rows.device)
        found = self.machine.pairs.each(look, everyone, own, f"analyses {', '.join(self.plan.analyses)}")
        troubles.update({int(rows[row]): why for row, why in own.items()})
        return [(mine, explanation) for mine, explanation in found]

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
        warnings.warn(text, warning.category, stacklevel=4)
