"""Charts of a run: robust accuracy, distributions, confusions. Each takes the few rows it draws.

Curves of a run: how many images are fooled at which size, and how the change spreads through the layers.
"""

from __future__ import annotations

import math

import pandas as pd

from weakspot.report.charts import (
    CARD,
    DASHES,
    FAINT,
    INK,
    OUTCOMES,
    SERIES,
    SHAPES,
    Chart,
    cycled,
    finished,
    plain,
    rows,
)
from weakspot.statistics.number_format import percent

LANE = 18  # pixels of one attack in one region
RIDGE = 58  # pixels of one histogram, its heading included
FILLED = 0.58  # of that, what its highest bar takes
HEADED = 0.8  # and where its heading stands
SQUARE = 26  # pixels of a row of confusions


def robust_chart(cells: pd.DataFrame, clean: float) -> Chart:
    """A point and its 95% interval for every attack in every region, the weakest region first.

    Args:
        cells: columns attack, region, region_fraction, images, robust_accuracy, low, high.
        clean: accuracy with nothing changed, drawn as a line; or NaN.
    """
    import altair as alt

    known = cells[cells["robust_accuracy"].notna()]
    order = known.groupby("region", sort=False)["robust_accuracy"].min().sort_values(kind="stable").index
    fractions = known.groupby("region")["region_fraction"].mean()
    names = {region: f"{region} ({percent(float(fractions[region]))})" for region in order}
    attacks = list(dict.fromkeys(known["attack"]))
    table = [
        {
            "where": names[row["region"]], "attack": row["attack"], "robust": row["robust_accuracy"],
            "low": row["low"], "high": row["high"], "images": row["images"],
        }
        for row in known.to_dict("records")
    ]  # fmt: skip
    base = alt.Chart(rows(table)).encode(
        y=alt.Y("where:N", sort=list(names.values()), title=None, axis=alt.Axis(grid=True, tickBand="extent")),
        yOffset=alt.YOffset("attack:N", sort=attacks, scale=alt.Scale(paddingOuter=0.4)),
        color=alt.Color(
            "attack:N", sort=attacks, title=None,
            scale=alt.Scale(domain=attacks, range=cycled(SERIES, len(attacks))),
        ),
        tooltip=[
            alt.Tooltip("attack:N"), alt.Tooltip("where:N", title="region"),
            alt.Tooltip("robust:Q", format=".1%", title="robust accuracy"),
            alt.Tooltip("low:Q", format=".1%"), alt.Tooltip("high:Q", format=".1%"), alt.Tooltip("images:Q"),
        ],
    )  # fmt: skip
    across = alt.X(
        "low:Q",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="%", tickCount=5),
        title="robust accuracy, 95% interval",
    )
    bars = base.mark_rule(strokeWidth=2.5).encode(x=across, x2="high:Q")
    points = base.mark_point(filled=True, size=90, opacity=1, stroke=CARD, strokeWidth=1).encode(
        x=alt.X("robust:Q"),
        shape=alt.Shape(
            "attack:N", sort=attacks, title=None,
            scale=alt.Scale(domain=attacks, range=cycled(SHAPES, len(attacks))),
        ),
    )  # fmt: skip
    layers = [bars, points]
    if not math.isnan(clean):
        line = alt.Chart(rows([{"clean": clean, "said": "nothing changed"}]))
        layers.insert(0, line.mark_rule(strokeDash=[4, 4], color=FAINT).encode(x="clean:Q"))
    height = max(60, len(names) * (14 + LANE * len(attacks)))
    return finished(
        "Robust accuracy by region",
        "Share of images still read as their class, for each attack confined to each region; the dashed line is the "
        "accuracy with nothing changed.",
        alt.layer(*layers).resolve_legend(shape="shared"),
        height,
    )


def histogram_chart(title: str, bins: pd.DataFrame, headings: dict[tuple[str, str], str]) -> Chart:
    """One histogram for each attack in each region, one below the other on one axis, by outcome.

    Args:
        title: of the score.
        bins: columns attack, region, outcome, low, high, count.
        headings: (attack, region) to what is said above its histogram, in the order of drawing.
    """
    import altair as alt

    places = {cell: number for number, cell in enumerate(headings)}
    totals = bins.groupby(["attack", "region"])["count"].sum()
    highest = bins.groupby(["attack", "region", "low"])["count"].sum() / totals
    scale = FILLED / float(highest.max())
    table, below = [], dict[tuple[int, float], float]()
    for row in bins.sort_values("outcome").to_dict("records"):
        cell = (row["attack"], row["region"])
        part = float(row["count"] / totals[cell])
        foot = below.get((places[cell], row["low"]), 0.0)
        below[places[cell], row["low"]] = foot + part * scale
        table.append(
            {
                "low": row["low"], "high": row["high"], "outcome": row["outcome"], "images": row["count"],
                "fraction": part, "foot": foot - places[cell], "head": foot + part * scale - places[cell],
            }
        )  # fmt: skip
    limits = [float(bins["low"].min()), float(bins["high"].max())]
    said = [{"said": text, "at": HEADED - number} for number, text in enumerate(headings.values())]
    down = alt.Scale(domain=[-len(places) + 0.92, 1.05], nice=False, zero=False)
    bars = (
        alt.Chart(rows(table))
        .mark_rect(stroke=CARD, strokeWidth=0.5)
        .encode(
            x=alt.X("low:Q", title=title, scale=alt.Scale(domain=limits, nice=False, zero=False),
                axis=alt.Axis(tickCount=8)),
            x2="high:Q",
            y=alt.Y("foot:Q", axis=None, scale=down),
            y2="head:Q",
            color=alt.Color(
                "outcome:N",
                title=None,
                scale=alt.Scale(domain=list(OUTCOMES), range=list(OUTCOMES.values())),
            ),
            tooltip=[
                alt.Tooltip("low:Q"), alt.Tooltip("high:Q"), alt.Tooltip("outcome:N"),
                alt.Tooltip("images:Q"), alt.Tooltip("share:Q", format=".1%"),
            ],
        )
    )  # fmt: skip
    words = (
        alt.Chart(rows(said))
        .mark_text(align="left", baseline="middle", dx=2)
        .encode(x=alt.value(0), y=alt.Y("at:Q", axis=None, scale=down), text="said:N")
    )
    feet = (
        alt.Chart(rows([{"at": -number} for number in range(len(places))]))
        .mark_rule(color=FAINT, strokeWidth=0.5)
        .encode(y=alt.Y("at:Q", axis=None, scale=down))
    )
    layers: list[alt.Chart] = [feet, bars, words]
    if limits[0] < 0 < limits[1]:
        zero = (
            alt.Chart(rows([{"zero": 0.0, "foot": -n, "head": FILLED - n} for n in range(len(places))]))
            .mark_rule(color=INK, strokeDash=[2, 3])
            .encode(x="zero:Q", y=alt.Y("foot:Q", axis=None, scale=down), y2="head:Q")
        )
        layers.insert(1, zero)
    return finished(
        title,
        f"How {title} is distributed over images, for each attack in each region; images that were fooled and images "
        "that held in two colors, one upon the other.",
        alt.layer(*layers),
        RIDGE * len(places) + 10,
    )


def confusion_chart(title: str, found: pd.DataFrame) -> Chart:
    """From which class to which, as a grid.

    Args:
        title: of which attack in which region.
        found: columns label, adversarial_class, fooled.
    """
    import altair as alt

    totals = found.groupby("label")["fooled"].transform("sum")
    table = [
        {
            "label": row["label"],
            "adversarial_class": row["adversarial_class"],
            "fooled": row["fooled"],
            "fraction": row["fraction"],
        }
        for row in found.assign(fraction=found["fooled"] / totals).to_dict("records")
    ]
    names = sorted(set(found["label"]) | set(found["adversarial_class"]))
    base = alt.Chart(rows(table)).encode(
        x=alt.X(
            "adversarial_class:N", sort=names, title="read as, after the attack", scale=alt.Scale(domain=names),
            axis=alt.Axis(labelAngle=-45, labelLimit=90),
        ),
        y=alt.Y("label:N", sort=names, title="label", scale=alt.Scale(domain=names)),
        tooltip=[
            alt.Tooltip("label:N"), alt.Tooltip("adversarial_class:N", title="read as"), alt.Tooltip("fooled:Q"),
            alt.Tooltip("share:Q", format=".1%", title="of the label's"),
        ],
    )  # fmt: skip
    # Opacity over the page's own color reads in light, in dark and in gray.
    squares = base.mark_rect(color="var(--held)").encode(
        opacity=alt.Opacity("share:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.06, 0.75]))
    )
    numbers = base.mark_text(fontSize=11).encode(text=alt.Text("fooled:Q"))
    return finished(
        title,
        "How many images of the class in the row were read as the class in the column after the attack; the darker, "
        "the larger their part of the row.",
        alt.layer(squares, numbers),
        SQUARE * len(names),
    )


BUDGET_HEIGHT, DEPTH_HEIGHT = 280, 190
POINTS = 120  # of a curve at most: the rest is not seen
RANDOM = ("random edit",)  # of the size of the attack's
NORMS = {"linf": "largest change of a channel, of 1", "l2": "L2 norm of the change"}


def budget_chart(title: str, found: pd.DataFrame) -> Chart:
    """Share of images fooled at a size or below, a step curve and its band for each region.

    Args:
        title: of which attack, in which norm.
        found: columns region, control, norm, size, fooled, low, high, images; of one attack and norm.
    """
    import altair as alt

    regions = list(dict.fromkeys(found.sort_values("control", kind="stable")["region"]))
    controls = {row["region"]: bool(row["control"]) for row in found.to_dict("records")}
    parts = [_thinned(found[found["region"] == region].sort_values("size")) for region in regions]
    table = [
        {key: row[key] for key in ("region", "size", "fooled", "low", "high", "images")}
        for part in parts
        for row in part.to_dict("records")
    ]
    dashes = cycled(DASHES[2:], len(regions))
    base = alt.Chart(rows(table)).encode(
        x=alt.X("size:Q", title=NORMS.get(str(found["norm"].iloc[0]), str(found["norm"].iloc[0]))),
    )
    colors = alt.Scale(domain=regions, range=cycled(SERIES, len(regions)))
    bands = base.mark_area(opacity=0.15, interpolate="step-after").encode(
        color=alt.Color("region:N", legend=None, scale=colors),
        y=alt.Y(
            "low:Q",
            title="fooled, with 95% interval",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(format="%"),
        ),
        y2="high:Q",
    )
    lines = base.mark_line(interpolate="step-after", strokeWidth=2).encode(
        y="fooled:Q",
        color=alt.Color("region:N", sort=regions, title=None, scale=colors),
        strokeDash=alt.StrokeDash(
            "region:N", sort=regions, title=None,
            scale=alt.Scale(
                domain=regions,
                range=[dashes[n] if controls[region] else DASHES[0] for n, region in enumerate(regions)],
            ),
        ),
        tooltip=[
            alt.Tooltip("region:N"), alt.Tooltip("size:Q"), alt.Tooltip("fooled:Q", format=".1%"),
            alt.Tooltip("low:Q", format=".1%"), alt.Tooltip("high:Q", format=".1%"), alt.Tooltip("images:Q"),
        ],
    )  # fmt: skip
    return finished(
        title,
        "Share of images that a change of this size or a smaller one fools, for each region; regions that are shifted "
        "as controls are dashed.",
        alt.layer(bands, lines).resolve_legend(color="independent", strokeDash="independent"),
        BUDGET_HEIGHT,
    )


def depth_chart(title: str, group: str, measure: str, found: pd.DataFrame, highest: float) -> Chart:
    """The mean over images along the layers, with its interval, for images that were fooled and that held.

    Args:
        title: of which attack in which region.
        group: of charts that are shown together.
        measure: what is drawn.
        found: columns outcome, place, layer, mean, low, high, images; a row for each layer.
        highest: of the axis, so that several charts can be compared.
    """
    import altair as alt

    known = found[found["mean"].notna()]
    names = ("outcome", "place", "layer", "mean", "low", "high", "images")
    table = [
        {
            **{key: row[key] for key in names},
            "low": row["low"] if row["low"] != row["low"] else max(0.0, row["low"]),
        }
        for row in known.to_dict("records")
    ]
    outcomes = [name for name in (*OUTCOMES, *RANDOM) if name in set(known["outcome"])]
    base = alt.Chart(rows(table)).encode(
        x=alt.X(
            "place:Q",
            title="layer, first to last",
            scale=alt.Scale(nice=False),
            axis=alt.Axis(tickMinStep=1, format="d"),
        ),
    )
    colors = alt.Scale(domain=outcomes, range=[OUTCOMES.get(name, FAINT) for name in outcomes])
    bands = base.mark_area(opacity=0.2).encode(
        color=alt.Color("outcome:N", legend=None, scale=colors),
        y=alt.Y("low:Q", title=measure, scale=alt.Scale(domain=[0, plain(highest or 1.0)])),
        y2="high:Q",
    )
    lines = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=20, filled=False)).encode(
        color=alt.Color("outcome:N", title=None, scale=colors),
        y="mean:Q",
        strokeDash=alt.StrokeDash(
            "outcome:N", title=None,
            scale=alt.Scale(domain=outcomes, range=[DASHES[n] for n in range(len(outcomes))]),
        ),
        tooltip=[
            alt.Tooltip("layer:N"), alt.Tooltip("outcome:N"), alt.Tooltip("mean:Q"), alt.Tooltip("low:Q"),
            alt.Tooltip("high:Q"), alt.Tooltip("images:Q"),
        ],
    )  # fmt: skip
    return finished(
        title,
        f"The mean over images of {measure} in every layer, with its 95% interval, for images that were fooled and for "
        "images that held.",
        alt.layer(bands, lines).resolve_legend(color="independent", strokeDash="independent"),
        DEPTH_HEIGHT,
        group,
    )


def _thinned(curve: pd.DataFrame) -> pd.DataFrame:
    """At most `POINTS` of its points, the first and the last among them."""
    if len(curve) <= POINTS:
        return curve
    kept = [round(number * (len(curve) - 1) / (POINTS - 1)) for number in range(POINTS)]
    return curve.iloc[kept]
