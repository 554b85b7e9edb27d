"""Curves of a run: how many images are fooled at which size, and how the change spreads through the layers."""

from __future__ import annotations

import pandas as pd

from weakspot.report.charts import DASHES, FAINT, OUTCOMES, SERIES, Chart, cycled, finished, plain, rows

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
