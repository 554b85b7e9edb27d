"""`weakspot defend`: what a defense is worth against attackers who know it."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weakspot.cli.app import UNREADABLE, USAGE, Failure, app, notes_for_people, progress_bar, watch
from weakspot.cli.defense_specs import find_defense
from weakspot.cli.inputs import (
    check_existing,
    check_sources,
    find_labels,
    load_classifier,
    located_pictures,
    shortened,
)
from weakspot.cli.options import (
    ClassesOption,
    DebugOption,
    DeviceOption,
    MeanOption,
    ModelOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    SizeOption,
    StdOption,
    WeightsOption,
    given,
    refuse,
)
from weakspot.cli.output import check_folder, describe_run, make_folder

if TYPE_CHECKING:
    import pandas as pd


FILES = ("defense.csv", "defense.json", "defense.png", "run.json")
WIDE = 125  # columns of a terminal that takes the table with what each row is
EXAMPLES = """

[bold]Examples[/bold]

weakspot defend photos/ --defense neutralize

weakspot defend photos/ --set fraction=0.1 --set fill=blur --budget linf:2/255 --labels folders

weakspot defend photos/ --set randomness=0.5 --draws 10

weakspot defend photos/ --defense mask_units --set layer=_blocks.5 --set units=3,17 --labels labels.csv

weakspot defend photos/ --defense my_package.defenses:jpeg --set quality=75 --limit 100
"""


@app.command(epilog=EXAMPLES)
def defend(
    context: typer.Context,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Pictures or folders of pictures.", show_default=False)
    ] = None,
    samples: SamplesOption = False,
    defense: Annotated[
        str,
        typer.Option(
            "--defense",
            "-D",
            help="neutralize, mask_units, or package.module:factory: a function that takes the undefended model "
            "(images in [0, 1] to logits) and returns the defended one, a torch module of the same kind.",
        ),
    ] = "neutralize",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of the defense's own arguments: fraction, fill, randomness, seed of neutralize; layer, "
            "units of mask_units.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="A CSV file with the columns file and label (name or number of the class), or 'folders': each "
            "picture's folder is named for its class. The model's own predictions by default.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option("--budget", "-b", help="How much attacks may change: linf:4/255, l2:1.5, ssim:0.01."),
    ] = "linf:4/255",
    limit: Annotated[
        int | None,
        typer.Option(help="Use at most this many pictures, chosen by the seed.", min=1, show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each restart of PGD.", min=1)] = 30,
    fraction: Annotated[
        float,
        typer.Option(
            help="Fraction of the image that the attack inside the region of importance may change."
        ),
    ] = 0.3,
    draws: Annotated[
        int, typer.Option(help="Draws of a random defense that attacks average over.", min=1)
    ] = 4,
    queries: Annotated[
        int,
        typer.Option(
            help="Most queries of one square search; from 500 on they are doubled while it still gains.",
            min=1,
        ),
    ] = 4000,
    substitute: Annotated[
        str | None,
        typer.Option(
            help="Another model, named as --model is, for one more transferred attack.", show_default=False
        ),
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="With neutralize: a row for the region of the clean image, which no defender has.",
        ),
    ] = False,
    thorough: Annotated[bool, typer.Option("--thorough", help="Also the ensemble of attacks: slow.")] = False,
    model: ModelOption = "efficientnet_lite0",
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    out: Annotated[Path, typer.Option(help=f"Folder for {', '.join(FILES)}.")] = Path("weakspot-defend"),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print verdict and table as JSON.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate a defense by attackers who know it.

    Prints a verdict (protects, no protection, or cannot be judged) and a table: the accuracy of the undefended and of
    the defended model under the same attacks, each tried on the images that withstood those before it.
    """
    del debug
    started = time.perf_counter()
    sources = list(images or [])
    check_sources(sources, pair=False, samples=samples)
    watch(context, out, FILES)
    check_folder(out)
    _check_apart(out, sources)
    check_existing(sources)
    if oracle and defense != "neutralize":
        raise Failure(f"--oracle goes with --defense neutralize, not with {defense}", USAGE)
    with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(quiet) as advance:
        from weakspot._checks import check_fraction
        from weakspot.budgets import read_budget
        from weakspot.classifier import check_images
        from weakspot.defenses import evaluate_defense, oracle_neutralized, verdict
        from weakspot.defenses.randomized import is_random

        spent = read_budget(budget)
        check_fraction(fraction, name="fraction")
        advance("loading the model", 0.0)
        classifier = load_classifier(model, weights, mean, std, classes, size, device)
        defended = find_defense(defense, settings or [], classifier)
        other = None
        if substitute is not None:
            sides = "x".join(map(str, classifier.input_size))
            other = load_classifier(substitute, None, None, None, None, sides, device)
        batch, paths, skipped, unread = located_pictures(classifier, sources, samples=samples)
        if given(context, ["draws"]) and not is_random(defended, check_images(batch, classifier), seed=seed):
            refuse(context, ["draws"], f"with {defense}, which is not random; leave it out")
        truth, where = find_labels(labels, classifier, batch, paths)
        if limit is not None and limit < len(batch):
            chosen = sorted(random.Random(seed).sample(range(len(batch)), limit))  # noqa: S311 - no secret
            batch, truth, paths = batch[chosen], truth[chosen], [paths[index] for index in chosen]
        make_folder(out)
        module = getattr(defended, "network", None)
        own = {key: getattr(module, key) for key in ("fraction", "fill") if oracle}
        table = evaluate_defense(
            classifier, defended, batch, truth, budget=spent, steps=steps, fraction=fraction, draws=draws,
            queries=queries, substitute=other, thorough=thorough, seed=seed,
            oracle=partial(oracle_neutralized, classifier, **own) if oracle else None,
            progress=lambda done: advance(f"attacking {len(batch)} images", 0.1 + 0.85 * done),
        )  # fmt: skip
        result = verdict(table)
        advance("writing", 0.97)
        about = {
            "defense": ", ".join([defense, *(settings or [])]),
            "status": result.status,
            "verdict": result.sentence,
            "attacks": f"{spent}, {steps} steps, at most {queries} queries, {draws} draws of a random defense, region "
            f"of importance {fraction:.0%}",
            "substitute": substitute or "none",
            "labels": where,
            "images": paths if samples else shortened(paths),
            **describe_run(classifier, model, seed, skipped),
        }
        _write(out, table, about, f"{classifier.name}, {about['defense']}, {len(batch)} images, {spent}")
    if as_json:
        typer.echo(
            json.dumps(
                {
                    **_as_json(table, about),
                    "skipped": skipped,
                    "folder": str(out.resolve()),
                },
                indent=2,
            )
        )
    elif not quiet:
        meanings = _meanings(steps, substitute, table)
        _print(table, result.sentence, where, meanings, len(skipped), time.perf_counter() - started)
        typer.echo(f"\nWritten to {out.resolve()}; look at defense.png")
    if unread:
        raise typer.Exit(UNREADABLE)


def _check_apart(out: Path, sources: Sequence[Path]) -> None:
    """Raises Failure where what is written would be read, as a picture, in this run or the next."""
    folder = out.resolve()
    for source in (source.resolve() for source in sources if source.is_dir()):
        if source == folder or (source in folder.parents and (folder / "defense.png").exists()):
            raise Failure(f"out is {out}, inside a folder of pictures to be read; give another folder", USAGE)


def _as_json(table: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, Any]:
    rows = json.loads(table.to_json(orient="records", double_precision=9))
    return {
        "status": about["status"],
        "verdict": about["verdict"],
        "defense": about["defense"],
        "labels": about["labels"],
        "images": len(about["images"]),
        "attacks": rows,
    }


def _write(out: Path, table: pd.DataFrame, about: Mapping[str, Any], title: str) -> None:
    """All files, run.json last."""
    from weakspot._io.files import write_atomic
    from weakspot.audit.store.run_folder import write_scores
    from weakspot.report.figures import accuracy_figure

    text = json.dumps(_as_json(table, about), indent=2) + "\n"
    write_atomic(out / "defense.json", lambda draft: draft.write_text(text, "utf-8"))
    figure = accuracy_figure(table, f"{about['verdict']} {title}")
    write_atomic(out / "defense.png", lambda draft: figure.savefig(draft, dpi=120, format="png"))
    write_scores(table, about, out, name="defense.csv")


def _meanings(steps: int, substitute: str | None, table: pd.DataFrame) -> dict[str, str]:
    """What each row is, in few words."""
    from weakspot.defenses import verdicts as rows

    meanings = {
        rows.CLEAN: "no attack",
        rows.TRANSFERRED: f"PGD-{steps} on the undefended model: the naive figure",
        rows.SUBSTITUTE: f"momentum iterations on {substitute}",
        rows.OWN: f"PGD-{steps} on the model's own gradients",
        rows.STRAIGHT: "PGD led by the network inside the defended model",
        rows.UNDEFENDED_GRADIENTS: "PGD led by the undefended model",
        rows.REGION: "PGD on its own gradients, only there",
        rows.ENSEMBLE: "Auto-PGD on two losses, targeted, square search",
        rows.ORACLE: "region of the clean image: no defender has it",
    }
    families = {
        rows.DRAWS: "the same on the mean of more draws",
        rows.QUERIES: "random squares, no gradients",
    }

    def meaning(name: str) -> str:
        family = (text for start, text in families.items() if name.startswith(start.partition("{")[0]))
        return meanings.get(name) or next(family)

    return {name: meaning(name) for name in table["attack"]}


def _print(
    table: pd.DataFrame,
    sentence: str,
    where: str,
    meanings: Mapping[str, str],
    skipped: int,
    seconds: float,
) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{escape(sentence)}[/bold]\n", soft_wrap=True)
    wide = console.width >= WIDE
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("left after", "undefended", "95%", "defended", "95%", *(["made how"] if wide else [])):
        shown.add_column(
            heading, justify="right" if heading in {"undefended", "defended"} else "left", no_wrap=True
        )
    for _, row in table.iterrows():
        name = str(row["attack"])
        cells = [
            cell
            for side in ("undefended", "defended")
            for cell in (f"{row[side]:.0%}", f"{row[f'{side}_low']:.0%}-{row[f'{side}_high']:.0%}")
        ]
        shown.add_row(name, *cells, *([meanings[name]] if wide else []))
    console.print(shown)
    if not wide:
        legend = (f"{name}: {meaning}" for name, meaning in meanings.items())
        console.print("\n" + escape("\n".join(legend)), style="dim", soft_wrap=True)
    console.print(
        "\nEach attack is tried on the images that withstood those above it; attacked images are rounded to 8 bits.",
        soft_wrap=True,
    )
    console.print(f"Labels: {escape(where)}.", soft_wrap=True)
    if where.startswith("the model's own"):
        console.print(
            "So the undefended model's clean accuracy is 100% by definition; --labels shows what a defense costs.",
            soft_wrap=True,
        )
    tail = f", {skipped} skipped" if skipped else ""
    console.print(f"\n{int(table['images'].iloc[0])} images{tail} in {seconds:.1f} s", style="dim")
