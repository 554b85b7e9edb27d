"""`weakspot audit`: every attack in every region on every image, stored in a folder, resumable."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from weakspot._interrupts import INTERRUPTED, NOTHING_WRITTEN
from weakspot._io.urls import exists, is_url
from weakspot._progress import Display, Step
from weakspot.cli.app import RESUMABLE, UNREADABLE, Failure, command, complain, note
from weakspot.cli.gate_options import Gate, GateOptions
from weakspot.cli.options import (
    OUTPUT,
    QUICK_STEPS,
    EveryOption,
    FloatOption,
    ModelOptions,
    OutputOptions,
    QuickOption,
    argument,
    flag,
    option,
    refuse,
    refuse_fraction,
    trial_sentence,
)
from weakspot.cli.output import (
    add_row,
    first_rows,
    json_rows,
    make_table,
    print_json,
    print_table,
    print_text,
    working,
)
from weakspot.cli.plan_options import (
    EngineOptions,
    PlanOptions,
    given_options,
    plan_table,
    quick_plan,
    with_steps,
)
from weakspot.cli.session import command_line
from weakspot.statistics.number_format import counted, percent, with_interval

if TYPE_CHECKING:
    from weakspot.audit import AuditProgress, Run, Summary
    from weakspot.audit.findings.gates import Verdict

SHOWN = 5  # skipped images that are named; skipped.parquet has all
FILES = "run.json, records.parquet, skipped.parquet, maps.zarr, report.html"


@command(
    "weakspot audit photos/ --model my_package.models:build --out runs/v7",
    "weakspot audit photos/ --attacks pgd,few_pixel --set few_pixel.method=guided --regions none,cam --out runs/v7",
    "weakspot audit cifar.npz --model nets:resnet20 --size 32x32 --budget linf:2/255,linf:8/255 --out runs/eps",
    "weakspot audit photos/ --attacks minimal_pgd,pgd --regions cam,background --controls --out runs/weak_places",
    "weakspot audit plan.toml",
    "weakspot audit --resume runs/v7",
    "weakspot audit --resume runs/v7 --fail-if 'robust_accuracy < 0.4' --junit gate.xml",
    "weakspot audit s3://bucket/photos --engine ray --workers 8 --out s3://bucket/runs/v7",
    "duckdb -c \"select attack, region, avg(success_8bit::int) from 'runs/v7/records.parquet' group by all\"",
)
def audit(
    context: typer.Context,
    plan: PlanOptions,
    network: ModelOptions,
    execution: EngineOptions,
    gate: GateOptions,
    output: OutputOptions,
    images: Annotated[
        list[str] | None,
        argument(
            "IMAGES",
            "Image files, folders, .npz or .npy arrays, as paths or URLs (s3://...); or one plan.toml.",
        ),
    ] = None,
    out: Annotated[
        str | None, option("FOLDER", f"Folder or URL for {FILES}.", default="out in plan.toml")
    ] = None,
    resume: Annotated[
        str | None,
        option(
            "RUN",
            "Continue or repair the audit in this folder or at this URL. Takes no images and no plan options.",
        ),
    ] = None,
    report: Annotated[
        bool, flag("--report/--no-report", "Write report.html at the end.", panel=OUTPUT)
    ] = True,
    floats: FloatOption = False,
    quick: QuickOption = False,
    every: EveryOption = False,
) -> None:
    """Attack every image with every attack in every region: one row per image x attack x region.

    If the audit is interrupted, --resume continues it, with the same result as without the interrupt. The same seed
    gives the same records for every order of images and number of workers; another `group` in plan.toml (images per
    pass through the model) can change their last digits. Files that are not images are skipped and listed. If images
    can no longer be read, the audit is incomplete and exits with code 4.

    Robust accuracy counts an image as lost if the attacked image, stored with 8 bits, is misclassified. A
    change that exceeds the stated budget does not count; minimal-norm attacks need one stated budget.

    The conditions of --fail-if are evaluated for every attack in every region: robust_accuracy, robust_low,
    robust_high, clean_accuracy, images, skipped, errors, region_fraction, and the mean of any score with NAME_low
    and NAME_high. With --resume of a finished audit they are evaluated at once. On an incomplete audit they fail.
    """
    started = time.perf_counter()
    gate.check()
    overrides = given_options(context, plan, network)
    settings = list(plan.settings or [])
    if resume is None:
        _check_steps(context, plan, settings, quick=quick)
        table, where = plan_table(list(images or []), overrides, settings, out)
        table = table if plan.steps is None else with_steps(table, plan.steps)
        table = quick_plan(table) if quick else table
    elif images or overrides or settings or plan.steps or quick or out is not None:
        raise Failure("--resume takes no images and no plan options, because the run holds them")
    else:
        table, where = {}, resume
    with working(quiet=output.quiet, silent=output.silent) as display:
        watch = _watcher(display)
        with _resumable(where):
            from weakspot import audit as audits
            from weakspot.audit.findings.gates import judge
            from weakspot.audit.findings.summary import cell_table, undefined_names, unknown_cases

            work: Callable[..., Run] = audits.resume
            if resume is None:
                resolved = audits.Plan.from_mapping(table)
                refuse_fraction(context, resolved.regions, "--regions")
                if "control_images" in overrides and not resolved.controls:
                    raise Failure("--control-images has no effect without --controls")
                work = partial(audits.audit, resolved)
            run = work(
                where,
                command=command_line(),
                watch=watch,
                engine=execution.engine,
                workers=execution.workers,
                address=execution.ray_address,
            )
            # The records hold both counts, so the run is only opened another way.
            if floats:
                run = audits.open_run(run.name, eight_bit=False)
            if report:
                _write_report(run)
    summary = audits.summarize(run)

    def evaluate(conditions: Sequence[str]) -> Sequence[Verdict]:
        rows = cell_table(run, summary)
        others = unknown_cases(run, rows)
        return judge(conditions, rows, _cell_name, undefined=undefined_names, others=others)

    shortfalls = [run.shortfall] if run.shortfall else []
    result = gate.evaluate(evaluate, f"audit {run.name}", shortfalls)
    if output.as_json:
        print_json(_document(run, summary, result))
    elif not output.quiet:
        trial = trial_sentence(f"at most {QUICK_STEPS}") if quick else ""
        _print(run, summary, time.perf_counter() - started, every=every, trial=trial)
    for sentence in shortfalls:
        complain(sentence)
    result.announce(silent=output.silent)
    if shortfalls or not (run.info.images and run.info.images.read):
        raise typer.Exit(UNREADABLE)


def _check_steps(context: typer.Context, plan: PlanOptions, settings: Sequence[str], *, quick: bool) -> None:
    """Refuse steps that are given in two ways, and what --quick sets."""
    if quick:
        refuse(context, ["limit", "steps"], "with --quick, which sets them (leave out one of the two)")
    name = "--quick" if quick else "--steps" if plan.steps is not None else None
    if name and any(setting.partition("=")[0].endswith(".steps") for setting in settings):
        raise Failure(f"{name} and --set ATTACK.steps=N must not both be given (leave out one of the two)")


def _watcher(display: Display) -> Callable[[AuditProgress], None]:
    """A function that shows the progress of an audit."""
    display.step("loading the model")
    step: Step | None = None

    def watch(progress: AuditProgress) -> None:
        nonlocal step
        step = step or display.step("auditing", total=progress.total)
        step(progress.done / progress.total)

    return watch


@contextmanager
def _resumable(where: str) -> Iterator[None]:
    """Turn an interrupt, between any two steps, into a sentence that says how to continue."""
    from weakspot.audit import AuditInterrupt, StoppedError

    try:
        yield
    except AuditInterrupt as interrupted:
        raise Failure(f"interrupted; {interrupted}", RESUMABLE) from None
    except KeyboardInterrupt:
        # Without run.json there is nothing that --resume could continue.
        if not exists(f"{where.rstrip('/')}/run.json"):
            raise Failure(NOTHING_WRITTEN, INTERRUPTED) from None
        remedy = f"continue with weakspot audit --resume {shlex.quote(where)}"
        raise Failure(f"interrupted; {remedy}", RESUMABLE) from None
    except StoppedError as stopped:
        raise Failure(str(stopped), RESUMABLE if stopped.resumable else 2) from stopped


def _write_report(run: Run) -> None:
    """Write the report. The audit is complete even if there is no room for it."""
    from weakspot.audit.page.run_page import FILE, store_run_report

    try:
        store_run_report(run)
    except OSError as error:
        note(
            f"{FILE} could not be written ({error.strerror or error}); the audit is complete (run weakspot report "
            f"{shlex.quote(run.name)} to try again)",
            failure=True,
        )


def _cell_name(row: Mapping[str, object]) -> str:
    return f"{row['attack']} in {row['region']}"


def _location(run: Run) -> str:
    return run.name if is_url(run.name) else str(run.folder.resolve())


def _document(run: Run, summary: Summary, gate: Gate) -> dict[str, object]:
    return {
        "folder": _location(run),
        "status": run.info.status,
        "counts": run.info.to_json().get("images"),
        "shortfall": run.shortfall,
        **summary.as_mapping(),
        **gate.as_json(),
        "skipped": json_rows(run.skipped),
    }


def _print(run: Run, summary: Summary, seconds: float, *, every: bool, trial: str) -> None:
    regions = summary.regions if every else summary.weak_regions()
    for sentence in (summary.weakest, *regions, *summary.remarks):
        print_text(sentence)
    if summary.images:
        unknown = math.isnan(summary.clean_accuracy)
        clean = "unknown: no image has a prediction" if unknown else percent(summary.clean_accuracy)
        if not unknown and summary.known < summary.images:
            clean += f" of {counted(summary.known)} with a result ({summary.images:,} were read)"
        print_text(f"Clean accuracy is {clean}. Labels: {summary.labels}.\n")
    failed = any(cell.errors for cell in summary.cells)
    headings = [
        "attack",
        "region",
        "area",
        "images",
        "robust accuracy [95%]",
        *(["errors"] if failed else []),
    ]
    table = make_table(headings, fold=("attack", "region"))
    cells, more = first_rows(summary.cells, every=every)
    for cell in cells:
        accuracy = with_interval(cell.robust_accuracy, cell.low, cell.high)
        add_row(
            table,
            cell.name,
            cell.region,
            "" if math.isnan(cell.region_fraction) else percent(cell.region_fraction),
            str(cell.images),
            "" if math.isnan(cell.robust_accuracy) else accuracy,
            *([str(cell.errors or "")] if failed else []),
        )
    print_table(table, whole=every)
    if more:
        print_text(f"... and {more} more (show them with --all)", style="dim")
    if failed:
        from weakspot.audit.findings.outcomes import in_reported_regions

        # Controls may lack regions of other images, which is no failure of the image.
        query = (
            "select image, min(error) from outcomes "  # noqa: S608 - ours
            f"where error is not null and {in_reported_regions(run)} group by image order by image"
        )
        for image, error in run.sql(query).fetchall()[:SHOWN]:
            print_text(f"failed {image}: {error}", style="dim")
    skipped = run.skipped
    for _, row in skipped.head(SHOWN).iterrows():
        print_text(f"skipped {row['image']}: {row['reason'].removesuffix('; skipped')}", style="dim")
    if len(skipped) > SHOWN:
        print_text(f"... and {len(skipped) - SHOWN} more, listed in skipped.parquet", style="dim")
    tail = f", {len(skipped)} skipped" if len(skipped) else ""
    print_text(f"{counted(summary.images + summary.copies)} audited{tail}, in {seconds:.1f} s", style="dim")
    if trial:
        print_text(trial, style="dim")
    print_text(f"\nWritten to {_location(run)}")
