"""Reporting: the page of a run, from its folder."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakspot.runs.plan import bounded_attacks
from weakspot.runs.records import has_records
from weakspot.runs.run import Run
from weakspot.runs.summary import Summary, summarize
from weakspot.writing import write_whole

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.report.run_page import Heading
    from weakspot.report.sections import Section

FILE = "report.html"
NAMED = 20  # skipped images
REGIONS = 4  # regions beside their controls that are told on top, the weakest first; all are in their section


def write_run_report(run: Run, path: Path | str) -> Path:
    """Write the report of a run, complete or not, to one self-contained HTML file, whole or not at all.

    Args:
        run: what is told.
        path: of the file; folders are made where they are missing.
    """
    path = Path(path)
    content = run_report(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda draft: draft.write_text(content, "utf-8"))
    return path


def keep_run_report(run: Run) -> str:
    """Write the report beside the run's records, in its folder or at its URL; returns where it is.

    Raises:
        OSError: when that place cannot be written.
    """
    from weakspot.runs.places import is_url, place

    if not is_url(run.name):
        return str(write_run_report(run, run.folder / FILE).resolve())
    there = place(run.name).below(FILE)
    there.system.pipe_file(there.path, run_report(run).encode())
    return f"{run.name.rstrip('/')}/{FILE}"


def run_report(run: Run) -> str:
    """The report as HTML; records are counted on the disk, so their number does not matter."""
    from weakspot.report.run_page import run_page

    folder = shlex.quote(run.name)
    records = f"{run.name}/records.parquet" if run.complete else f"{run.name}/shards/*.parquet"
    source = records.replace("'", "''")
    query = f"select attack, region, avg(success::int) as fooled from '{source}' group by all"
    questions = {
        "shell": f"duckdb -c {_quoted(query)}",
        "python": f"from weakspot.runs import Run\n\nrun = Run({run.name!r})\n"
        'run.sql("select image, min(margin_adversarial) as margin from records group by image order by margin").df()\n'
        'run.maps["adversarial"][0]  # of the first image: attacks x regions x channels x height x width',
        "report": f"weakspot report {folder}",
    }
    if not has_records(run.folder):
        return run_page(_heading(run, None), [], _made(run), questions)
    summary = summarize(run)
    return run_page(_heading(run, summary), _sections(run, summary), _made(run), questions)


def _quoted(query: str) -> str:
    """A query as one word of a shell."""
    return shlex.quote(query) if set(query) & set('"$`\\!') else f'"{query}"'


def _sections(run: Run, summary: Summary) -> list[Section]:
    """All of them, in the order of the page."""
    import pandas as pd

    from weakspot.report.run_findings import budget_section, depth_section, finding_section
    from weakspot.report.run_sections import (
        class_section,
        distribution_section,
        image_section,
        robust_section,
    )
    from weakspot.runs.contrasts import region_contrasts, told
    from weakspot.runs.curves import budget_curves
    from weakspot.runs.depths import depths
    from weakspot.runs.extremes import extremes
    from weakspot.runs.locations import untested
    from weakspot.runs.scores import score_findings
    from weakspot.runs.tallies import classes, distributions

    spread, found, ends = distributions(run), classes(run), extremes(run)
    pictured = any(image.pictures for image in (*ends.easiest, *ends.hardest))
    missing = "" if pictured else "The run kept no maps, so that there are names only; --maps keeps pictures."
    return [
        robust_section(
            _bounded(pd.DataFrame([asdict(cell) for cell in summary.cells]), run), summary.clean_accuracy
        ),
        distribution_section(spread.summaries, spread.bins),
        class_section(found.classes, _bounded(found.cells, run), found.landings, found.confusions),
        image_section(ends.easiest, ends.hardest, ends.told, missing),
        budget_section(budget_curves(run), region_contrasts(run), told(region_contrasts(run))),
        finding_section(score_findings(run), untested(run)),
        depth_section(depths(run)),
        *_skipped(run),
    ]


def _bounded(rows: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Without attacks that look for the smallest change, where there are others: their sizes have a section."""
    bounded = rows[rows["attack"].isin(bounded_attacks(run.plan))]
    return bounded if len(bounded) else rows


def _heading(run: Run, summary: Summary | None) -> Heading:
    from weakspot.report.run_page import Heading
    from weakspot.report.run_words import counted, ranged
    from weakspot.report.words import percent

    plan, name = run.plan, run.about.get("model", {}).get("name", run.plan.model.spec)
    listed, skipped = run.about.get("images", {}).get("listed"), len(run.skipped)
    done = (summary.images if summary else 0) + skipped
    warning = ""
    if not run.complete:
        of = f" of {listed:,}" if listed is not None else ""
        warning = (
            f"This audit is not complete: {done:,}{of} images are done, and all numbers here are of those. "
            f"Go on by weakspot audit --resume {shlex.quote(run.name)}."
        )
    attacks = ", ".join(
        f"{one.label} at {one.budget}" if one.budget and one.budget not in one.label else one.label
        for one in plan.attacks
    )
    subtitle = f"{attacks}; each in {counted(len(plan.reported_regions), 'region')}."
    if summary is None or not summary.images:
        nothing = "No image could be read." if run.complete else "There are no records yet."
        facts = [(f"{skipped:,}", "skipped, as they could not be read")] if skipped else []
        return Heading(f"Where {name} is weak", subtitle, warning, facts, [nothing])
    bounded = bounded_attacks(plan)
    known = [cell for cell in summary.cells if cell.images]
    known = [cell for cell in known if cell.attack in bounded] or known
    facts = [
        (
            f"{summary.images:,}",
            "images attacked" if known else "images read, of none of which an end is known",
        )
    ]
    if not math.isnan(summary.clean_accuracy):
        facts.append((percent(summary.clean_accuracy), "read as their label with nothing changed"))
    if known:
        worst = min(known, key=lambda cell: cell.robust_accuracy)
        where = "anywhere" if worst.region == "none" else f"in {worst.region}"
        facts.append(
            (
                ranged(worst.robust_accuracy, worst.low, worst.high),
                f"robust accuracy under {worst.attack} {where}, the lowest",
            )
        )
    facts.append((f"{skipped:,}", "skipped, as they could not be read" if skipped else "skipped"))
    said = [summary.weakest, f"Labels: {summary.labels}."]
    told_apart = list(summary.regions[:REGIONS])
    if "prediction" in run.about.get("labels", {}):
        said[1] += (
            " Where a label is the model's own prediction, nothing is said on whether the model is right."
        )
    troubled = sum(cell.troubled for cell in summary.cells)
    if troubled:
        said.append(
            f"On {counted(troubled, 'attack')} something went wrong; the column trouble of the records says what."
        )
    if skipped:
        said.append(f"Skipped: {_why(run)}.")
    return Heading(f"Where {name} is weak", subtitle, warning, facts, [said[0], *told_apart, *said[1:]])


def _why(run: Run) -> str:
    """Reasons with their counts, the commonest first; what a reason says of one image alone is left to the list."""
    reasons = run.skipped["reason"].str.removesuffix("; skipped")
    counts = reasons.value_counts(sort=True)
    named = [f"{reason} ({number:,})" for reason, number in counts.head(3).items()]
    return "; ".join([*named, *(["and others"] if len(counts) > len(named) else [])])


def _skipped(run: Run) -> list[Section]:
    """The images that could not be read, where there are any."""
    from weakspot.report.run_words import counted
    from weakspot.report.sections import Section, Table, word

    skipped = run.skipped
    if skipped.empty:
        return []
    rows = [[word(row["image"]), word(row["reason"])] for row in skipped.head(NAMED).to_dict("records")]
    more = len(skipped) - len(rows)
    note = f"{more:,} more are in skipped.parquet." if more else ""
    said = f"{counted(len(skipped))} could not be read and {'is' if len(skipped) == 1 else 'are'} in no number above."
    return [Section("skipped", "Skipped", [said], tables=[Table("skipped", ("image", "reason"), rows, note)])]


def _made(run: Run) -> dict[str, str]:
    """Plan, versions, host and times, as people read them."""
    about, plan = run.about, run.plan
    model, host = about.get("model", {}), about.get("host", {})
    made = {
        "command": about.get("command", ""),
        "model": f"{model.get('name', '')} ({plan.model.spec}), {model.get('classes', '?')} classes",
        "fingerprint of the weights": model.get("fingerprint", ""),
        "input size": " x ".join(map(str, model.get("input_size", ()))),
        "images": ", ".join(plan.sources),
        "attacks": "; ".join(_attack(one.label, one.budget, one.settings) for one in plan.attacks),
        "regions": ", ".join(plan.reported_regions),
        "controls": f"regions of {plan.control_images} other images for each" if plan.controls else "",
        "area of cam": f"{plan.keep:.0%} of the image",
        "analyses": ", ".join(plan.analyses) or "none",
        "seed": str(plan.seed),
        "started": about.get("started", ""),
        "finished": about.get("finished", ""),
        "time": _time(about),
        "device": about.get("device", ""),
        "host": ", ".join(
            str(host[key]) for key in ("name", "system", "processor") if host.get(key)
        ) + (f", {host['cpus']} cores" if host.get("cpus") else ""),
        "versions": ", ".join(f"{name} {value}" for name, value in about.get("versions", {}).items()),
        "folder": run.name,
    }  # fmt: skip
    return {key: value for key, value in made.items() if value}


def _attack(label: str, budget: str | None, settings: Sequence[tuple[str, Any]]) -> str:
    told = [*([budget] if budget else []), *(f"{key}={value}" for key, value in settings)]
    return f"{label} ({', '.join(told)})" if told else label


def _time(about: Mapping[str, Any]) -> str:
    seconds, speed = about.get("seconds"), about.get("images_per_second")
    if seconds is None:
        return ""
    return f"{seconds:,.0f} s" + (f", {speed:.3g} images per second" if speed else "")
