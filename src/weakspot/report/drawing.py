"""Drawing: what figures and pages both need to know of a pair's maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weakspot.explanations.analysis import Picture

if TYPE_CHECKING:
    from weakspot.explanations.explanation import Explanation

DIFFERENCE = Picture(
    "Difference",
    kind="signed",
    meaning="Adversarial less clean image, mean over colour channels: blue is darker, orange is brighter.",
)


@dataclass(frozen=True)
class Drawing:
    """One map of one pair, ready to be drawn.

    Attributes:
        name: of the map.
        title: class names filled in.
        meaning: one sentence, class names filled in.
        picture: how it is drawn.
        values: (H, W).
        low: value of the first colour.
        high: value of the last colour.
    """

    name: str
    title: str
    meaning: str
    picture: Picture
    values: NDArray[np.float32]
    low: float
    high: float


def drawings(explanation: Explanation, index: int) -> list[Drawing]:
    """The difference of the pair and every map that was found, maps of one scale sharing their limits."""
    maps = {"difference": explanation.pairs.perturbation[index].mean(0).numpy()}
    maps |= {name: tensor[index, 0].numpy().astype(np.float32) for name, tensor in explanation.maps.items()}
    pictures = {"difference": DIFFERENCE} | explanation.pictures
    own, other = explanation.class_names[index]

    def told(text: str) -> str:
        return text.replace("{label}", own).replace("{target}", other)

    ready = []
    for name, values in maps.items():
        picture = pictures[name]
        alike = [maps[key] for key in maps if picture.scale and pictures[key].scale == picture.scale] or [
            values
        ]
        low, high = _limits(picture, alike)
        title = told(picture.title)
        if name == "difference" and high > 0:
            title = f"Difference, amplified {1 / high:.0f} times"
        ready.append(Drawing(name, title, told(picture.meaning), picture, values, low, high))
    return ready


def _limits(picture: Picture, alike: list[NDArray[np.float32]]) -> tuple[float, float]:
    """Colour limits: around zero for signed maps, from zero up for magnitudes; never of no width."""
    if picture.fixed is not None:
        return picture.fixed
    if picture.kind == "category":
        return 0.0, float(max(len(picture.categories) - 1, 1))
    finite = [np.abs(values) if picture.kind == "signed" else values for values in alike]
    high = float(max((np.nanmax(v, initial=0, where=np.isfinite(v)) for v in finite), default=0)) or 1.0
    return (-high, high) if picture.kind == "signed" else (0.0, high)
