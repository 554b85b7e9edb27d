"""The page of a run: a whole data set in one self-contained HTML file."""

import json
import math
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from weakspot._io.files import write_atomic
from weakspot._io.urls import is_url, place
from weakspot.audit.findings.contrasts import contrast_sentences, region_contrasts
from weakspot.audit.findings.curves import budget_curves, families, layer_curves
from weakspot.audit.findings.distributions import class_distributions, distributions, extremes
from weakspot.audit.findings.outcomes import attack_name, in_region
from weakspot.audit.findings.scores import (
    not_tested_because,
    perturbation_types,
    pixel_localities,
    score_findings,
)
from weakspot.audit.findings.summary import Summary, summarize
from weakspot.audit.findings.weak_places import WeakPlaces, weak_places
from weakspot.audit.page.charts import CONFIG
from weakspot.audit.page.elements import Section, Table, table_of, texts
from weakspot.audit.page.outcome_sections import (
    budget_section,
    class_section,
    image_section,
    robust_section,
)
from weakspot.audit.page.score_sections import (
    distribution_section,
    finding_section,
    layer_section,
    locality_section,
    type_section,
)
from weakspot.audit.page.spot_section import spot_section
from weakspot.audit.page.thumbnails import square_thumbnails, thumbnails
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.store.records import quoted
from weakspot.audit.store.run import Run
from weakspot.audit.store.run_info import resume_command
from weakspot.report.rendering import base64_text, rendered
from weakspot.statistics.number_format import counted, number, percent, with_interval

FILE = "report.html"
SHOWN = 200  # rows of a table that are in the HTML; the others are added when the reader sorts or filters
FIRST_IMAGES = 3  # thumbnails of a gallery that are not folded
SMALLEST_SQUARES = 6  # images whose squares are drawn
MAX_SKIPPED = 20  # skipped images listed


@dataclass(frozen=True)
class Header:
    """The top of the page.

    Attributes:
        title: whose report it is.
        subtitle: what was run.
        warning: why the numbers are not final; empty if they are.
        facts: (number, meaning) pairs.
        sentences: the findings.
    """

    title: str
    subtitle: str
    warning: str
    facts: Sequence[tuple[str, str]]
    sentences: Sequence[str]


@dataclass(frozen=True)
class Queries:
    """How to query the run further: a shell command and Python code."""

    shell: str
    python: str


def write_run_report(run: Run, path: Path | str) -> Path:
    """Write the report of a run, complete or not, to one self-contained HTML file, creating missing folders."""
    path = Path(path)
    content = run_report(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda draft: draft.write_text(content, "utf-8"))
    return path


def store_run_report(run: Run) -> str:
    """Write the report beside the run's records, in its folder or at its URL, and return its location.

    Raises:
        OSError: if that location cannot be written.
    """
    if not is_url(run.name):
        return str(write_run_report(run, run.folder / FILE).resolve())
    location = place(run.name).below(FILE)
    # A single upload, so that readers of the URL see the old page or the new one.
    location.system.pipe_file(location.path, run_report(run).encode())
    return f"{run.name.rstrip('/')}/{FILE}"


def run_report(run: Run) -> str:
    """The report as HTML. Records are counted on disk, so their number does not matter."""
    if not run.has_records:
        return run_page(_header(run, None), [], _made(run), _queries(run))
    summary, places = summarize(run), weak_places(run)
    header = _header(run, summary, places)
    # A section with a picture does not repeat what the top of the page says.
    sections = [
        replace(section, sentences=[one for one in section.sentences if one not in header.sentences])
        if section.charts
        else section
        for section in _sections(run, summary, places)
    ]
    return run_page(header, sections, _made(run), _queries(run))


def run_page(
    header: Header, sections: Sequence[Section], made: Mapping[str, str], queries: Queries | None
) -> str:
    """The page as HTML; all text from outside is escaped.

    Args:
        header: the top of the page.
        sections: in this order.
        made: how the run was made, name to value.
        queries: how to query it further; None without records.
    """
    charts = [chart for section in sections for chart in section.charts]
    specs = [dict(chart.spec) for chart in charts]
    libraries = vega_libraries() if charts else ""
    return rendered(
        "run.html",
        styles=["run.css"],
        script="run.js",
        later=[libraries],
        header=header,
        sections=sections,
        made=dict(made),
        queries=queries,
        shown=SHOWN,
        first=FIRST_IMAGES,
        libraries=_compressed(libraries) if libraries else "",
        drawings=_compressed(json.dumps({"config": CONFIG, "specs": specs})),
        numbers={id(chart): number for number, chart in enumerate(charts)},
        # The template finds the number of a chart by its identity.
        identity=id,
        rest={
            table.name: _hidden_rows(table)
            for section in sections
            for table in section.tables
            if len(table.rows) > SHOWN
        },
    )


def _hidden_rows(table: Table) -> list[list[list[float | str | None]]]:
    """The rows beyond `SHOWN` for the page's script; JSON has no NaN."""

    def order(value: float | str) -> float | str | None:
        return None if isinstance(value, float) and math.isnan(value) else value

    return [[[cell.text, order(cell.order), cell.small] for cell in row] for row in table.rows[SHOWN:]]


@cache  # takes more than a second
def vega_libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _compressed(text: str) -> str:
    return base64_text(zlib.compress(text.encode("utf-8"), 9))


def _queries(run: Run) -> Queries | None:
    if not run.has_records:
        return None
    records = quoted(f"{run.name}/records.parquet" if run.complete else f"{run.name}/shards/*.parquet")
    query = f"select attack, region, avg(success_8bit::int) as fooled from {records} group by all"
    # Double quotes read better, but the shell expands some characters inside them.
    word = shlex.quote(query) if set(query) & set('"$`\\!') else f'"{query}"'
    return Queries(  # noqa: S604 - a text for the reader
        shell=f"duckdb -c {word}",
        python=f"from weakspot.audit import open_run\n\nrun = open_run({run.name!r})\n"
        'run.sql("select image, min(margin_adversarial) as margin from records group by image order by margin").df()\n'
        'run.maps["adversarial"][0]  # of the first image: attacks x regions x channels x height x width',
    )


def _sections(run: Run, summary: Summary, places: WeakPlaces | None) -> list[Section]:
    """All sections, in the order of the page; those without anything to show are one section, the last but one."""
    by_class, ends = class_distributions(run), extremes(run)
    judged = [attack.label for attack in run.plan.attacks if run.plan.has_robust_accuracy(attack)]
    contrasts = region_contrasts(run)
    sections = [
        spot_section(
            places,
            square_thumbnails(run, places, SMALLEST_SQUARES) if places else (),
            searched="weak_spots" in run.plan.analyses,
        ),
        robust_section(summary.cells, summary.clean_accuracy, eight_bit=run.eight_bit),
        budget_section(
            budget_curves(run), contrasts, contrast_sentences(contrasts), planned=bool(families(run.plan))
        ),
        class_section(replace(by_class, cells=by_class.cells[by_class.cells["attack"].isin(judged)])),
        image_section(
            ends,
            thumbnails(run, ends.easiest, by_size=ends.by_size),
            thumbnails(run, ends.hardest, by_size=ends.by_size),
        ),
        finding_section(score_findings(run), not_tested_because(run)),
        *type_section(perturbation_types(run)),
        *locality_section(pixel_localities(run)),
        layer_section(layer_curves(run)),
        distribution_section(distributions(run)),
    ]
    missing = [f"{one.title}: {sentence}" for one in sections if one.is_empty for sentence in one.sentences]
    return [
        *(section for section in sections if not section.is_empty),
        *([Section("missing", "What this audit does not show", missing)] if missing else []),
        *_skipped_section(run),
    ]


def _header(run: Run, summary: Summary | None, places: WeakPlaces | None = None) -> Header:
    title = f"Where is {run.info.model.name if run.info.model else run.plan.model.spec} weak?"
    attacks = ", ".join(attack_name(attack.label, attack.budget) for attack in run.plan.attacks)
    each = "each " if len(run.plan.attacks) > 1 else ""
    subtitle = f"{attacks}; {each}in {counted(len(run.plan.reported_regions), 'region')}."
    skipped = len(run.skipped)
    done = skipped + (summary.images + summary.copies if summary else 0)
    warning = _warning(run, done, summary.remarks if summary else run.remarks)
    unread = (f"{skipped:,}", "skipped")
    if summary is None or not summary.images:
        none = f"No image could be used{'' if run.complete else ' so far'}."
        none += f" Skipped: {_reasons(run)}." if skipped else ""
        nothing = none if run.has_records else "No shard is finished yet."
        return Header(title, subtitle, warning, [unread] if skipped else [], [nothing])
    facts = [*_facts(summary), unread]
    labels = f"Labels: {summary.labels}."
    if "prediction" in run.info.labels:
        labels += " Where a label is the model's own prediction, the report does not say whether the model is correct."
    square = places.sentences()[:1] if places else []
    sentences = [summary.weakest, *square, *summary.weak_regions(), labels]
    errors = sum(cell.errors for cell in summary.cells)
    if errors:
        sentences.append(
            f"{counted(errors, 'attack')} failed with an error; the column error of the records names "
            f"{'it' if errors == 1 else 'them'}."
        )
    if skipped:
        sentences.append(f"Skipped: {_reasons(run)}.")
    return Header(title, subtitle, warning, facts, sentences)


def _warning(run: Run, done: int, remarks: Sequence[str]) -> str:
    """Why the numbers are not final, and remarks on the model; empty if there is nothing to say."""
    shortfall = f"{run.shortfall[:1].upper()}{run.shortfall[1:]}." if run.shortfall else ""
    if not run.complete:
        if run.info.missing is not None:
            shortfall += f" All numbers are about the other {counted(done)}."
        else:
            images = f"{done:,} of {counted(run.info.images.listed)}" if run.info.images else counted(done)
            verb, those = ("is", "it") if done == 1 else ("are", "those")
            about = f", and all numbers are about {those}" if done else ""
            shortfall = (
                f"This audit is not complete: {images} {verb} in finished shards{about}. What is saved of other shards "
                f"counts once you continue it with {resume_command(run.name)}."
            )
    return " ".join([*([shortfall] if shortfall else []), *remarks])


def _facts(summary: Summary) -> list[tuple[str, str]]:
    known = [cell for cell in summary.cells if cell.images]
    judged = [cell for cell in known if not math.isnan(cell.robust_accuracy) and not cell.is_control]
    noun = "image" if summary.images == 1 else "images"
    facts = [
        (f"{summary.images:,}", f"{noun} attacked" if known else f"{noun} read, none with a known outcome")
    ]
    if not math.isnan(summary.clean_accuracy):
        which = f" (of {counted(summary.known)} with a result)" if summary.known < summary.images else ""
        facts.append((percent(summary.clean_accuracy), f"classified as their label without an attack{which}"))
    if judged:
        worst = min(judged, key=lambda cell: cell.robust_accuracy)
        accuracy = with_interval(worst.robust_accuracy, worst.low, worst.high)
        facts.append((accuracy, f"lowest robust accuracy: {worst.name} {in_region(worst.region)}"))
    return facts


def _reasons(run: Run) -> str:
    """The most frequent reasons for skipping images, with their counts."""
    reasons = run.skipped["reason"].str.removesuffix("; skipped").value_counts(sort=True)
    named = [f"{reason} ({count:,})" for reason, count in reasons.head(3).items()]
    return "; ".join(named + (["and others"] if len(reasons) > len(named) else []))


def _skipped_section(run: Run) -> list[Section]:
    skipped = run.skipped
    if skipped.empty:
        return []
    verb, past = ("is", "was") if len(skipped) == 1 else ("are", "were")
    sentence = f"{counted(len(skipped))} {past} skipped and {verb} not in any number above."
    table = table_of(
        "skipped", skipped.head(MAX_SKIPPED), {"image": texts("image"), "reason": texts("reason")}
    )
    more = len(skipped) - MAX_SKIPPED
    notes = [f"{more:,} more are in skipped.parquet."] if more > 0 else []
    return [Section("skipped", "Skipped", [sentence], tables=[table], notes=notes)]


def _made(run: Run) -> dict[str, str]:
    """Plan, versions, host and times, for the reader; what is unknown is left out."""
    info, plan, model, host = run.info, run.plan, run.info.model, run.info.host
    speed = f", {number(info.images_per_second)} images per second" if info.images_per_second else ""
    machine = ", ".join(str(host[key]) for key in ("name", "system", "processor") if host.get(key))
    made = {
        "command": info.command,
        "model": f"{model.name} ({plan.model.spec}), {model.classes} classes" if model else plan.model.spec,
        "fingerprint of the weights": model.fingerprint if model else "",
        "input size": " x ".join(map(str, model.input_size)) if model else "",
        "images": ", ".join(plan.sources),
        "attacks": "; ".join(map(_attack_settings, plan.attacks)),
        "regions": ", ".join(plan.reported_regions),
        "controls": f"for each region, the regions of {counted(plan.control_images, 'other image')}"
        if plan.controls
        else "",
        "area of cam": f"{percent(plan.fraction)} of the image",
        "analyses": ", ".join(plan.analyses) or "none",
        "seed": str(plan.seed),
        "started": info.started,
        "finished": info.finished or "",
        "time": "" if info.seconds is None else f"{info.seconds:,.0f} s{speed}",
        "device": info.device,
        "host": machine + (f", {host['cpus']} cores" if host.get("cpus") else ""),
        "versions": ", ".join(f"{name} {value}" for name, value in info.versions.items()),
        "folder": run.name,
    }
    return {key: value for key, value in made.items() if value}


def _attack_settings(attack: AttackPlan) -> str:
    return f"{attack.label} ({', '.join(attack.stated)})" if attack.stated else attack.label
