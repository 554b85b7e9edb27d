"""The page of a run: a whole data set in one self-contained HTML file.

Reporting: the page of a run, from its folder.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakspot._io.files import write_atomic
from weakspot.audit.findings.summary import Summary, summarize
from weakspot.audit.plan.limits import judged_attacks
from weakspot.audit.store.records import has_records
from weakspot.audit.store.run import Run
from weakspot.report.charts import CONFIG, libraries, packed
from weakspot.report.rendering import rendered
from weakspot.report.sections import Section, Table

if TYPE_CHECKING:
    from weakspot.report.sections import Section


SHOWN = 200  # rows of a table that are on the page at once


@dataclass(frozen=True)
class Heading:
    """What stands on top.

    Attributes:
        title: whose report it is.
        subtitle: how much was done.
        warning: what keeps the numbers from being final; nothing where it is empty.
        facts: (number, what it is) each.
        sentences: what was found, in words.
    """

    title: str
    subtitle: str
    warning: str
    facts: Sequence[tuple[str, str]]
    sentences: Sequence[str]


def run_page(
    heading: Heading, sections: Sequence[Section], made: Mapping[str, str], questions: Mapping[str, str]
) -> str:
    """The report as HTML; whatever came from outside is escaped.

    Args:
        heading: of the page.
        sections: in this order.
        made: how it came about.
        questions: how to ask further: shell and python.
    """
    drawn = [chart for section in sections for chart in section.charts]
    return rendered(
        "run.html",
        styles=["run.css"],
        script="run.js",
        heading=heading,
        sections=sections,
        made=dict(made),
        folder=questions,
        shown=SHOWN,
        libraries=packed(libraries()) if drawn else "",
        drawings=packed(json.dumps({"config": CONFIG, "specs": [dict(chart.spec) for chart in drawn]})),
        numbers={id(chart): number for number, chart in enumerate(drawn)},
        identity=id,
        rest={
            table.name: _rest(table)
            for section in sections
            for table in section.tables
            if len(table.rows) > SHOWN
        },
    )


def _rest(table: Table) -> list[list[Any]]:
    """The rows that are not written down but come when the reader sorts or filters."""
    return [[[cell.text, _order(cell.order), cell.aside] for cell in row] for row in table.rows[SHOWN:]]


def _order(order: float | str) -> float | str | None:
    return None if isinstance(order, float) and math.isnan(order) else order


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
    write_atomic(path, lambda draft: draft.write_text(content, "utf-8"))
    return path


def keep_run_report(run: Run) -> str:
    """Write the report beside the run's records, in its folder or at its URL; returns where it is.

    Raises:
        OSError: when that place cannot be written.
    """
    from weakspot._io.urls import is_url, place

    if not is_url(run.name):
        return str(write_run_report(run, run.folder / FILE).resolve())
    there = place(run.name).below(FILE)
    there.system.pipe_file(there.path, run_report(run).encode())
    return f"{run.name.rstrip('/')}/{FILE}"


def run_report(run: Run) -> str:
    """The report as HTML; records are counted on the disk, so their number does not matter."""
    folder = shlex.quote(run.name)
    records = f"{run.name}/records.parquet" if run.complete else f"{run.name}/shards/*.parquet"
    source = records.replace("'", "''")
    query = f"select attack, region, avg(success_8bit::int) as fooled from '{source}' group by all"
    questions = {
        "shell": f"duckdb -c {_quoted(query)}",
        "python": f"from weakspot.audit import Run\n\nrun = Run({run.name!r})\n"
        'run.sql("select image, min(margin_adversarial) as margin from records group by image order by margin").df()\n'
        'run.maps["adversarial"][0]  # of the first image: attacks x regions x channels x height x width',
        "report": f"weakspot report {folder}",
    }
    if not has_records(run.folder, complete=run.complete):
        return run_page(_heading(run, None), [], _made(run), questions)
    summary = summarize(run)
    return run_page(_heading(run, summary), _sections(run, summary), _made(run), questions)


def _quoted(query: str) -> str:
    """A query as one word of a shell."""
    return shlex.quote(query) if set(query) & set('"$`\\!') else f'"{query}"'


def _sections(run: Run, summary: Summary) -> list[Section]:
    """All of them, in the order of the page."""
    import pandas as pd

    from weakspot.audit.findings.contrasts import region_contrasts, told
    from weakspot.audit.findings.curves import budget_curves, depths
    from weakspot.audit.findings.distributions import classes, distributions, extremes
    from weakspot.audit.findings.locations import localities, perturbation_types, score_findings, untested
    from weakspot.audit.page.finding_sections import (
        budget_section,
        depth_section,
        finding_section,
        locality_section,
        type_section,
    )
    from weakspot.audit.page.outcome_sections import (
        class_section,
        distribution_section,
        image_section,
        robust_section,
    )

    spread, found, ends = distributions(run), classes(run), extremes(run)
    judged = found.cells["attack"].isin(judged_attacks(run.plan))
    pictured = any(image.pictures for image in (*ends.easiest, *ends.hardest))
    missing = "" if pictured else "The run kept no maps, so that there are names only; --maps keeps pictures."
    return [
        robust_section(
            pd.DataFrame([asdict(cell) for cell in summary.cells]),
            summary.clean_accuracy,
            eight_bit=run.eight_bit,
        ),
        distribution_section(spread.summaries, spread.bins),
        class_section(found.classes, found.cells[judged], found.landings, found.confusions),
        image_section(ends.easiest, ends.hardest, ends.told, missing),
        budget_section(budget_curves(run), region_contrasts(run), told(region_contrasts(run))),
        finding_section(score_findings(run), untested(run)),
        *type_section(perturbation_types(run)),
        *locality_section(localities(run)),
        depth_section(depths(run)),
        *_skipped(run),
    ]


def _heading(run: Run, summary: Summary | None) -> Heading:
    from weakspot.audit.page.sentences import ranged
    from weakspot.statistics.number_format import counted, percent

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
        if "missing" in run.about:
            warning = (
                f"{run.shortfall[0].upper()}{run.shortfall[1:]}. All numbers here are of the {done:,} others."
            )
    elif run.shortfall:
        warning = f"{run.shortfall[0].upper()}{run.shortfall[1:]}."
    warning = " ".join([*([warning] if warning else []), *run.remarks])
    attacks = ", ".join(
        f"{one.label} at {one.budget}" if one.budget and one.budget not in one.label else one.label
        for one in plan.attacks
    )
    subtitle = f"{attacks}; each in {counted(len(plan.reported_regions), 'region')}."
    if summary is None or not summary.images:
        nothing = "No image could be read." if run.complete else "There are no records yet."
        facts = [(f"{skipped:,}", "skipped, as they could not be read")] if skipped else []
        return Heading(f"Where {name} is weak", subtitle, warning, facts, [nothing])
    known = [cell for cell in summary.cells if cell.images]
    judged = [cell for cell in known if not math.isnan(cell.robust_accuracy)]
    facts = [
        (
            f"{summary.images:,}",
            "images attacked" if known else "images read, of none of which an end is known",
        )
    ]
    if not math.isnan(summary.clean_accuracy):
        facts.append((percent(summary.clean_accuracy), "read as their label with nothing changed"))
    if judged:
        worst = min(judged, key=lambda cell: cell.robust_accuracy)
        area = f"in {worst.region} ({percent(worst.region_fraction)} of the image)"
        where = "anywhere" if worst.region == "none" else area
        facts.append(
            (
                ranged(worst.robust_accuracy, worst.low, worst.high),
                f"robust accuracy under {worst.name} {where}, the lowest",
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
    from weakspot.report.sections import Section, Table, word
    from weakspot.statistics.number_format import counted

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
        "area of cam": f"{plan.fraction:.0%} of the image",
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
