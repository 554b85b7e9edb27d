"""`weakspot dissect`: which concepts the units of a network detect, and which units an attack moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weakspot.cli.app import Failure, command
from weakspot.cli.options import (
    ATTACK,
    BudgetOption,
    ModelOptions,
    OutputOptions,
    SeedOption,
    StepsOption,
    refuse,
)
from weakspot.cli.output import json_rows, print_rows, print_text
from weakspot.cli.session import Session, check_existing, open_session

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weakspot.budgets import Budget
    from weakspot.classifier import Classifier
    from weakspot.defenses.unit_study import UnitStudy
    from weakspot.dissection import Dissection
    from weakspot.pairs import Pairs

FILES = ("cache", "concepts", "demo-concepts-*", "report.html", "*.csv", "run.json")
SHOWN = 40  # units of a layer whose images are shown
FEWEST = 2  # images to attack; twice as many if half of them choose the units that are masked
DEMO_QUANTILE, QUANTILE = 0.01, 0.005


@dataclass(frozen=True)
class ConceptOptions:
    """Where the labeled concepts come from."""

    demo: Annotated[
        bool, typer.Option("--demo", help="Use generated images of colors and textures instead of a folder.")
    ] = False
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="PNG masks named like the images; pixels are class numbers.", show_default=False
        ),
    ] = None
    names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Names of the classes in --masks, one per line.", show_default=False
        ),
    ] = None
    void: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS", help="Class numbers in --masks to ignore, such as 0,255.", show_default=False
        ),
    ] = None


@dataclass(frozen=True)
class UnitAttackOptions:
    """Whether and how images are attacked to see which units move."""

    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Image files or folders to attack; shows which units move more than under noise, and whether units "
            "that detect a concept move more. Repeat for several.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None
    budget: BudgetOption = "linf:4/255"
    steps: StepsOption = 20
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="UNITS",
            help="Mask units and attack again: sensitive (at most a fifth of the layer), sensitive:COUNT, or numbers "
            "such as 3,17. Half of --images chooses the sensitive units, the other half evaluates them.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None


@dataclass(frozen=True, eq=False)
class UnitAttack:
    """Images to attack, and how.

    Attributes:
        images: (N, C, H, W).
        budget: of the attack.
        steps: of the attack.
        mask: as `unit_study` takes it.
        seed: of all random numbers.
    """

    images: Tensor
    budget: Budget
    steps: int
    mask: int | list[int] | None
    seed: int

    def __repr__(self) -> str:
        return f"UnitAttack({len(self.images)} images, {self.budget}, {self.steps} steps, mask={self.mask})"


@dataclass(frozen=True, eq=False)
class AttackedUnits:
    """Results of the attack; empty if nothing was attacked.

    Attributes:
        studies: one for each layer.
        sentences: on all layers together, if there are several.
        attack: description of the attack.
    """

    studies: Mapping[str, UnitStudy] = field(default_factory=dict)
    sentences: Sequence[str] = ()
    attack: str = ""

    def as_json(self) -> dict[str, object]:
        """The sentences of each layer and the tables of masking."""
        if not self.studies:
            return {}
        tables = {name: study.masking for name, study in self.studies.items() if study.masking is not None}
        return {
            "attack": self.attack,
            "sentences": {name: list(study.sentences) for name, study in self.studies.items()},
            "all_layers": list(self.sentences),
            "masking": {name: json_rows(table) for name, table in tables.items()},
        }

    def paragraphs(self) -> list[str]:
        """One for each layer, and one for all of them."""
        lines = [f"{name}: {' '.join(study.sentences)}" for name, study in self.studies.items()]
        return [*lines, *([f"All layers: {' '.join(self.sentences)}"] if self.sentences else [])]


@command(
    "weakspot dissect --demo",
    "weakspot dissect broden1_224/ --layer layer4 --model torchvision:resnet18",
    "weakspot dissect photos/ --masks labels/ --names classes.txt --void 11 --out runs/camvid",
    "weakspot dissect textures/ --layer features.12 --layer features.18 --model my_package.models:build",
    "weakspot dissect broden1_224/ --images photos/ --budget linf:2/255 --mask sensitive",
)
def dissect(
    context: typer.Context,
    concepts: ConceptOptions,
    attack: UnitAttackOptions,
    network: ModelOptions,
    output: OutputOptions,
    dataset: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATASET]",
            help="A folder in Broden's layout (index.csv, label.csv, images/), or a folder of images with --masks or "
            "with one subfolder per label.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A module whose output is a map. Repeat for several.",
            show_default="the last layer of each of the two coarsest map sizes",
        ),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Fraction of all sites at which a unit counts as active.",
            show_default=f"{QUANTILE}, or {DEMO_QUANTILE} with --demo",
        ),
    ] = None,
    min_iou: Annotated[
        float, typer.Option(metavar="X", help="Minimum intersection over union of a detector.")
    ] = 0.04,
    denominator: Annotated[
        str, typer.Option(metavar="NAME", help="Sites that the union counts: category, activated or all.")
    ] = "category",
    alignment: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How maps are aligned with images: receptive_field, effective or resize."
        ),
    ] = "receptive_field",
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for report.html, a table per layer, run.json.")
    ] = Path("weakspot-units"),
) -> None:
    """Find the concepts that units detect: sites where a unit is active are compared with sites of each concept.

    With --images, also find the units that an attack moves more than noise of the same size does. Dissections are
    stored in OUT/cache, and reused for the same network, images and options.
    """
    if concepts.demo == (dataset is not None):
        raise Failure("one of a folder of labeled images and --demo must be given")
    if concepts.demo:
        refuse(context, ("masks", "names", "void"), "with --demo, which has its own (leave out one of the two)")
    if concepts.masks is None:
        refuse(context, ("names", "void"), "without --masks")
    if not attack.images:
        refuse(context, ("budget", "steps", "mask", "seed"), "without --images")
    mask = parse_mask(attack.mask, len(layer or []))
    check_existing(attack.images or [])
    with open_session(context, network, output, out, FILES) as session:
        from weakspot.dissection import dissection

        classifier = session.classifier
        plan = _read_attack(session, attack, mask, seed) if attack.images else None
        session.make_folder()
        session.advance("reading the concepts", 0.02)
        folder = _find_concepts(dataset, out, classifier, concepts)
        layers = list(layer or _last_layers(classifier))
        dissections = dissection(
            classifier,
            layers,
            folder,
            quantile=quantile or (DEMO_QUANTILE if concepts.demo else QUANTILE),
            min_iou=min_iou,
            denominator=denominator,
            alignment=alignment,
            cache=out / "cache",
            progress=session.progress("dissecting", 0.05, 0.5 if plan else 0.85),
        )
        attacked = AttackedUnits()
        if plan is not None:
            attacked = _attack_units(classifier, dissections, plan, session.progress("attacking", 0.5, 0.85))
        session.advance("drawing", 0.9)
        options = next(iter(dissections.values())).options
        made = {
            "concepts": f"{folder}" if dataset else "colors and textures that weakspot generated",
            "layers": ", ".join(layers),
            **{name: str(value) for name, value in options.items() if name != "dataset"},
            **({"attack": attacked.attack} if plan else {}),
            **session.provenance(seed),
        }
        page = _write(session, folder, dissections, attacked, made)
    rows = _layer_rows(dissections)

    def show() -> None:
        print_rows(rows)
        for paragraph in attacked.paragraphs():
            print_text(f"\n{paragraph}")
        print_text(f"\n{len(layers)} layers{session.ending()}", style="dim")
        print_text(f"\nReport: {page.resolve()}")

    files = {"report.html": str(page.resolve())}
    session.report(lambda: {"layers": rows, **attacked.as_json(), "files": files}, show)


def parse_mask(text: str | None, layers: int) -> int | list[int] | None:
    """What --mask stands for: a number of sensitive units (0 for a fifth of the layer), or these units.

    Args:
        text: as given.
        layers: how many --layer options were given; unit numbers belong to one.
    """
    if text is None:
        return None
    kind, colon, count = text.partition(":")
    if kind == "sensitive" and (not colon or (count.isdecimal() and int(count))):
        return int(count or 0)
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise Failure(f"--mask must be sensitive, sensitive:COUNT or unit numbers such as 3,17, got {text!r}")
    if layers != 1:
        raise Failure(f"--mask {text} must go with exactly one --layer, got {layers}")
    return [int(number) for number in numbers]


def _read_attack(
    session: Session, options: UnitAttackOptions, mask: int | list[int] | None, seed: int
) -> UnitAttack:
    """Read the images of --images."""
    from weakspot.budgets import read_budget

    budget = read_budget(options.budget)
    images = session.read_images(options.images or []).pixels
    fewest = 2 * FEWEST if isinstance(mask, int) else FEWEST
    if len(images) < fewest:
        raise Failure(f"--images must hold at least {fewest} images, got {len(images)}")
    return UnitAttack(images, budget, options.steps, mask, seed)


def _attack_units(
    classifier: Classifier,
    dissections: Mapping[str, Dissection],
    plan: UnitAttack,
    progress: Callable[[float], None],
) -> AttackedUnits:
    """Attack the images with PGD, and study the units of every dissected layer."""
    import pandas as pd

    from weakspot.attacks import pgd
    from weakspot.classifier import check_images, evaluating, predict
    from weakspot.defenses.unit_study import association_sentences, unit_study

    with evaluating(classifier):
        images = check_images(plan.images, classifier)
        labels = predict(classifier, images).argmax(1)

    def attack(model: nn.Module, shown: Tensor, wanted: Tensor) -> Pairs:
        return pgd(model, shown, wanted, budget=plan.budget, steps=plan.steps, seed=plan.seed)

    def layer_progress(number: int, fraction: float) -> None:
        progress(0.2 + 0.8 * (number + fraction) / len(dissections))

    pairs = attack(classifier, images, labels)
    progress(0.2)
    studies = {}
    for number, (name, dissection) in enumerate(dissections.items()):
        studies[name] = unit_study(
            classifier,
            dissection,
            pairs,
            mask=plan.mask,
            attack=attack,
            seed=plan.seed,
            progress=partial(layer_progress, number),
        )
    sentences: Sequence[str] = ()
    if len(studies) > 1:
        tables = [study.units.assign(layer=name) for name, study in studies.items()]
        sentences = association_sentences(pd.concat(tables, ignore_index=True))
    how = f"PGD, {plan.budget}, {plan.steps} steps, on {len(images)} images labeled by the model's predictions"
    return AttackedUnits(studies, sentences, how)


def _write(
    session: Session,
    concepts: Path,
    dissections: Mapping[str, Dissection],
    attacked: AttackedUnits,
    made: Mapping[str, str],
) -> Path:
    """Write all files; returns the path of the report."""
    import pandas as pd

    from weakspot._io.files import write_whole
    from weakspot.audit.store.run import write_scores
    from weakspot.dissection.unit_examples import show_units
    from weakspot.report.unit_page import unit_page

    pictures = {}
    for name, dissection in dissections.items():
        best = dissection.units.sort_values("iou", ascending=False)["unit"].head(SHOWN).tolist()
        pictures[name] = show_units(session.classifier, dissection, concepts, best)
    out, studies = session.out, attacked.studies
    content = unit_page(
        dissections,
        pictures,
        model=session.classifier.name,
        made=made,
        studies=studies,
        together=attacked.sentences,
    )
    write_whole(out / "report.html", lambda draft: draft.write_text(content, "utf-8"))
    tables = {
        name: studies[name].units if studies else dissection.units for name, dissection in dissections.items()
    }
    for name, table in tables.items():
        write_whole(out / f"{_file_name(name)}.csv", partial(table.to_csv, index=False))
    for name, study in studies.items():
        if study.masking is not None:
            write_whole(out / f"{_file_name(name)}-masking.csv", partial(study.masking.to_csv, index=False))
    every = pd.concat([table.assign(layer=name) for name, table in tables.items()], ignore_index=True)
    write_scores(every, {**made, "seconds": round(session.seconds, 2)}, out)
    return out / "report.html"


def _find_concepts(
    dataset: Path | None, out: Path, classifier: Classifier, options: ConceptOptions
) -> Path:
    """The folder in Broden's layout: as given, converted, or generated."""
    from weakspot.dissection import build_concepts, demo_concepts

    if dataset is None:
        side = min(classifier.input_size)
        folder = out / f"demo-concepts-{side}"
        return folder if (folder / "index.csv").is_file() else demo_concepts(folder, size=side)
    if not dataset.exists():
        raise Failure(f"{dataset}: no such folder")
    if (dataset / "index.csv").is_file() and options.masks is None:
        return dataset
    folder = out / "concepts"
    if (folder / "index.csv").is_file():
        raise Failure(f"{folder} holds the concepts of an earlier run (give another --out, or {folder} itself)")
    try:
        void = [int(value) for value in options.void.split(",")] if options.void else []
    except ValueError:
        raise Failure(f"--void must be integers separated by commas such as 0,255, got {options.void!r}") from None
    return build_concepts(dataset, folder, masks=options.masks, names=options.names, void=void)


def _last_layers(classifier: Classifier) -> list[str]:
    """The last layer of each of the two coarsest map sizes, among layers that are called once."""
    import torch

    from weakspot.attribution.hooks import spatial_layers
    from weakspot.classifier import evaluating

    with evaluating(classifier):
        image = torch.zeros(1, classifier.channels, *classifier.input_size, device=classifier.mean.device)
        places = spatial_layers(classifier, image)
    last = {
        place.layout.cells: name
        for name, place in places.items()
        if place.module is not None and place.calls == 1
    }
    return [last[cells] for cells in sorted(last)[:2]][::-1] or [list(places)[-1]]


def _file_name(layer: str) -> str:
    """The layer's name with only characters that every file system takes."""
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in layer)
    return plain.lstrip(".") or "layer"


def _layer_rows(dissections: Mapping[str, Dissection]) -> list[dict[str, str]]:
    """One row per layer: its units, its detectors and their most frequent concepts."""
    rows = []
    for name, dissection in dissections.items():
        detectors = dissection.units[dissection.units["concept"].notna()]
        counts = detectors.groupby("concept").size().sort_values(ascending=False)
        rows.append(
            {
                "layer": name,
                "units": str(len(dissection.units)),
                "detectors": str(len(detectors)),
                "concepts": ", ".join(f"{concept} {number}" for concept, number in counts.head(8).items()),
            }
        )
    return rows
