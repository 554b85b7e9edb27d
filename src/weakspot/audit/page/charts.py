"""Charts of a run as Vega-Lite specifications, in the colors of the page.

The specifications are written out directly: they are checked by Vega's own compiler in the tests, and the page carries
Vega's libraries, so that no other charting package is needed.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from weakspot.audit.findings.distributions import MISCLASSIFIED
from weakspot.audit.findings.outcomes import WHOLE_IMAGE
from weakspot.audit.page.elements import Chart
from weakspot.statistics.number_format import percent

# Colors are variables of the style sheet: charts follow light mode, dark mode and print.
INK, FAINT, LINE, CARD = "var(--ink)", "var(--faint)", "var(--line)", "var(--card)"
SERIES = tuple(f"var(--series-{number})" for number in range(7))
OUTCOMES = {
    "fooled": "var(--fooled)",
    "withstood": "var(--withstood)",
    "random edit": FAINT,
    MISCLASSIFIED: LINE,
}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
SOLID = [1, 0]
DASHES = ([2, 2], [8, 3, 2, 3], [4, 4], [10, 3], [1, 3])
NORMS = {"linf": "largest change of a channel, in steps of 1/255", "l2": "L2 norm of the change"}
CELL_HEIGHT = 18  # pixels of one attack in one region
HISTOGRAM_HEIGHT = 58  # pixels, with the heading
BARS, HEADING = 0.58, 0.8  # of that height: the highest bar, and the place of the heading
SQUARE = 26  # pixels of a row of confusions
BUDGET_HEIGHT, LAYER_HEIGHT = 280, 190
MAX_TICKS = 10  # of layers
FEW_SIZES = 5  # of a budget curve, which are marked by points

Spec = dict[str, object]
SEPARATE_LEGENDS: Spec = {"legend": {"color": "independent", "strokeDash": "independent"}}
TEXT: Spec = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "text": {"color": INK, "fontSize": 12},
    "rule": {"color": INK},
    "axis": {
        **TEXT, "labelColor": INK, "titleColor": FAINT, "gridColor": LINE, "domainColor": LINE, "tickColor": LINE,
        "labelLimit": 150,
    },
    "legend": {
        **TEXT, "labelColor": INK, "titleColor": FAINT, "orient": "top", "labelLimit": 220, "symbolStrokeWidth": 2,
    },
}  # fmt: skip


def _chart(title: str, meaning: str, spec: Spec, height: int, group: str = "") -> Chart:
    """Finish a specification: as wide as its place on the page, in a group of its own by default."""
    spec = {
        **spec,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
    }
    return Chart(title, spec, meaning, group or title)


def _field(name: str, kind: str = "quantitative", **options: object) -> Spec:
    return {"field": name, "type": kind, **options}


def _tooltip(*names: str, **formats: str) -> list[Spec]:
    """Tooltip fields: `names` are texts, `formats` maps numbers to their format ("" for Vega's own)."""
    texts = [_field(name, "nominal") for name in names]
    return texts + [_field(name) | ({"format": form} if form else {}) for name, form in formats.items()]


def _layer(mark: Spec, shared: Spec | None = None, *, data: str = "rows", **encoding: object) -> Spec:
    return {"data": {"name": data}, "mark": mark, "encoding": {**(shared or {}), **encoding}}


def _squares(color: str, strength: str, text: Spec, shared: Spec) -> list[Spec]:
    """The layers of a grid: squares in one color, drawn more strongly from 0 to 1, and a text in each."""
    # Opacity over one color of the page is readable in light, dark and gray.
    opacity = _field(strength, legend=None, scale={"domain": [0, 1], "range": [0.06, 0.75]})
    return [
        _layer({"type": "rect", "color": color}, shared, opacity=opacity),
        _layer({"type": "text", "fontSize": 11}, shared, text=text),
    ]


def _rows(table: pd.DataFrame) -> list[Spec]:
    """Rows for a specification: four significant digits, None for what is not finite."""
    return [{str(key): json_number(value) for key, value in row.items()} for row in table.to_dict("records")]


def json_number(value: object) -> object:
    """A value as JSON represents it."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def _colors(names: Sequence[str], palette: Sequence[object]) -> Spec:
    """A scale that gives each name an entry of the palette, starting over if there are too few."""
    return {"domain": list(names), "range": [palette[place % len(palette)] for place in range(len(names))]}


def robust_chart(cells: pd.DataFrame, clean: float) -> Chart:
    """A point with its 95% interval for every attack and region, the weakest region first.

    Args:
        cells: columns attack, region, region_fraction, images, robust_accuracy, low, high.
        clean: clean accuracy, drawn as a dashed line; NaN for none.
    """
    known = cells[cells["robust_accuracy"].notna()]
    order = known.groupby("region", sort=False)["robust_accuracy"].min().sort_values(kind="stable").index
    area = known.groupby("region")["region_fraction"].mean()
    names = {region: f"{region} ({percent(float(area[region]))})" for region in order}
    names |= {region: "whole image" for region in order if region == WHOLE_IMAGE}
    attacks = list(dict.fromkeys(known["attack"]))
    table = known.assign(where=known["region"].map(names), robust=known["robust_accuracy"])
    shared: Spec = {
        "y": _field("where", "nominal", sort=list(names.values()), title=None,
                    axis={"grid": True, "tickBand": "extent"}),
        "yOffset": _field("attack", "nominal", sort=attacks, scale={"paddingOuter": 0.4}),
        "color": _field("attack", "nominal", sort=attacks, title=None, scale=_colors(attacks, SERIES)),
        "tooltip": [
            *_tooltip("attack"), _field("where", "nominal", title="region"),
            _field("robust", format=".1%", title="robust accuracy"), *_tooltip(low=".1%", high=".1%", images=""),
        ],
    }  # fmt: skip
    x_axis: Spec = {"format": "%", "tickCount": 5}
    across = _field("low", scale={"domain": [0, 1]}, axis=x_axis, title="robust accuracy, 95% interval")
    shape = _field("attack", "nominal", sort=attacks, title=None, scale=_colors(attacks, SHAPES))
    point: Spec = {"type": "point", "filled": True, "size": 90, "opacity": 1, "stroke": CARD}
    layers = [
        _layer({"type": "rule", "strokeWidth": 2.5}, shared, x=across, x2={"field": "high"}),
        _layer(point, shared, x=_field("robust"), shape=shape),
    ]
    datasets = {"rows": _rows(table[["where", "attack", "robust", "low", "high", "images"]])}
    meaning = "Fraction of images that remain correctly classified, for each attack and region"
    if not math.isnan(clean):
        meaning += "; the dashed line is the accuracy without an attack"
        datasets["clean"] = [{"clean": json_number(clean)}]
        line: Spec = {"type": "rule", "strokeDash": [4, 4], "color": FAINT}
        layers.insert(0, _layer(line, data="clean", x=_field("clean")))
    return _chart(
        "Robust accuracy by region",
        f"{meaning}.",
        {"datasets": datasets, "layer": layers, "resolve": {"legend": {"shape": "shared"}}},
        max(60, len(names) * (14 + CELL_HEIGHT * len(attacks))),
    )


def histogram_chart(title: str, bins: pd.DataFrame, headings: Mapping[tuple[str, str], str]) -> Chart:
    """One histogram per attack and region, stacked by outcome, below each other on one axis.

    Args:
        title: of the score.
        bins: columns attack, region, outcome, low, high, count, from `distributions`.
        headings: (attack, region) to the heading of its histogram, in the order of drawing.
    """
    # All histograms share one chart: number n lies between y = -n (its foot) and 1 - n.
    places = {cell: number for number, cell in enumerate(headings)}
    table = bins.sort_values("outcome").rename(columns={"count": "images"})
    place = np.array([places[cell] for cell in zip(table["attack"], table["region"], strict=True)])
    table["fraction"] = table["images"] / table.groupby(["attack", "region"])["images"].transform("sum")
    # Regions share a scale within an attack. Across attacks, one that ends in a single bar, as minimal-norm attacks do
    # at the boundary, would flatten the others.
    highest = table.groupby(["attack", "region", "low"])["fraction"].transform("sum").groupby(table["attack"])
    scale = BARS / highest.transform("max")
    # Bars of an outcome stand on those of the outcome before.
    heights = table["fraction"] * scale
    table["head"] = heights.groupby([table["attack"], table["region"], table["low"]]).cumsum() - place
    table["foot"] = table["head"] - heights
    low, high = float(bins["low"].min()), float(bins["high"].max())
    y_scale: Spec = {"domain": [-len(places) + 0.92, 1.05], "nice": False, "zero": False}
    x = _field(
        "low", title=title, scale={"domain": [low, high], "nice": False, "zero": False}, axis={"tickCount": 8}
    )
    colors = _field(
        "outcome", "nominal", title=None, scale=_outcome_scale(list(dict.fromkeys(table["outcome"])))
    )
    tooltip = [*_tooltip(low="", high=""), *_tooltip("outcome", images="", fraction=".1%")]
    numbers = range(len(places))
    datasets: dict[str, object] = {
        "rows": _rows(table[["low", "high", "outcome", "images", "fraction", "foot", "head"]]),
        "headings": [{"text": text, "at": HEADING - number} for number, text in enumerate(headings.values())],
        "feet": [{"at": -number} for number in numbers],
    }

    def y(name: str) -> Spec:
        return _field(name, axis=None, scale=y_scale)

    bar: Spec = {"type": "rect", "stroke": CARD, "strokeWidth": 0.5}
    text: Spec = {"type": "text", "align": "left", "baseline": "middle", "dx": 2}
    layers = [
        _layer({"type": "rule", "color": FAINT, "strokeWidth": 0.5}, data="feet", y=y("at")),
        _layer(
            bar, x=x, x2={"field": "high"}, y=y("foot"), y2={"field": "head"}, color=colors, tooltip=tooltip
        ),
        _layer(text, data="headings", x={"value": 0}, y=y("at"), text=_field("text", "nominal")),
    ]
    if low < 0 < high:
        datasets["zero"] = [{"zero": 0, "foot": -number, "head": BARS - number} for number in numbers]
        zero: Spec = {"type": "rule", "color": INK, "strokeDash": [2, 3]}
        # Layers are drawn in this order: the line is under the bars.
        layers.insert(1, _layer(zero, data="zero", x=_field("zero"), y=y("foot"), y2={"field": "head"}))
    return _chart(
        title,
        f"Distribution of the {title} over images, for each attack and region, stacked by outcome in colors. Heights "
        "can be compared between the regions of an attack.",
        {"datasets": datasets, "layer": layers},
        HISTOGRAM_HEIGHT * len(places) + 10,
    )


def _outcome_scale(outcomes: Sequence[str]) -> Spec:
    return {"domain": list(outcomes), "range": [OUTCOMES[outcome] for outcome in outcomes]}


def confusion_chart(title: str, confusions: pd.DataFrame) -> Chart:
    """A grid of labels and adversarial classes.

    Args:
        title: the attack and region.
        confusions: columns label, adversarial_class, fooled.
    """
    totals = confusions.groupby("label")["fooled"].transform("sum")
    table = confusions.assign(fraction=confusions["fooled"] / totals)
    names = sorted(set(confusions["label"]) | set(confusions["adversarial_class"]))
    shared: Spec = {
        "x": _field("adversarial_class", "nominal", sort=names, title="class after the attack",
                    scale={"domain": names}, axis={"labelAngle": -45, "labelLimit": 90}),
        "y": _field("label", "nominal", sort=names, title="label", scale={"domain": names}),
        "tooltip": [
            *_tooltip("label"), _field("adversarial_class", "nominal", title="class after the attack"),
            *_tooltip(fooled=""), _field("fraction", format=".1%", title="of the label's fooled images"),
        ],
    }  # fmt: skip
    layers = _squares(OUTCOMES["withstood"], "fraction", _field("fooled"), shared)
    return _chart(
        title,
        "How many images of the class in the row were classified as the class in the column after the attack; stronger "
        "colors are a larger fraction of their row.",
        {
            "datasets": {"rows": _rows(table[["label", "adversarial_class", "fooled", "fraction"]])},
            "layer": layers,
        },
        SQUARE * len(names),
    )


def budget_chart(title: str, curves: pd.DataFrame) -> Chart:
    """Fraction of images fooled by changes up to a size: a step curve with its band for each region.

    Args:
        title: the attack and norm.
        curves: columns region, control, norm, size, fooled, low, high, images, of one attack and norm.
    """
    curves = curves.assign(region=curves["region"].replace(WHOLE_IMAGE, "whole image"))
    regions = list(dict.fromkeys(curves.sort_values("control", kind="stable")["region"]))
    controls = dict(zip(curves["region"], curves["control"], strict=True))
    table = curves.sort_values("size", kind="stable")
    norm = str(curves["norm"].iloc[0])
    if norm == "linf":
        table = table.assign(size=255 * table["size"])
    x = _field("size", title=NORMS.get(norm, norm), scale={"zero": True}, axis={"tickCount": 8})
    scale = _colors(regions, SERIES)
    dashes = [
        DASHES[place % len(DASHES)] if controls[region] else SOLID for place, region in enumerate(regions)
    ]
    dash = _field("region", "nominal", sort=regions, title=None, scale={"domain": regions, "range": dashes})
    tooltip = [*_tooltip("region"), *_tooltip(size="", fooled=".1%", low=".1%", high=".1%", images="")]
    low = _field("low", title="fooled, with 95% interval", scale={"domain": [0, 1]}, axis={"format": "%"})
    area: Spec = {"type": "area", "opacity": 0.15, "interpolate": "step-after"}
    line: Spec = {"type": "line", "strokeWidth": 2, "interpolate": "step-after"}
    if curves["size"].nunique() <= FEW_SIZES:
        line["point"] = {"size": 40}
    layers = [
        _layer(area, x=x, y=low, y2={"field": "high"}, color=_field("region", "nominal", legend=None, scale=scale)),
        _layer(
            line, x=x, y=_field("fooled"), strokeDash=dash, tooltip=tooltip,
            color=_field("region", "nominal", sort=regions, title=None, scale=scale),
        ),
    ]  # fmt: skip
    rows = _rows(table[["region", "size", "fooled", "low", "high", "images"]])
    return _chart(
        title,
        "Fraction of correctly classified images that a change of this size or a smaller one fools, for each region"
        + ("; shifted regions, which are controls, are dashed." if any(controls.values()) else "."),
        {"datasets": {"rows": rows}, "layer": layers, "resolve": SEPARATE_LEGENDS},
        BUDGET_HEIGHT,
    )


def layer_chart(title: str, group: str, curves: pd.DataFrame, highest: float) -> Chart:
    """Means over images along the layers with their intervals, a line for each outcome.

    Args:
        title: the measure, attack and region.
        group: of charts that are shown together.
        curves: columns measure, outcome, place, layer, mean, low, high, images, one row per layer and outcome.
        highest: end of the axis, so that charts can be compared.
    """
    known = curves[curves["mean"].notna()]
    # Spread and reach have no values below zero, but the interval of a mean may begin there.
    known = known.assign(low=known["low"].clip(lower=0))
    measure = str(curves["measure"].iloc[0])
    outcomes = [name for name in OUTCOMES if name in set(known["outcome"])]
    dashes = dict(zip(OUTCOMES, (SOLID, [6, 3], [2, 2]), strict=False))
    scale = _outcome_scale(outcomes)
    # Written out: a chart with few layers would repeat the numbers of its ticks.
    layers_drawn = sorted({int(place) for place in known["place"]})
    ticks = layers_drawn[:: math.ceil(len(layers_drawn) / MAX_TICKS)]
    x = _field(
        "place", title="layer, first to last", scale={"nice": False}, axis={"values": ticks, "format": "d"}
    )
    low = _field("low", title=measure, scale={"domain": [0, json_number(highest or 1.0)]})
    tooltip = [*_tooltip("layer", "outcome"), *_tooltip(mean="", low="", high="", images="")]
    dash_scale = {"domain": outcomes, "range": [dashes[outcome] for outcome in outcomes]}
    color = _field("outcome", "nominal", legend=None, scale=scale)
    layers = [
        _layer({"type": "area", "opacity": 0.2}, x=x, y=low, y2={"field": "high"}, color=color),
        _layer(
            {"type": "line", "strokeWidth": 2, "point": {"size": 20, "filled": False}},
            x=x, y=_field("mean"), tooltip=tooltip, color=_field("outcome", "nominal", title=None, scale=scale),
            strokeDash=_field("outcome", "nominal", title=None, scale=dash_scale),
        ),
    ]  # fmt: skip
    rows = _rows(known[["outcome", "place", "layer", "mean", "low", "high", "images"]])
    return _chart(
        title,
        f"Mean {measure} over images in every layer with its 95% interval, for images that were fooled and images that "
        "withstood.",
        {"datasets": {"rows": rows}, "layer": layers, "resolve": SEPARATE_LEGENDS},
        LAYER_HEIGHT,
        group,
    )
