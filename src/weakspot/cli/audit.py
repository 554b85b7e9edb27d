"""`weakspot audit`: every attack in every region on every image, kept in a folder, resumable."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weakspot.cli.app import (
    RESUMABLE,
    UNREADABLE,
    USAGE,
    Failure,
    app,
    complain,
    note,
    notes_for_people,
    progress_bar,
)
from weakspot.cli.audit_options import (
    FailIfOption,
    FloatOption,
    JUnitOption,
    check_gate,
    known,
    parse_batch_size,
    pass_gate,
    plain,
    plan_table,
    tell_gate,
)
from weakspot.cli.inputs import class_names, image_size, numbers
from weakspot.cli.options import (
    ClassesOption,
    DebugOption,
    MeanOption,
    QuietOption,
    SizeOption,
    StdOption,
    WeightsOption,
    refuse_fraction,
)

if TYPE_CHECKING:
    from weakspot.audit import AuditProgress, Run, Summary
    from weakspot.audit.findings.gates import Verdict

EXAMPLES = """

[bold]Examples[/bold]

weakspot audit photos/ --model my_package.models:build --out runs/v7

weakspot audit photos/ --attacks pgd,few_pixel --set pixels.method=guided --regions none,cam,background --out runs/v7

weakspot audit cifar.npz --model nets:resnet20 --size 32x32 --budget linf:2/255,linf:8/255 --limit 500 --out runs/eps

weakspot audit photos/ --attacks fmn,pgd --regions cam,background --controls --out runs/weak_places

weakspot audit plan.toml

weakspot audit --resume runs/v7

weakspot audit --resume runs/v7 --fail-if "robust_accuracy < 0.4" --junit gate.xml

weakspot audit photos/ --model nets:resnet20 --engine ray --workers 8 --out runs/v7

weakspot audit s3://bucket/photos --model nets:resnet20 --out s3://bucket/runs/v7

duckdb -c "select attack, region, avg(success_8bit::int) from 'runs/v7/records.parquet' group by all"
"""
SHOWN = 5  # skipped images that are named; all are in skipped.parquet


@app.command(epilog=EXAMPLES)
def audit(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Pictures, folders, .npz or .npy arrays, by path or URL (s3://...); or one plan.toml, which "
            "options given beside it overrule.",
            show_default=False,
        ),
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            "--attacks", "-a", help="Separated by commas, see `weakspot attack --list`. [default: pgd]"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="For every attack that takes one; several make several of each. [default: linf:4/255]",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="ATTACK.NAME=VALUE of that attack's own arguments: --set pgd.steps=50."),
    ] = None,
    regions: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas, as --region of `weakspot attack`: none,cam,~cam. [default: none]"
        ),
    ] = None,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Attack in controls beside every region too: the region of each of --control-images other images, "
            "and the region shifted within the image. What tells a weak region from a large or a central one, for "
            "about 7 times the cost of the attacks in regions.",
        ),
    ] = None,
    control_images: Annotated[
        int | None,
        typer.Option(
            help="Other images whose regions are controls; with fewer the audit is cheaper and finds less. [default: 5]"
        ),
    ] = None,
    analyses: Annotated[
        str | None,
        typer.Option(help="Separated by commas, or all, or none. [default: overlap,promotion,propagation]"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="folders (named like classes), a CSV file (columns file, label), predictions (the model's own), or "
            "auto: what the array has, else folders where all match, else predictions. [default: auto]"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As for `weakspot attack`. [default: efficientnet_lite0]"),
    ] = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps. [default: auto]")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the image in the region cam. [default: 0.3]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many images, drawn by name and --seed. [default: all]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [default: 0]")] = None,
    maps: Annotated[
        bool | None, typer.Option("--maps/--no-maps", help="Keep maps and pictures. [default: maps]")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html at the end.")
    ] = True,
    batch_size: Annotated[
        str,
        typer.Option(help="Images attacked at once, or auto: as many as memory holds. Changes no result."),
    ] = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL for run.json, records.parquet, skipped.parquet, maps.zarr, report.html; out in a plan."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with the audit in this folder or at this URL, or repair it; no other images or plan options."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: several workers, here or on a cluster. Changes no result.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Of Ray. [default: one for each CPU, or GPU where the model is on one]")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, or auto. [default: RAY_ADDRESS, else one is started here]"),
    ] = None,
    floats: FloatOption = False,
    fail_if: FailIfOption = None,
    junit: JUnitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Attack every image in every way, in every region, and keep what was found: one row per image x attack x region.

    Killed at any moment, it goes on by --resume, and ends as if it had never stopped. Files that are no pictures are
    skipped and listed; while a listed image cannot be read any more, the audit is not complete and exits with 4. The
    same seed gives the same records whatever the batch size and the order of images.

    Robust accuracy counts an image as lost if the attacked image, stored with 8 bits, is misclassified, under attacks
    that look for the smallest change only if that is within the stated budget.

    A gate (--fail-if) is asked of every attack in every region: robust_accuracy, robust_low, robust_high,
    clean_accuracy, images, skipped, errors, region_fraction, and the mean of any score with NAME_low and NAME_high.
    With
    --resume of a finished audit it is asked at once. It never opens on an audit that is not complete.
    """
    del debug
    given = {
        "attacks": attacks, "budget": budget, "regions": regions, "controls": controls,
        "control_images": control_images, "analyses": analyses,
        "labels": labels, "fraction": fraction, "limit": limit, "seed": seed, "maps": maps,
    }  # fmt: skip
    network = {
        "spec": model, "weights": None if weights is None else str(weights), "mean": numbers("mean", mean),
        "std": numbers("std", std), "size": image_size(size), "device": device,
        "classes": None if classes is None else class_names(classes),
    }  # fmt: skip
    said = known({**given, "model": known(network) or None})
    sources = list(images or [])
    how: dict[str, Any] = {
        "batch_size": parse_batch_size(batch_size),
        "command": shlex.join(["weakspot", *sys.argv[1:]]), "engine": engine,
        "workers": workers, "address": ray_address,
    }  # fmt: skip
    conditions = list(fail_if or [])
    check_gate(conditions, junit)
    if resume is not None:
        if sources or said or settings or out is not None:
            raise Failure("--resume takes no images and no options of the plan: the folder holds them", USAGE)
        where: str = resume
    else:
        table, where = plan_table(sources, said, settings or [], out)
    started = time.perf_counter()
    with (
        redirect_stdout(sys.stderr),
        notes_for_people(quiet),
        _progress(quiet or as_json) as watch,
        _stopping(where),
    ):
        from weakspot.audit import Plan, open_run, summarize
        from weakspot.audit import audit as carry_out
        from weakspot.audit import resume as go_on
        from weakspot.audit.findings.summary import cell_table, undefined_names, unknown_cases

        if resume is not None:
            run = go_on(where, watch=watch, **how)
        else:
            plan = Plan.from_mapping(table)
            refuse_fraction(context, plan.regions, "--regions")
            if control_images is not None and not plan.controls:
                raise Failure("--control-images takes effect only with --controls", USAGE)
            run = carry_out(plan, where, watch=watch, **how)
        if floats:
            run = open_run(run.name, eight_bit=False)
        if report:
            _report(run)
    summary = summarize(run)
    shortfalls = [run.shortfall] if run.shortfall else []
    verdicts = pass_gate(
        conditions,
        lambda: cell_table(run, summary),
        _cell_name,
        junit,
        f"audit {run.name}",
        shortfalls=shortfalls,
        undefined=undefined_names,
        others=lambda rows: unknown_cases(run, rows),
    )
    _tell(run, summary, verdicts, time.perf_counter() - started, as_json=as_json, quiet=quiet)
    for sentence in shortfalls:
        complain(sentence)
    tell_gate(verdicts, quiet=quiet or as_json, shortfalls=shortfalls)
    if shortfalls or not (run.info.images and run.info.images.read):
        raise typer.Exit(UNREADABLE)


def _cell_name(row: Mapping[str, Any]) -> str:
    return f"{row['attack']} in {row['region']}"


@contextmanager
def _progress(silent: bool) -> Iterator[Any]:
    with progress_bar(silent) as advance:
        advance("loading the model", 0.0)

        def watch(standing: AuditProgress) -> None:
            speed = f", {standing.speed:.3g} images/s" if standing.speed else ""
            what = f"auditing {int(standing.done)}/{standing.total}{speed}"
            advance(what, standing.done / standing.total)

        yield watch


@contextmanager
def _stopping(where: str) -> Iterator[None]:
    """An interrupt, or a request to end, stops between any two steps; the folder can be resumed."""
    from weakspot._io.urls import exists
    from weakspot.audit import StoppedError

    def ask(*_: object) -> None:
        raise KeyboardInterrupt

    own = None
    if threading.current_thread() is threading.main_thread():
        own = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    except KeyboardInterrupt:
        begun = exists(f"{where.rstrip('/')}/run.json")
        go_on = f"go on by weakspot audit --resume {shlex.quote(where)}"
        raise Failure(f"interrupted; {go_on if begun else 'nothing was begun'}", RESUMABLE) from None
    except StoppedError as stopped:
        raise Failure(str(stopped), RESUMABLE if stopped.resumable else USAGE) from stopped
    finally:
        if own is not None:
            signal.signal(signal.SIGTERM, own)


def _report(run: Run) -> None:
    """Write the page; the audit is done, whether there is room for that or not."""
    from weakspot.audit.page.run_page import FILE, store_run_report

    try:
        store_run_report(run)
    except OSError as error:
        again = f"weakspot report {shlex.quote(run.name)}"
        note(
            f"{FILE} could not be written ({error.strerror or error}); the audit is whole: {again} tries again"
        )


def _tell(
    run: Run, summary: Summary, verdicts: Sequence[Verdict], seconds: float, *, as_json: bool, quiet: bool
) -> None:
    from weakspot._io.urls import is_url

    where = run.name if is_url(run.name) else str(run.folder.resolve())
    skipped = run.skipped
    if as_json:
        rows = json.loads(skipped.to_json(orient="records"))
        about = {
            "folder": where,
            "status": run.info.status,
            "counts": run.info.to_json().get("images"),
            "shortfall": run.shortfall,
        }
        typer.echo(
            json.dumps({**about, **summary.as_mapping(), **plain(verdicts), "skipped": rows}, indent=2)
        )
        return
    if quiet:
        return
    _print(summary, Console(highlight=False))
    console = Console(highlight=False, style="dim")
    for _, row in skipped.head(SHOWN).iterrows():
        console.print(
            escape(f"skipped {row['image']}: {row['reason'].removesuffix('; skipped')}"), soft_wrap=True
        )
    if len(skipped) > SHOWN:
        console.print(f"... and {len(skipped) - SHOWN} more, in skipped.parquet")
    tail = f", {len(skipped)} skipped" if len(skipped) else ""
    console.print(f"{summary.images} images audited{tail}, in {seconds:.1f} s")
    typer.echo(f"\nWritten to {where}")


def _print(summary: Summary, console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("attack", "budget", "region", "area", "images", "robust", "95% interval", "errors"):
        table.add_column(heading, overflow="fold", no_wrap=heading not in {"attack", "region"})
    for cell in summary.cells:
        table.add_row(
            escape(cell.attack),
            escape(cell.budget or ""),
            escape(cell.region),
            "" if math.isnan(cell.region_fraction) else f"{cell.region_fraction:.0%}",
            str(cell.images),
            "" if math.isnan(cell.robust_accuracy) else f"{cell.robust_accuracy:.1%}",
            "" if cell.low != cell.low else f"{cell.low:.1%} to {cell.high:.1%}",
            str(cell.errors or ""),
        )
    console.print(table)
    if summary.images:
        clean = summary.clean_accuracy
        known = (
            "Of no image a reading is known"
            if math.isnan(clean)
            else f"With nothing changed {clean:.1%} are read as their label"
        )
        said = f"{known}. Labels: {summary.labels}."
        console.print(f"\n{said}", soft_wrap=True)
    for sentence in (summary.weakest, *summary.regions, *summary.remarks):
        console.print(escape(sentence), soft_wrap=True)
