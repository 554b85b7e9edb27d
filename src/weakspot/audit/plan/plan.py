"""Plans: what an audit does, stated in full before it starts.

A plan is read from TOML, from JSON (run.json) or from a mapping of plain values; behind `Plan.from_mapping` everything
is typed.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import cast

from weakspot._checks import check_count, check_fraction, check_seed, with_plain_numbers
from weakspot._io.urls import is_url
from weakspot.audit.plan.attack_plan import (
    NORMS,
    AttackPlan,
    Limit,
    ModelPlan,
    labeled,
    read_limit,
    with_budgets,
)
from weakspot.audit.plan.image_list import LABELS
from weakspot.audit.plan.schema import Reader
from weakspot.budgets import read_budget
from weakspot.datasets.labels import LABEL_FILE
from weakspot.explanations.analysis import available_analyses, find_analyses, usual_analyses
from weakspot.regions.spec import RegionSpec

DEFAULT_ANALYSES = ("overlap", "promotion", "propagation")
OTHER_IMAGES = 5  # controls per image that are regions of other images


@dataclass(frozen=True)
class Plan:
    """Every attack in every region on every image, and the analyses of each resulting pair.

    Attributes:
        sources: files, folders, arrays (.npz, .npy); absolute paths or URLs.
        model: the network.
        attacks: all different.
        regions: texts as `read_region` takes them, all different.
        controls: whether every region gets controls: the region shifted within the image and, if it depends on the
            image, the same kind of region made on other images of the run.
        control_images: number of other images per image.
        analyses: names, in the order in which they run.
        labels: "folders" (a folder is named like a class), the path of a label file, "predictions" (of the model),
            or "auto": the labels in an array, else folders if all of them match, else predictions.
        fraction: fraction of the image in the region cam.
        seed: of everything random, including the choice of `limit` images.
        limit: largest number of images; None for all.
        maps: whether maps and pictures are stored.
        shard: number of images that are stored together; None until the model is known.
        group: number of images that are attacked together and of every pass through the model; None until the model is
            known.
        stated_budgets: budgets such as linf:4/255 at which the robust accuracy of minimal-norm attacks may be counted,
            in addition to those of the attacks.
    """

    sources: tuple[str, ...]
    model: ModelPlan = field(default_factory=ModelPlan)
    attacks: tuple[AttackPlan, ...] = (AttackPlan("pgd"),)
    regions: tuple[str, ...] = ("none",)
    controls: bool = False
    control_images: int = OTHER_IMAGES
    analyses: tuple[str, ...] = DEFAULT_ANALYSES
    labels: str = "auto"
    fraction: float = 0.3
    seed: int = 0
    limit: int | None = None
    maps: bool = True
    shard: int | None = None
    group: int | None = None
    stated_budgets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with_plain_numbers(self)

    def __repr__(self) -> str:
        regions = [text for text, spec in self.specs.items() if not spec.is_control]
        controls = len(self.regions) - len(regions)
        return "\n".join(
            [
                f"Plan(model {self.model.spec}, images from {', '.join(self.sources[:3]) or 'nowhere'})",
                f"  attacks: {', '.join(attack.label or attack.name for attack in self.attacks)}",
                f"  regions: {', '.join(regions)}" + (f" and {controls} controls" if controls else ""),
                f"  analyses: {', '.join(self.analyses) or 'none'}",
            ]
        )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], folder: Path | None = None) -> Plan:
        """Read a plan, not yet `resolved`, from plain values.

        Args:
            mapping: images, model (a spec or a table of `ModelPlan`), attacks (names or tables of `AttackPlan`),
                budget (for every attack that takes one; several give several of each attack; minimal-norm attacks are
                counted at it), regions, controls, control_images, analyses, labels, fraction, seed, limit, maps, shard,
                group. Lists may also be texts separated by commas; analyses may also be "all" or "none".
            folder: base of relative paths; the working directory by default.

        Raises:
            ValueError: if a key is unknown or a value has the wrong type.
        """
        plan, budgets = _typed(mapping)
        folder = (folder or Path.cwd()).absolute()
        weights, labels = plan.model.weights, plan.labels
        analyses = tuple(usual_analyses()) if plan.analyses == ("all",) else plan.analyses
        return replace(
            plan,
            sources=tuple(_within(folder, path) for path in plan.sources),
            model=replace(plan.model, weights=None if weights is None else str(folder / weights)),
            attacks=with_budgets(plan.attacks, budgets),
            stated_budgets=budgets or plan.stated_budgets,
            analyses=() if analyses == ("none",) else analyses,
            # Everything else is the path of a label file.
            labels=labels if labels in LABELS else str(folder / labels),
        )

    def as_mapping(self) -> dict[str, object]:
        """The plain values that `from_mapping` reads."""
        mapping: dict[str, object] = asdict(self)
        mapping["images"] = mapping.pop("sources")
        mapping["attacks"] = [
            {**asdict(attack), "settings": dict(attack.settings)} for attack in self.attacks
        ]
        return mapping

    @cached_property
    def specs(self) -> dict[str, RegionSpec]:
        """The regions by their texts, parsed."""
        return {text: RegionSpec.parse(text) for text in self.regions}

    @property
    def cells(self) -> list[tuple[AttackPlan, str]]:
        """Every attack in every region."""
        return list(product(self.attacks, self.regions))

    @property
    def reported_regions(self) -> tuple[str, ...]:
        """The regions without those made on other images, which count only as controls."""
        return tuple(text for text, spec in self.specs.items() if spec.donor is None)

    @property
    def reported_cells(self) -> list[tuple[AttackPlan, str]]:
        """Every attack in every region of `reported_regions`."""
        return list(product(self.attacks, self.reported_regions))

    @property
    def bounded_attacks(self) -> list[str]:
        """Labels of the attacks whose success is news; minimal-norm attacks succeed nearly always."""
        return [attack.label for attack in self.attacks if attack.is_known and not attack.is_minimal]

    @property
    def limits(self) -> list[Limit]:
        """The different budgets that the plan or any of its attacks states."""
        texts = [*self.stated_budgets, *(attack.budget for attack in self.attacks if attack.budget)]
        limits: dict[tuple[str, float], Limit] = {}
        for limit in map(read_limit, texts):
            limits.setdefault((limit.kind, limit.amount), limit)
        return list(limits.values())

    def limit_of(self, attack: AttackPlan) -> Limit | None:
        """The stated budget at which a minimal-norm attack is counted.

        This is the only stated budget in the attack's own norm or, if there is none in that norm, the only one of the
        plan. None if no budget is stated, if several qualify, for SSIM budgets, for which the records hold no distance,
        and if the attack is not known.
        """
        stated = self.limits if attack.is_known else []
        candidates = [limit for limit in stated if limit.kind == attack.minimized_norm] or stated
        return candidates[0] if len(candidates) == 1 and candidates[0].kind in NORMS else None

    def has_robust_accuracy(self, attack: AttackPlan) -> bool | None:
        """False for minimal-norm attacks without a limit; None if the attack is not known."""
        if not attack.is_known:
            return None
        return not attack.is_minimal or self.limit_of(attack) is not None

    def counted_budget(self, attack: AttackPlan) -> str | None:
        """The budget at which an attack's robust accuracy is counted, as text."""
        limit = self.limit_of(attack) if attack.is_minimal else None
        return limit.budget if limit else attack.budget

    def resolved(self) -> Plan:
        """The same plan with defaults filled in, without repetitions, checked as far as possible without images.

        Raises:
            ValueError: if something does not fit.
        """
        self._check()
        return replace(
            self,
            attacks=labeled(attack.resolved() for attack in self.attacks),
            regions=self._with_controls(),
            # In the order in which they run, however the plan lists them.
            analyses=tuple(name for name in available_analyses() if name in self.analyses),
            sources=tuple(sorted({_normal(source) for source in self.sources})),
        )

    def _check(self) -> None:
        if not self.sources:
            raise ValueError("images must name at least one file, folder, .npz or .npy array, got none")
        check_seed(self.seed)
        check_fraction(self.fraction)
        check_count("control_images", self.control_images)
        for name in ("limit", "shard", "group"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("attacks", "regions"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none")
        if not self.reported_regions:
            raise ValueError(
                f"regions must name a region of the image itself, got {', '.join(self.regions)} (add cam)"
            )
        for attack in self.attacks:
            if set(self.regions) != {"none"} and not attack.takes_region():
                raise ValueError(
                    f"regions must be none for attack {attack.name}, which takes no region, got "
                    f"{', '.join(self.regions)} (audit the other regions without it)"
                )
        if self.labels not in LABELS and not Path(self.labels).is_file():
            raise ValueError(
                f"labels must be {', '.join(LABELS)} or the path of {LABEL_FILE}, got {self.labels!r}"
            )
        find_analyses(self.analyses)
        for budget in self.stated_budgets:
            read_budget(budget)

    def _with_controls(self) -> tuple[str, ...]:
        """The regions, followed by their controls if controls are wanted."""
        specs = [RegionSpec.parse(text) for text in self.regions]
        if self.controls:
            controlled = [spec for spec in specs if spec.text != "none" and not spec.is_control]
            if not controlled:
                raise ValueError(
                    f"regions must name one to control, got {', '.join(self.regions)} (add one such as cam, or leave "
                    "controls out)"
                )
            specs += [spec.shifted() for spec in controlled]
            for spec in controlled:
                if spec.depends_on_image:
                    specs += [spec.of_other_image(number) for number in range(1, self.control_images + 1)]
        return tuple(dict.fromkeys(spec.text for spec in specs))


def _typed(mapping: Mapping[str, object]) -> tuple[Plan, tuple[str, ...]]:
    """The plan as it is spelled, and its budgets for all attacks; `out` is a key of files, not of plans."""
    reader, texts = Reader(spelled=True), tuple[str, ...]
    values = dict(mapping)
    reader.read(str | None, values.pop("out", None), "out")
    images = values.pop("images", None) or ()
    images = [images] if isinstance(images, str) else images  # one path: a comma is legal in it
    sources = reader.read(texts, images, "images")
    budgets = reader.read(texts | None, values.pop("budget", None), "budget")
    plan = reader.table(Plan, {**values, "sources": sources}, "plan", more=("budget", "images", "out"))
    return plan, cast("tuple[str, ...] | None", budgets) or ()


def read_plan(path: Path) -> dict[str, object]:
    """The content of a TOML file; paths in it, `out` included, become relative to the file's folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not valid TOML, has an unknown key, or a value of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (give the path of a plan)")
    try:
        table: dict[str, object] = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML ({error})") from None
    try:
        # Only for its errors, which can name the file here.
        _typed(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    folder = path.absolute().parent
    # Relative to the file, not to the working directory: a plan can be moved with its images.
    images = table.get("images", [])
    paths = [images] if isinstance(images, str) else images
    table["images"] = [_within(folder, one) for one in cast("list[str]", paths)]
    for key in ("out", "labels"):
        value = table.get(key)
        if isinstance(value, str) and value not in LABELS:
            table[key] = _within(folder, value)
    model = table.get("model")
    if isinstance(model, dict):
        for key in ("weights", "classes"):
            if isinstance(model.get(key), str):
                model[key] = str(folder / model[key])
    return table


def _within(folder: Path, path: str) -> str:
    # An absolute path stays as it is: joining it to a folder drops the folder.
    return path if is_url(path) else str(folder / path)


def _normal(source: str) -> str:
    return source.rstrip("/") if is_url(source) else os.path.normpath(source)
