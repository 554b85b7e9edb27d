"""`weakspot defend`: what a defence is worth against attackers who know of it."""

from __future__ import annotations

import json
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

from weakspot.cli.app import UNREADABLE, USAGE, Failure, app, notes_for_people, progress_bar
from weakspot.cli.defenses import find_defense
from weakspot.cli.given import given, refuse
from weakspot.cli.inputs import (
    check_existing,
    check_sources,
    load_classifier,
    located_pictures,
    shortened,
)
from weakspot.cli.kept import watch
from weakspot.cli.labels import find_labels
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
)
from weakspot.cli.output import check_folder, describe_run, make_folder

if TYPE_CHECKING:
    import pandas as pd


FILES = ("defence.csv", "defence.json", "defence.png", "run.json")
WIDE = 125  # columns of a terminal that takes the table with what each row is
EXAMPLES = """

[bold]Examples[/bold]

weakspot defend photos/ --defense neutralize

weakspot defend photos/ --set keep=0.1 --set fill=blur --budget linf:2/255 --labels folders

weakspot defend photos/ --set randomness=0.5 --draws 10

weakspot defend photos/ --defense mask_units --set layer=_blocks.5 --set units=3,17 --labels labels.csv

weakspot defend photos/ --defense my_package.defences:jpeg --set quality=75 --thorough
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
            help="neutralize, mask_units, or package.module:factory, a function that is given the bare model, which "
            "takes images in [0, 1], and returns a torch module that takes the same.",
        ),
    ] = "neutralize",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of the defence's own arguments: keep, fill, randomness, seed of neutralize; layer, units "
            "of mask_units.",
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
    steps: Annotated[int, typer.Option(help="Gradient steps of each attack.", min=1)] = 20,
    keep: Annotated[
        float,
        typer.Option(help="Share of the image that the attack inside the region of importance may change."),
    ] = 0.3,
    draws: Annotated[
        int, typer.Option(help="Draws of a random defence that attacks average over.", min=1)
    ] = 1,
    queries: Annotated[
        int, typer.Option(help="Of the attack without gradients, for each image; 0 leaves it out.", min=0)
    ] = 100,
    substitute: Annotated[
        str | None,
        typer.Option(
            help="Another model, named as --model is, that the transferred attack is made for; the bare model itself "
            "by default.",
            show_default=False,
        ),
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="With neutralize: a row for the region of the clean image, which no defender has.",
        ),
    ] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Also the ensemble of attacks, on both models: slow.")
    ] = False,
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
    """Judge a defence by attacks that were made for the bare model, and by attackers who know of it.

    One table: accuracy of the bare and of the defended model under the same attacks, with intervals, and one sentence.
    The attack on the bare model, replayed, says nothing of an informed attacker; the worst of all attacks does.
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
    with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(quiet or as_json) as advance:
        from weakspot.budgets import read_budget
        from weakspot.checks import check_share
        from weakspot.classifier import check_images
        from weakspot.defenses import judge_defense, oracle_neutralized, verdict
        from weakspot.defenses.randomness import is_random

        spent = read_budget(budget)
        check_share(keep)
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
        make_folder(out)
        module = getattr(defended, "network", None)
        own = {key: getattr(module, key) for key in ("keep", "fill") if oracle}
        judged = judge_defense(
            classifier, defended, batch, truth, budget=spent, steps=steps, keep=keep, draws=draws, queries=queries,
            substitute=other, thorough=thorough, seed=seed,
            oracle=partial(oracle_neutralized, classifier, **own) if oracle else None,
            progress=lambda share: advance("attacking", 0.1 + 0.85 * share),
        )  # fmt: skip
        said = verdict(judged)
        advance("writing", 0.97)
        about = {
            "defense": ", ".join([defense, *(settings or [])]),
            "verdict": said,
            "attacks": f"{spent}, {steps} steps, {queries} queries, {draws} draws, region of importance {keep:.0%}",
            "transfer": f"made for {substitute or 'the bare model'}",
            "labels": where,
            "images": paths if samples else shortened(paths),
            **describe_run(classifier, model, seed, skipped),
        }
        _write(out, judged, about, f"{classifier.name}, {about['defense']}, {len(batch)} images, {spent}")
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "verdict": said,
                    **_as_json(judged, about),
                    "skipped": skipped,
                    "folder": str(out.resolve()),
                },
                indent=2,
            )
        )
    elif not quiet:
        told = _meanings(steps, queries, draws, substitute)
        _print(judged, said, where, told, len(batch), len(skipped), time.perf_counter() - started)
        typer.echo(f"\nWritten to {out.resolve()}; look at defence.png")
    if unread:
        raise typer.Exit(UNREADABLE)


def _check_apart(out: Path, sources: Sequence[Path]) -> None:
    """Raises Failure where what is written would be read, as a picture, in this run or the next."""
    folder = out.resolve()
    for source in (source.resolve() for source in sources if source.is_dir()):
        if source == folder or (source in folder.parents and (folder / "defence.png").exists()):
            raise Failure(f"out is {out}, inside a folder of pictures to be read; give another folder", USAGE)


def _as_json(judged: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, Any]:
    rows = json.loads(judged.to_json(orient="records", double_precision=9))
    return {
        "defense": about["defense"],
        "labels": about["labels"],
        "images": len(about["images"]),
        "attacks": rows,
    }


def _write(out: Path, judged: pd.DataFrame, about: Mapping[str, Any], title: str) -> None:
    """All files, run.json last."""
    from weakspot.report.accuracies import accuracy_figure
    from weakspot.runs.folder import write_scores
    from weakspot.writing import write_whole

    text = json.dumps({"verdict": about["verdict"], **_as_json(judged, about)}, indent=2) + "\n"
    write_whole(out / "defence.json", lambda draft: draft.write_text(text, "utf-8"))
    figure = accuracy_figure(judged, f"{about['verdict']} {title}")
    write_whole(out / "defence.png", lambda draft: figure.savefig(draft, dpi=120, format="png"))
    write_scores(judged, about, out, name="defence.csv")


def _meanings(steps: int, queries: int, draws: int, substitute: str | None) -> dict[str, str]:
    """What each row is, in few words."""
    mean = f", mean of {draws} draws" if draws > 1 else ""
    return {
        "clean": "no attack",
        "replayed": f"PGD-{steps} on the bare model: the naive figure",
        "transfer": f"momentum iterations on {substitute or 'the bare model'}",
        "white box": f"PGD-{steps} through the defence (BPDA){mean}",
        "bare gradients": f"PGD-{steps} on its answers, led by the bare model{mean}",
        "inside the region of importance": f"PGD-{steps} through the defence, only there{mean}",
        "black box": f"square search, {queries} queries, no gradients",
        "ensemble": f"Auto-PGD on two losses, targeted, squares{mean}",
        "worst of all": "images that stand against every attack: adaptive",
        "replayed, oracle region": "region of the clean image: no defender has it",
    }


def _print(
    judged: pd.DataFrame,
    said: str,
    where: str,
    told: Mapping[str, str],
    count: int,
    skipped: int,
    seconds: float,
) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{escape(said)}[/bold]\n", soft_wrap=True)
    wide = console.width >= WIDE
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("attack", "bare", "95%", "defended", "95%", *(["made how"] if wide else [])):
        table.add_column(
            heading, justify="right" if heading in {"bare", "defended"} else "left", no_wrap=True
        )
    for _, row in judged.iterrows():
        name = str(row["attack"])
        cells = [
            cell
            for side in ("bare", "defended")
            for cell in (f"{row[side]:.0%}", f"{row[f'{side}_low']:.0%}-{row[f'{side}_high']:.0%}")
        ]
        cells += [told[name]] if wide else []
        table.add_row(name, *cells, style="bold" if name == "worst of all" else None)
    console.print(table)
    if not wide:
        legend = (f"{name}: {told[name]}" for name in judged["attack"])
        console.print("\n" + escape("\n".join(legend)), style="dim", soft_wrap=True)
    console.print(f"\nLabels: {escape(where)}.", soft_wrap=True)
    if where.startswith("the model's own"):
        console.print(
            "So the bare model's clean accuracy is 100% by definition; give --labels to see what a defence costs.",
            soft_wrap=True,
        )
    tail = f", {skipped} skipped" if skipped else ""
    console.print(f"\n{count} images{tail} in {seconds:.1f} s", style="dim")
