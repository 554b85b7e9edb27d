"""`weakspot dissect`: what the units of a network stand for."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from weakspot.cli.app import UNREADABLE, USAGE, Failure, app, notes_for_people, progress_bar, watch
from weakspot.cli.attacked_units import BUDGET, OPTIONS, AttackedUnits, attack_units, read_asked, read_mask
from weakspot.cli.inputs import check_existing, load_classifier
from weakspot.cli.options import (
    ClassesOption,
    DebugOption,
    DeviceOption,
    MeanOption,
    ModelOption,
    QuietOption,
    SeedOption,
    SizeOption,
    StdOption,
    WeightsOption,
    refuse,
)
from weakspot.cli.output import check_folder, describe_run, make_folder, print_rows

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.classifier import Classifier
    from weakspot.dissection import Dissection

FILES = ("cache", "concepts", "demo-concepts-*", "report.html", "*.csv", "run.json")
SHOWN = 40  # units of a layer whose pictures are shown
EXAMPLES = """

[bold]Examples[/bold]

weakspot dissect --demo

weakspot dissect broden1_224/ --layer layer4 --model torchvision:resnet18

weakspot dissect photos/ --masks labels/ --names classes.txt --void 11 --out runs/camvid

weakspot dissect textures/ --layer features.12 --layer features.18 --model my_package.models:build

weakspot dissect broden1_224/ --images photos/ --budget linf:2/255 --mask sensitive
"""


@app.command(epilog=EXAMPLES)
def dissect(
    context: typer.Context,
    dataset: Annotated[
        Path | None,
        typer.Argument(
            help="A folder in Broden's layout (index.csv, label.csv, images/); or of pictures, with --masks or with "
            "one subfolder for each label.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Generate pictures of colors and textures, and dissect with those."),
    ] = False,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="A module whose output is a map; may be given several times. The last of each of the two "
            "coarsest map sizes by default."
        ),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of PNGs named as the pictures; pixels are class numbers.")
    ] = None,
    names: Annotated[Path | None, typer.Option(help="Names of the classes in --masks, one per line.")] = None,
    void: Annotated[str | None, typer.Option(help="Class numbers that mean nothing: 0,255.")] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            help="Share of all sites at which a unit is active: 0.005, or 0.01 with --demo, whose concepts are large.",
            show_default=False,
        ),
    ] = None,
    min_iou: Annotated[float, typer.Option(help="Least intersection over union that counts.")] = 0.04,
    denominator: Annotated[
        str, typer.Option(help="Sites that the union counts: category, activated or all.")
    ] = "category",
    alignment: Annotated[
        str, typer.Option(help="Where a map's cells lie: receptive_field, effective or resize.")
    ] = "receptive_field",
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Pictures or folders to attack; may be given several times. Shows which units move more than under "
            "noise, and whether those that stand for something move more.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", "-b", help=f"Of the attack on --images: {BUDGET} by default.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the attack on --images.", min=1)] = 20,
    mask: Annotated[
        str | None,
        typer.Option(
            help="Mask units and attack again: sensitive (at most a fifth of the layer), sensitive:COUNT, or unit "
            "numbers such as 3,17. Sensitive units are chosen on one half of --images and judged on the other.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    model: ModelOption = "efficientnet_lite0",
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, a table for each layer, run.json.")
    ] = Path("weakspot-units"),
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the detectors as JSON.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find what the units of a network stand for: which concept's sites agree with the sites where a unit is active.

    With --images also which units an attack moves more than noise of the same size does. Dissections are kept in
    OUT/cache, and given back for the same network, pictures and options.
    """
    del debug
    started = time.perf_counter()
    if demo == (dataset is not None):
        raise Failure("give either a folder of labeled pictures or --demo", USAGE)
    watch(context, out, FILES)
    if demo:
        refuse(
            context,
            ["masks", "names", "void"],
            "with --demo, whose pictures come with theirs; leave out one or the other",
        )
    if masks is None:
        refuse(context, ["names", "void"], "without --masks; add the folder of masks, or leave it out")
    if not images:
        refuse(context, OPTIONS, "without --images; add pictures to attack, or leave it out")
    wanted = read_mask(mask, len(layer or []))
    check_folder(out)
    check_existing(images or [])
    with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(quiet or as_json) as advance:
        advance("loading the model", 0.0)
        classifier = load_classifier(model, weights, mean, std, classes, size, device)
        asked = read_asked(classifier, images, budget, steps, wanted, seed) if images else None
        make_folder(out)
        advance("reading the pictures", 0.02)
        concepts = _concepts(dataset, out, classifier, masks, names, void)
        from weakspot.dissection import dissect_layers

        layers = list(layer or _last_layers(classifier))
        fraction_active = (0.01 if demo else 0.005) if quantile is None else quantile
        found = dissect_layers(
            classifier, layers, concepts, quantile=fraction_active, min_iou=min_iou, denominator=denominator,
            alignment=alignment, cache=out / "cache",
            progress=lambda fraction: advance("dissecting", 0.05 + (0.45 if asked else 0.8) * fraction),
        )  # fmt: skip
        attacked = attack_units(
            classifier, found, asked, lambda fraction: advance("attacking", 0.5 + 0.35 * fraction)
        )
        advance("drawing", 0.9)
        options = {name: str(value) for name, value in asdict(next(iter(found.values())).options).items()}
        made = {
            "concepts": f"{concepts}" if dataset else "colors and textures that weakspot generated",
            "layers": ", ".join(layers),
            **{name: value for name, value in options.items() if name != "dataset"},
            **({"attack": attacked.attack} if asked else {}),
            **describe_run(classifier, model, seed, asked.skipped if asked else []),
        }
        page, seconds = _write(out, classifier, concepts, found, attacked, made, started)
    rows = _rows(found)
    if as_json:
        files = {"report.html": str(page.resolve())}
        typer.echo(json.dumps({"layers": rows, **attacked.as_json(), "files": files}, indent=2))
    elif not quiet:
        print_rows(rows, as_json=False)
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        for line in attacked.lines():
            console.print(f"\n{line}")
        console.print(f"\n{len(layers)} layers in {seconds:.1f} s", style="dim")
        console.print(f"\nReport: {page.resolve()}")
    if asked and asked.unread:
        raise typer.Exit(UNREADABLE)


def _write(
    out: Path,
    classifier: Classifier,
    concepts: Path,
    found: dict[str, Dissection],
    attacked: AttackedUnits,
    made: dict[str, str],
    started: float,
) -> tuple[Path, float]:
    """All files; returns the page's path and the seconds that all took."""
    from weakspot._io.files import write_atomic
    from weakspot.audit.store.run_folder import write_scores
    from weakspot.dissection.unit_examples import show_units
    from weakspot.report.unit_page import unit_page

    pictures = {}
    for name, one in found.items():
        best = one.units.sort_values("iou", ascending=False)["unit"].head(SHOWN).tolist()
        pictures[name] = show_units(classifier, one, concepts, best)
    page, studies = out / "report.html", attacked.studies
    content = unit_page(
        found, pictures, model=classifier.name, made=made, studies=studies, together=attacked.sentences
    )
    write_atomic(page, lambda draft: draft.write_text(content, "utf-8"))
    tables = {name: studies[name].units if studies else one.units for name, one in found.items()}
    for name, table in tables.items():
        write_atomic(out / f"{_file(name)}.csv", partial(table.to_csv, index=False))
    for name, study in studies.items():
        if study.masking is not None:
            write_atomic(out / f"{_file(name)}-masking.csv", partial(study.masking.to_csv, index=False))
    seconds = time.perf_counter() - started
    write_scores(_together(tables), {**made, "seconds": round(seconds, 2)}, out)
    return page, seconds


def _concepts(
    dataset: Path | None,
    out: Path,
    classifier: Classifier,
    masks: Path | None,
    names: Path | None,
    void: str | None,
) -> Path:
    """The folder in Broden's layout: the one given, or made of it, or generated."""
    from weakspot.dissection import build_concepts, demo_concepts

    if dataset is None:
        side = min(classifier.input_size)
        folder = out / f"demo-concepts-{side}"
        return folder if (folder / "index.csv").is_file() else demo_concepts(folder, size=side)
    if not dataset.exists():
        raise Failure(f"{dataset}: there is no such folder", USAGE)
    if (dataset / "index.csv").is_file() and masks is None:
        return dataset
    folder = out / "concepts"
    if (folder / "index.csv").is_file():
        raise Failure(f"{folder} holds concepts from before; give another --out, or {folder} itself", USAGE)
    try:
        values = [int(value) for value in void.split(",")] if void else []
    except ValueError:
        raise Failure(f"void is {void!r}; accepted are whole numbers such as 0,255", USAGE) from None
    return build_concepts(dataset, folder, masks=masks, names=names, void=values)


def _last_layers(classifier: Classifier) -> list[str]:
    """The last layer of each of the two coarsest map sizes, of those that are called once."""
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


def _file(layer: str) -> str:
    return (
        "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in layer).lstrip(".")
        or "layer"
    )


def _rows(found: dict[str, Dissection]) -> list[dict[str, str]]:
    """One row per layer, for people."""
    rows = []
    for name, one in found.items():
        detectors = one.units[one.units["concept"].notna()]
        counts = detectors.groupby("concept").size().sort_values(ascending=False)
        rows.append(
            {
                "layer": name,
                "units": str(len(one.units)),
                "stand for a concept": str(len(detectors)),
                "concepts": ", ".join(f"{concept} {number}" for concept, number in counts.head(8).items()),
            }
        )
    return rows


def _together(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([table.assign(layer=name) for name, table in tables.items()], ignore_index=True)
