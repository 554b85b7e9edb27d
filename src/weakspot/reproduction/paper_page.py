"""The page of a stored reproduction, in Markdown: nothing on it is typed by hand."""

from collections.abc import Sequence

from weakspot.reproduction.claim_panels import Panel
from weakspot.reproduction.claims import Claim, Reproduction
from weakspot.statistics.number_format import number

SIZES = {
    "quick": "This is a **quick** run, with few images and short attacks: intervals are wide. No full run has "
    "been made for this page.",
    "full": "This is a **full** run.",
}
HEADER = "| what | value | 95% interval | images |\n|---|---|---|---|"


def paper_page(result: Reproduction, figures: Sequence[str] = ()) -> str:
    """The claims with their words, measurements, controls and verdicts; method, figure, limits and command.

    Args:
        result: such as `read_reproduction` returns.
        figures: address of the picture of each panel, in the order of the claims.
    """
    panels = [panel for claim in result.claims for panel in claim.panels]
    pictures = " ".join(
        f"![{describe(panel)}]({address})" for panel, address in zip(panels, figures, strict=False)
    )
    parts = [
        f"# {result.title}",
        f"{result.citation}. {SIZES[result.size]}",
        "\n".join(["| claim | verdict |", "|---|---|", *(_row(claim) for claim in result.claims)]),
        pictures,
        "## What was measured",
        result.method,
        *(_section(claim) for claim in result.claims),
        "## Limits",
        result.limits,
        "## How this page was made",
        _made(result),
    ]
    if result.made.command:
        parts.append(f"```console\n{result.made.command}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_table(results: Sequence[Reproduction], pages: Sequence[str]) -> str:
    """One row for each claim of several papers.

    Args:
        results: of the papers.
        pages: address of each paper's page.
    """
    rows = [
        f"| [{result.paper}]({page}) | {_one_cell(claim.name)} | {claim.verdict} | {'' if number else about} |"
        for result, page in zip(results, pages, strict=True)
        # A loop over one value, to name it; it is written in the first row of each paper only.
        for about in [f"{result.size}: {_one_cell(result.data)}"]
        for number, claim in enumerate(result.claims)
    ]
    return "\n".join(["| paper | claim | verdict | run |", "|---|---|---|---|", *rows])


def describe(panel: Panel) -> str:
    """What a panel shows, for readers who do not see it."""
    if panel.kind == "rates":
        values = [
            f"{name}{f', {series.label}' if series.label else ''}: {'not defined' if x is None else number(x)}"
            for series in panel.series
            for name, x in zip(panel.categories, series.x, strict=True)
        ]
        return _one_cell(f"{panel.title} ({panel.across}). {'; '.join(values)}")
    if panel.kind == "map":
        cells = [
            (value or 0.0, row, column)
            for row, line in enumerate(panel.grid)
            for column, value in enumerate(line)
        ]
        value, row, column = max(cells)
        return _one_cell(
            f"{panel.title}: a map of {len(panel.grid)} x {len(panel.grid[0])} cells, largest ({number(value)} "
            f"{panel.across}) in row {row + 1}, column {column + 1}"
        )
    named = ", ".join(series.label for series in panel.series)
    return _one_cell(f"{panel.title}. {panel.up} over {panel.across}; {named}")


def _row(claim: Claim) -> str:
    return f"| {_one_cell(claim.name)} | **{claim.verdict}** |"


def _section(claim: Claim) -> str:
    rows = ["| " + " | ".join(map(_one_cell, one.cells)) + " |" for one in claim.table]
    parts = [
        f"## {claim.name[0].upper()}{claim.name[1:]}: {claim.verdict}",
        f"> {claim.quote}",
        claim.measured,
        f"*Control.* {claim.control}",
        "\n".join([HEADER, *rows]) if rows else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _made(result: Reproduction) -> str:
    made = result.made
    return (
        f"{result.data}; {result.attack}; seed {result.seed}. Made on {made.date} in {made.cpu_seconds / 3600:.2f} CPU "
        f"hours ({made.seconds / 3600:.2f} hours on the clock, with other work on the machine) on {made.machine}."
    )


def _one_cell(text: str) -> str:
    """Text that neither ends a cell of a table nor the text of a picture."""
    return text.replace("|", "/").replace("[", "(").replace("]", ")").replace("\n", " ")
