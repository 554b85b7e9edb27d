"""The maps of a pair as they are drawn, and a sentence in place of each map that would show nothing new."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weakspot.attacks.first_order import cell_numbers
from weakspot.explanations.analysis import Picture
from weakspot.explanations.explanation import Explanation
from weakspot.explanations.weakest_places import GRID
from weakspot.statistics.number_format import in_levels, number

# In fractions of the color scale.
UNIFORM = 0.05  # a map whose colors differ by less looks the same everywhere
LOGARITHMIC = ("first_order",)  # maps of sizes: the smallest, the weakest places, are drawn brightest
LEAST_RATIO = 4.0  # of the ends of a logarithmic scale, so that small differences look small
OUTLINED = "smallest_square"  # drawn as an outline in the map "first_order"
SAME_MEAN, SAME_LARGEST = 0.02, 0.1  # two maps that differ by less look alike
DIFFERENCE = Picture(
    "Difference",
    kind="signed",
    meaning="Adversarial minus clean image, mean over color channels: blue is darker, orange is brighter.",
)


@dataclass(frozen=True)
class MapView:
    """One map of one pair, ready to be drawn.

    Attributes:
        name: of the map.
        title: with class names filled in.
        meaning: one sentence, with class names filled in.
        picture: how it is drawn.
        values: (H, W).
        low: value of the first color.
        high: value of the last color; on a logarithmic scale the smaller of the two.
        square: (top, left, side) in pixels, outlined in the map; None for none.
    """

    name: str
    title: str
    meaning: str
    picture: Picture
    values: NDArray[np.float32]
    low: float
    high: float
    square: tuple[int, int, int] | None = None

    def __repr__(self) -> str:
        return f"MapView({self.name!r}, {self.values.shape}, {self.low:.3g} to {self.high:.3g})"

    @property
    def logarithmic(self) -> bool:
        """Whether colors follow the logarithm of the values, the smallest brightest."""
        return self.name in LOGARITHMIC

    @property
    def scaled(self) -> tuple[NDArray[np.float32], float, float]:
        """Values (H, W), first and last color as they are drawn: logarithms to base 10 on a logarithmic scale."""
        # On a logarithmic scale `low` is the largest size, and an infinite one is drawn like it.
        values = np.nan_to_num(self.values, posinf=self.low)
        if not self.logarithmic:
            return values, self.low, self.high
        logs: NDArray[np.float32] = np.log10(np.maximum(values, self.high))
        return logs, math.log10(self.low), math.log10(self.high)

    @property
    def cells(self) -> dict[str, object] | None:
        """Where the cells of a weak-spot map begin and end, and the change that each needs; None for other maps.

        A change of the whole range or more is no size: no change inside the image is that large.
        """
        if not self.logarithmic:
            return None
        tops, lefts = cell_edges(self.values.shape, GRID)
        sizes = [[_size(self.values[top, left]) for left in lefts[:-1]] for top in tops[:-1]]
        return {"tops": tops, "lefts": lefts, "sizes": sizes, "verified": False}

    @property
    def colors(self) -> NDArray[np.float32]:
        """(H, W) place of each value on the color scale, 0 to 1; values that are not defined are 0."""
        values, low, high = self.scaled
        clipped: NDArray[np.float32] = np.clip((values - low) / (high - low), 0, 1)
        return clipped


def map_views(explanation: Explanation, index: int) -> list[MapView]:
    """The difference of a pair and all of its maps; maps with the same scale name share their color limits."""
    maps = {"difference": explanation.pairs.perturbation[index].mean(0).numpy()}
    maps |= {
        name: tensor[index, 0].numpy().astype(np.float32)
        for name, tensor in explanation.maps.items()
        if name != OUTLINED
    }
    pictures = {"difference": DIFFERENCE} | explanation.pictures
    label, target = explanation.class_names[index]
    views = []
    for name, values in maps.items():
        picture = pictures[name]
        same_scale = [maps[key] for key in maps if picture.scale and pictures[key].scale == picture.scale]
        low, high = _ends(values) if name in LOGARITHMIC else _limits(picture, same_scale or [values])
        title = filled(picture.title, label, target)
        if name == "difference" and 0 < high < 1 / 1.5:
            title = f"Difference, amplified {1 / high:.0f} times"
        meaning = filled(picture.meaning, label, target)
        square = _square(explanation, index) if name in LOGARITHMIC else None
        views.append(MapView(name, title, meaning, picture, values, low, high, square))
    return views


def _square(explanation: Explanation, index: int) -> tuple[int, int, int] | None:
    """Top, left and side of the smallest square found; None if there is none."""
    row = explanation.scores.iloc[index]
    place = [float(row.get(f"{OUTLINED}_{name}", math.nan)) for name in ("top", "left", "side")]
    return None if any(map(math.isnan, place)) else (int(place[0]), int(place[1]), int(place[2]))


def _size(value: float) -> float | None:
    return float(value) if 0 <= value < 1 else None


def cell_edges(size: Sequence[int], grid: int) -> tuple[list[int], list[int]]:
    """First rows and first columns of the cells of a grid over (height, width), and the ends of the last ones.

    >>> cell_edges((2, 5), 2)
    ([0, 1, 2], [0, 3, 5])
    """
    numbers, (rows, columns) = cell_numbers((size[0], size[1]), grid)
    # In the first column of sites, cells are numbered in steps of `columns`; their heights add up to edges.
    tops = numbers[:, 0].div(columns, rounding_mode="floor").bincount().cumsum(0).tolist()
    lefts = numbers[0].bincount().cumsum(0).tolist()
    assert len(tops) == rows  # noqa: S101
    return [0, *tops], [0, *lefts]


def _ends(sizes: NDArray[np.float32]) -> tuple[float, float]:
    """Largest and smallest size above 0, at least `LEAST_RATIO` apart."""
    positive = sizes[np.isfinite(sizes) & (sizes > 0)]
    if not positive.size:
        return 1.0, 1 / LEAST_RATIO
    low, most = float(positive.min()), float(positive.max())
    # No value can move by more than 1, the whole range, so the scale does not go beyond it either.
    high = max(most, min(1.0, LEAST_RATIO * low))
    return high, min(low, high / LEAST_RATIO)


def filled(text: str, label: str, target: str) -> str:
    """The text with the names of both classes.

    >>> filled("{label}, clean image", "{target}", "cat")
    '{target}, clean image'
    """
    # Split first, because a class may itself be called "{target}".
    return label.join(part.replace("{target}", target) for part in text.split("{label}"))


def _limits(picture: Picture, maps: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """Color limits over these maps: around zero if signed, from zero up if magnitudes; never an empty range."""
    if picture.fixed is not None:
        return picture.fixed
    if picture.kind == "category":
        return 0.0, float(max(len(picture.categories) - 1, 1))
    # Symmetric limits, so that the middle of a diverging color table means zero.
    sizes = [np.abs(values) if picture.kind == "signed" else values for values in maps]
    high = float(max((np.nanmax(v, initial=0, where=np.isfinite(v)) for v in sizes), default=0)) or 1.0
    return (-high, high) if picture.kind == "signed" else (0.0, high)


def worth_drawing(views: Sequence[MapView]) -> tuple[list[MapView], dict[str, str]]:
    """The maps that show something, and a sentence for each of the others, by name.

    A map shows nothing if it looks the same everywhere, or like an earlier map. The difference image is always drawn.
    """
    drawn: list[MapView] = []
    sentences: dict[str, str] = {}
    for view in views:
        sentence = "" if view.name == "difference" else _uniform(view) or _repeated(view, drawn)
        if sentence:
            sentences[view.name] = sentence
        else:
            drawn.append(view)
    return drawn, sentences


def _uniform(view: MapView) -> str:
    """What a map that looks the same everywhere says; empty if it does not look so."""
    values = view.values
    finite = values[np.isfinite(values)]
    if not finite.size:
        return f"“{view.title}” is not defined for this image."
    if view.picture.kind == "category":
        first = int(values.flat[0])
        if (values != first).any():
            return ""
        named = first < len(view.picture.categories)
        value = view.picture.categories[first] if named else first
        return f"“{view.title}” is the same everywhere: {value}."
    colors = view.colors
    if finite.size < values.size or colors.max() - colors.min() >= UNIFORM:
        return ""
    if finite.max() <= 0 <= view.low or (view.logarithmic and finite.max() <= 0):
        return f"“{view.title}” is nowhere above 0."
    if view.logarithmic and finite.min() >= 1:
        return f"“{view.title}” is the whole range, 255/255, or more everywhere."
    low, high = (
        in_levels(float(end)) if view.logarithmic else number(float(end))
        for end in (finite.min(), finite.max())
    )
    between = f"{low} everywhere" if low == high else f"between {low} and {high} everywhere"
    return f"“{view.title}” is {between}."


def _repeated(view: MapView, drawn: Sequence[MapView]) -> str:
    """Which earlier map this one looks like; empty if there is none.

    Maps on one scale look alike if their colors do. Those on different scales are compared as patterns.
    """
    for other in drawn:
        alike = (other.picture.kind, other.values.shape) == (view.picture.kind, view.values.shape)
        if not alike or other.name == "difference" or other.picture.categories != view.picture.categories:
            continue
        together = view.picture.scale is not None and view.picture.scale == other.picture.scale
        distance = np.abs(view.colors - other.colors if together else _pattern(view) - _pattern(other))
        if distance.mean() < SAME_MEAN and distance.max() < SAME_LARGEST:
            return f"“{view.title}” is not drawn: its pattern is nearly that of “{other.title}”."
    return ""


def _pattern(view: MapView) -> NDArray[np.float32]:
    """The values in units of the largest; categories as they are."""
    values: NDArray[np.float32] = np.nan_to_num(view.values)
    if view.picture.kind == "category" or view.logarithmic:
        return values
    if view.picture.kind == "magnitude":
        values = np.maximum(values, 0)  # below zero is drawn as zero
    return values / (np.abs(values).max() or 1.0)
