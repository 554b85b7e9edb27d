"""`weakspot dissect`: which concepts the units of a network detect, and which units an attack moves."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from weakspot._io.files import write_atomic
from weakspot.attribution.hooks import spatial_layers
from weakspot.budgets import read_budget
from weakspot.classifier import Classifier, evaluating
from weakspot.cli.app import Failure, command
from weakspot.cli.attacked_units import (
    AttackedUnits,
    UnitAttackOptions,
    attack_units,
    parse_mask,
    read_attacked,
)
from weakspot.cli.options import (
    QUICK_IMAGES,
    QUICK_STEPS,
    EveryOption,
    ModelOptions,
    OutputOptions,
    SeedOption,
    argument,
    flag,
    option,
    refuse,
)
from weakspot.cli.output import first_rows, print_rows, print_text
from weakspot.cli.session import Session, check_existing, draw_rows, open_session
from weakspot.dissection import Dissection, build_concepts, demo_concepts, dissect_layers
from weakspot.dissection.unit_examples import show_units
from weakspot.statistics.number_format import counted

SOURCE = "source.json"  # what the concepts of a folder were built from
FILES = ("cache", "concepts", "demo-concepts-*", "report.html", "*.csv", "run.json")
SHOWN = 40  # units of a layer whose images are shown
QUICK_LABELED = 100  # labeled images of a trial
DEMO_QUANTILE, QUANTILE = 0.01, 0.005


@dataclass(frozen=True)
class ConceptOptions:
    """Where the labeled concepts come from."""

    demo: Annotated[
        bool, flag("--demo", "Use generated images of colors and textures instead of a folder.")
    ] = False
    masks: Annotated[
        Path | None, option("FOLDER", "PNG masks named like the images; pixels are class numbers.")
    ] = None
    names: Annotated[Path | None, option("FILE", "Names of the classes in --masks, one per line.")] = None
    void: Annotated[str | None, option("NUMBERS", "Class numbers in --masks to ignore, such as 0,255.")] = (
        None
    )


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
        argument(
            "DATASET",
            "A folder in Broden's layout (index.csv, label.csv, images/), or a folder of images with --masks or "
            "with one subfolder per label.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        option(
            "NAME",
            "A module whose output is a map. Repeat for several.",
            default="the last layer of each of the two coarsest map sizes",
        ),
    ] = None,
    quantile: Annotated[
        float | None,
        option(
            "X",
            "Fraction of all sites, those of highest activation, at which a unit counts as active.",
            default=f"{QUANTILE}, or {DEMO_QUANTILE} with --demo",
        ),
    ] = None,
    min_iou: Annotated[float, option("X", "Minimum intersection over union of a detector.")] = 0.04,
    denominator: Annotated[
        str,
        option(
            "NAME",
            "Which of a unit's active sites count in the union: those in images annotated in the concept's category "
            "(category), only those labeled in it (activated), or all.",
        ),
    ] = "category",
    alignment: Annotated[
        str, option("NAME", "How maps are aligned with images: receptive_field, effective or resize.")
    ] = "receptive_field",
    quick: Annotated[
        bool,
        flag(
            "--quick",
            f"A trial: at most {QUICK_LABELED} labeled images, and of --images at most {QUICK_IMAGES} in "
            f"{QUICK_STEPS} steps. Shows that it works, not how well.",
        ),
    ] = False,
    seed: SeedOption = 0,
    every: EveryOption = False,
    out: Annotated[Path, option("FOLDER", "Folder for report.html, a table per layer, run.json.")] = Path(
        "weakspot-units"
    ),
) -> None:
    """Find the concepts that units detect: sites where a unit is active are compared with sites of each concept.

    With --images, also find the units that an attack moves more than noise of the same size does. Dissections are
    stored in OUT/cache, and reused for the same network, images and options.
    """
    if concepts.demo == (dataset is not None):
        raise Failure("one of a folder of labeled images and --demo must be given")
    if concepts.demo:
        refuse(
            context, ("masks", "names", "void"), "with --demo, which has its own (leave out one of the two)"
        )
    if concepts.masks is None:
        refuse(context, ("names", "void"), "without --masks")
    elif concepts.names is None:
        raise Failure(
            "--masks needs --names, a file with one class name per line in order of the mask values"
        )
    if not attack.images:
        refuse(context, ("budget", "steps", "mask", "seed"), "without --images")
    if quick:
        refuse(context, ["steps"], "with --quick, which sets it (leave out one of the two)")
    steps = QUICK_STEPS if quick else attack.steps
    mask = parse_mask(attack.mask, len(layer or []))
    check_existing(attack.images or [])
    budget = read_budget(attack.budget)
    with open_session(context, network, output, out, FILES) as session:
        classifier = session.classifier
        images = read_attacked(session, attack, mask) if attack.images else None
        if images is not None and quick:
            images = images[draw_rows(len(images), QUICK_IMAGES, seed)]
        session.make_folder()
        session.display.step("reading the concepts")
        folder = _find_concepts(dataset, out, classifier, concepts)
        layers = list(layer or _last_layers(classifier))
        dissections = dissect_layers(
            classifier,
            layers,
            folder,
            quantile=(DEMO_QUANTILE if concepts.demo else QUANTILE) if quantile is None else quantile,
            min_iou=min_iou,
            denominator=denominator,
            alignment=alignment,
            limit=QUICK_LABELED if quick else None,
            cache=out / "cache",
            progress=session.display.step("dissecting"),
        )
        attacked = AttackedUnits()
        if images is not None:
            attacked = attack_units(
                session, dissections, images, budget=budget, steps=steps, mask=mask, seed=seed
            )
        session.display.step("drawing")
        options = asdict(next(iter(dissections.values())).options)
        made = {
            "concepts": f"{folder}" if dataset else "colors and textures that weakspot generated",
            "layers": ", ".join(layers),
            **{
                name: str(value) for name, value in options.items() if name != "dataset" and value is not None
            },
            **({"attack": attacked.attack} if attacked.attack else {}),
            **session.provenance(seed),
        }
        page = _write(session, folder, dissections, attacked, made)

    def show() -> None:
        units = sum(len(of.units) for of in dissections.values())
        detectors = sum(of.units["concept"].count() for of in dissections.values())
        print_text(
            f"{detectors} of {counted(units, 'unit')} {'detects' if detectors == 1 else 'detect'} a concept "
            f"(intersection over union of at least {min_iou:g}).\n"
        )
        shown, more = first_rows(list(dissections.items()), every=every)
        print_rows([_table_row(name, dissection) for name, dissection in shown])
        if more:
            print_text(f"... and {counted(more, 'more layer')} (show them with --all)", style="dim")
        for paragraph in attacked.paragraphs():
            print_text(f"\n{paragraph}")
        if quick:
            print_text(f"\n{_trial(attacked=bool(attack.images))}")
        print_text(f"\n{counted(len(layers), 'layer')}{session.ending()}", style="dim")
        print_text(f"\nReport: {page.resolve()}")

    files = {"report.html": str(page.resolve())}
    session.report(
        lambda: {
            "layers": [_layer_json(*layer) for layer in dissections.items()],
            **attacked.as_json(),
            "files": files,
        },
        show,
    )


def _trial(*, attacked: bool) -> str:
    """What --quick did."""
    fewer = f", and of --images at most {QUICK_IMAGES} in {QUICK_STEPS} steps" if attacked else ""
    return f"--quick: at most {QUICK_LABELED} labeled images{fewer}; this shows that it works, not how well."


def _write(
    session: Session,
    concepts: Path,
    dissections: Mapping[str, Dissection],
    attacked: AttackedUnits,
    made: Mapping[str, str],
) -> Path:
    """Write all files; returns the path of the report."""
    import pandas as pd

    from weakspot.audit.store.run import write_scores
    from weakspot.report.unit_page import unit_page

    pictures = {}
    for name, dissection in dissections.items():
        detectors = dissection.units[dissection.units["concept"].notna()]
        best = detectors.sort_values("iou", ascending=False)["unit"].head(SHOWN).tolist()
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
    write_atomic(out / "report.html", lambda draft: draft.write_text(content, "utf-8"))
    tables = {
        name: studies[name].units if studies else dissection.units for name, dissection in dissections.items()
    }
    for name, table in tables.items():
        write_atomic(out / f"{_file_name(name)}.csv", partial(table.to_csv, index=False))
    for name, study in studies.items():
        if study.masking is not None:
            write_atomic(out / f"{_file_name(name)}-masking.csv", partial(study.masking.to_csv, index=False))
    every = pd.concat([table.assign(layer=name) for name, table in tables.items()], ignore_index=True)
    write_scores(every, {**made, "seconds": round(session.seconds, 2)}, out)
    return out / "report.html"


def _find_concepts(dataset: Path | None, out: Path, classifier: Classifier, options: ConceptOptions) -> Path:
    """The folder in Broden's layout: as given, converted, or generated."""
    if dataset is None:
        side = min(classifier.input_size)
        folder = out / f"demo-concepts-{side}"
        return folder if (folder / "index.csv").is_file() else demo_concepts(folder, size=side)
    if not dataset.exists():
        raise Failure(f"{dataset}: no such folder")
    if (dataset / "index.csv").is_file() and options.masks is None:
        return dataset
    folder = out / "concepts"
    source = _source_of(dataset, options, out)
    if (folder / "index.csv").is_file():
        if (folder / SOURCE).is_file() and (folder / SOURCE).read_text("utf-8") == source:
            return folder
        raise Failure(
            f"{folder} holds the concepts of an earlier run with other images or options (give another --out, or "
            f"{folder} itself)"
        )
    try:
        void = [int(value) for value in options.void.split(",")] if options.void else []
    except ValueError:
        raise Failure(
            f"--void must be integers separated by commas such as 0,255, got {options.void!r}"
        ) from None
    built = build_concepts(dataset, folder, masks=options.masks, names=options.names, void=void)
    write_atomic(folder / SOURCE, lambda draft: draft.write_text(source, "utf-8"))
    return built


def _source_of(dataset: Path, options: ConceptOptions, out: Path) -> str:
    """What concepts are built from, as JSON: the options, and the files with their sizes and times."""
    files = [] if options.names is None else [options.names]
    for folder in (dataset, options.masks):
        inside = [] if folder is None else folder.rglob("*")
        # Hidden files are no images, and what this command writes is no source.
        files += [path for path in inside if not path.name.startswith(".") and not path.is_relative_to(out)]
    about = [(str(path.resolve()), path.stat()) for path in sorted(files) if path.is_file()]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in about]
    return json.dumps({"files": facts, "void": options.void, "masks": str(options.masks)})


def _last_layers(classifier: Classifier) -> list[str]:
    """The last layer of each of the two coarsest map sizes, among layers that are called once."""
    with evaluating(classifier):
        image = torch.zeros(1, classifier.channels, *classifier.input_size, device=classifier.mean.device)
        places = spatial_layers(classifier, image)
    # A layer that is called several times has no single map; later layers replace earlier ones of the same size.
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


def _table_row(name: str, dissection: Dissection) -> dict[str, str]:
    """A layer for the terminal: its units, its detectors and their most frequent concepts."""
    counts = dissection.units["concept"].value_counts()
    concepts = ", ".join(f"{concept} {number}" for concept, number in counts.head(8).items())
    concepts += ", ..." if len(counts) > 8 else ""
    units, detectors = str(len(dissection.units)), str(counts.sum())
    return {"layer": name, "units": units, "detectors": detectors, "concepts": concepts}


def _layer_json(name: str, dissection: Dissection) -> dict[str, object]:
    """A layer with the number of detectors of each concept."""
    counts = dissection.units["concept"].value_counts()
    found = {"units": len(dissection.units), "detectors": int(counts.sum())}
    return {
        "layer": name,
        **found,
        "concepts": {str(concept): int(number) for concept, number in counts.items()},
    }
