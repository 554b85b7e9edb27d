"""Plans: what an audit is to do, said once and in full before it starts."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from weakspot._checks import check_fraction, check_seed, unknown_choice
from weakspot._io.urls import is_url
from weakspot.attacks.libraries import LIBRARIES
from weakspot.attacks.registry import find_attack
from weakspot.budgets import read_budget
from weakspot.explanations.analysis import available_analyses, find_analyses
from weakspot.regions.spec import RegionSpec

DEFAULT_BUDGET = "linf:4/255"
DEFAULT_ANALYSES = ("overlap", "promotion", "propagation")
TAKEN = {"model", "images", "labels", "budget", "region", "targets", "seed", "batch_size", "progress"}
LABELS = ("auto", "folders", "predictions")
MINIMAL = ("fmn", "carlini_wagner", "ead", "strattack")
OTHER_IMAGES = 5  # whose regions an attack is confined to, as controls
SHIFTED, OTHER = "matched:", "other:"  # before a region's text
OTHER_FORM = re.compile(rf"{OTHER}(.+)#([1-9]\d*)")
Value = str | int | float | bool | None


@dataclass(frozen=True)
class ModelPlan:
    """Which network: what `weakspot.load` takes.

    Attributes:
        spec: as `load` has it.
        weights: file, or None.
        mean: normalization on the [0, 1] scale, one per channel; None for the network's own.
        std: likewise.
        size: (height, width) that images are brought to; None for the network's own.
        classes: names of the classes; None for the network's own.
        device: auto, cpu, cuda or mps.
    """

    spec: str = "efficientnet_lite0"
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    device: str = "auto"


@dataclass(frozen=True)
class AttackPlan:
    """One attack with its budget and its own settings.

    Attributes:
        name: as `weakspot attack --list` has it.
        budget: text such as linf:4/255; None where the attack takes none.
        settings: its other arguments, (name, value) each.
        label: what records and maps call it, unlike all others of the plan.
    """

    name: str
    budget: str | None = None
    settings: tuple[tuple[str, Value], ...] = ()
    label: str = ""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the attack of that name.

        Raises:
            ValueError: when there is no such attack, or it does not take them.
        """
        parameters = inspect.signature(find_attack(self.name)).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        own = {key for key, p in parameters.items() if key not in TAKEN and p.kind is not p.VAR_KEYWORD}
        for key, _ in self.settings:
            if key in TAKEN or (key not in own and not free):
                raise ValueError(unknown_choice(f"setting of {self.name}", key, sorted(own)))
        spent = {} if self.budget is None else {"budget": read_budget(self.budget)}
        return {**spent, **dict(self.settings)}

    def takes_budget(self) -> bool:
        """Whether the attack is told how much may change."""
        parameters = inspect.signature(find_attack(self.name)).parameters
        return "budget" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def _needs_budget(self) -> bool:
        parameters = inspect.signature(find_attack(self.name)).parameters
        return "budget" in parameters and parameters["budget"].default is not None


@dataclass(frozen=True)
class Plan:
    """The cross product of images, attacks and regions, and what is found out about each pair.

    Attributes:
        sources: files, folders, arrays (.npz, .npy); absolute paths or URLs.
        model: which network.
        attacks: without two alike.
        regions: texts as `read_region` takes, without two alike.
        controls: whether every region is attacked beside controls: shifted within the image, and, if it depends on
            the image, made for other images of the run.
        control_images: how many other images.
        analyses: names, in the order they are run.
        labels: "folders" (a folder is named like a class), a CSV file's path, "predictions" (of the model), or
            "auto": what an array brings, else folders where all match, else predictions.
        fraction: share of the image in the region cam.
        seed: of everything random, the choice of `limit` images too.
        limit: how many images at most; None for all.
        maps: whether maps and pictures are kept.
        shard: images that are worked on and written together.
        group: images that go through the model at once, always as many; None until it is known for the model.
        stated_budgets: budgets such as linf:4/255 at which the robust accuracy of minimal-norm attacks may be counted,
            besides those of the attacks.
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

    @property
    def cells(self) -> list[tuple[AttackPlan, str]]:
        """Every attack in every region."""
        return list(product(self.attacks, self.regions))

    @property
    def reported_regions(self) -> tuple[str, ...]:
        """The regions without those made for other images, which count only as controls."""
        return tuple(region for region in self.regions if not is_other(region))

    @property
    def reported_cells(self) -> list[tuple[AttackPlan, str]]:
        """Every attack in every region of `reported_regions`."""
        return list(product(self.attacks, self.reported_regions))

    def resolved(self) -> Plan:
        """The same plan with defaults filled in, without repetitions, and checked as far as it can be without images.

        Raises:
            ValueError: when something does not fit, naming it.
        """
        if not self.sources:
            raise ValueError("images names nothing; accepted are files, folders, .npz and .npy arrays")
        check_seed(self.seed)
        check_fraction(self.fraction)
        for name in ("limit", "shard", "group", "control_images"):
            value = getattr(self, name)
            if value is None and name != "control_images":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("attacks", "regions"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; accepted is at least one")
        if not self.reported_regions:
            raise ValueError(
                f"regions must name a region of the image itself, got {', '.join(self.regions)} (add cam)"
            )
        if self.labels not in LABELS and not Path(self.labels).is_file():
            raise ValueError(
                f"labels is {self.labels!r}; accepted are {', '.join(LABELS)} or a CSV file's path"
            )
        if not isinstance(self.controls, bool):
            raise ValueError(f"controls is {self.controls!r}; accepted are true and false")
        find_analyses(self.analyses)
        for budget in self.stated_budgets:
            read_budget(budget)
        attacks = [
            replace(attack, budget=DEFAULT_BUDGET)
            if attack.budget is None and attack._needs_budget()
            else attack
            for attack in self.attacks
        ]
        for attack in attacks:
            if attack.budget is not None and not attack.takes_budget():
                raise ValueError(f"attacks has {attack.name} with budget {attack.budget}, but it takes none")
            attack.arguments()
        return replace(
            self,
            attacks=_labeled(attacks),
            regions=self._placed(),
            analyses=tuple(name for name in available_analyses() if name in self.analyses),
            sources=tuple(sorted({_normal(source) for source in self.sources})),
        )

    def _placed(self) -> tuple[str, ...]:
        """The regions, after them their controls if controls are wanted."""
        regions = list(dict.fromkeys(region.strip() for region in self.regions))
        if self.controls:
            bare = [region for region in regions if region != "none" and not is_control(region)]
            if not bare:
                raise ValueError(
                    "controls were asked for, but regions names none to control; add some, such as cam"
                )
            regions += [control_of(region) for region in bare]
            for region in bare:
                if RegionSpec.parse(region).depends_on_image:
                    regions += [other_of(region, number) for number in range(1, self.control_images + 1)]
        return tuple(dict.fromkeys(regions))

    def as_mapping(self) -> dict[str, Any]:
        """What `read_mapping` takes, of plain values."""
        mapping = asdict(self)
        mapping["images"] = mapping.pop("sources")
        mapping["attacks"] = [
            {**attack, "settings": dict(attack["settings"])} for attack in mapping["attacks"]
        ]
        return mapping


def control_of(region: str) -> str:
    """The region shifted within the image."""
    return f"{SHIFTED}{_enclosed(region)}"


def other_of(region: str, number: int) -> str:
    """The region as it is on another image of the run, the first, second, ... drawn for each image."""
    return f"{OTHER}{_enclosed(region)}#{number}"


def is_other(region: str) -> bool:
    """Whether a region is one made for other images."""
    return OTHER_FORM.fullmatch(region) is not None


def is_control(region: str) -> bool:
    """Whether a region is there only to be compared with."""
    return region.startswith(SHIFTED) or is_other(region)


def other_region(text: str) -> tuple[str, int]:
    """The region and number that `other_of` made the text of."""
    form = OTHER_FORM.fullmatch(text)
    if form is None:
        raise ValueError(f"region must be a text such as other:cam#1, got {text!r}")
    inner = form[1]
    return (inner[1:-1] if inner.startswith("(") and inner.endswith(")") else inner), int(form[2])


def _enclosed(region: str) -> str:
    return f"({region})" if any(sign in region for sign in "&|~") else region


def _normal(source: str) -> str:
    return source.rstrip("/") if is_url(source) else os.path.normpath(source)


def _labeled(attacks: Iterable[AttackPlan]) -> tuple[AttackPlan, ...]:
    """Without repetitions, each with a label of its own: the name, and where that is not enough what else differs."""
    unique = list(dict.fromkeys(attacks))
    for attack in unique:
        alike = [other for other in unique if (other.label or other.name) == (attack.label or attack.name)]
        if len(alike) > 1 and attack.label:
            raise ValueError(f"attacks has two of label {attack.label!r}; accepted is one of each")
    names = [attack.name for attack in unique]
    return tuple(
        attack
        if attack.label
        else replace(attack, label=attack.name if names.count(attack.name) == 1 else _in_full(attack))
        for attack in unique
    )


def _in_full(attack: AttackPlan) -> str:
    settings = [f"{key}={value}" for key, value in attack.settings]
    return " ".join([attack.name, *([attack.budget] if attack.budget else []), *settings])


def is_minimal(attack: AttackPlan) -> bool:
    """Whether an attack looks for the smallest change, or keeps to a size that the plan does not state.

    The latter are attacks of other libraries without a budget.
    """
    return attack.name in MINIMAL or (attack.budget is None and attack.name.partition(":")[0] in LIBRARIES)


def norm_of(attack: AttackPlan) -> str | None:
    """Of an attack that looks for the smallest change, the norm in which it does; else None."""
    own = {"carlini_wagner": "l2", "ead": "l1"}
    if attack.name == "fmn":
        return str(dict(attack.settings).get("norm", "linf"))
    return own.get(attack.name)


def bounded_attacks(plan: Plan) -> list[str]:
    """Labels of the attacks whose success is news: those that look for the smallest change find one nearly always."""
    return [attack.label for attack in plan.attacks if not is_minimal(attack)]
