"""Vargas and Su, "Understanding the One-Pixel Attack: Propagation Maps and Locality Analysis", arXiv 1902.02947."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool2d

from weakspot import attacks
from weakspot.explanations import PropagationStudy, locality, propagation_study
from weakspot.pairs import AttackResult
from weakspot.reproduction.claims import CAUTION, CONFIRMED, NOT_CONFIRMED, Claim, untested
from weakspot.reproduction.material import Material
from weakspot.statistics import mean_interval
from weakspot.statistics.number_format import counted, number, percent

CITATION = "Vargas and Su, arXiv 1902.02947"
REACHES = (
    "even in extremely deep networks such as Resnet, modification in one pixel easily propagates until the last "
    "layer"
)
GLOBAL = (
    "this initial local perturbation is also shown to spread becoming a global one and reaching absolute "
    "difference values that "
    "are close to the maximum value of the original feature maps in a given layer"
)
NEIGHBORS = "nearby pixels of the perturbed one in the one-pixel attack tend to share the same vulnerability"
FEWEST = 20  # attacks that succeed, for the interval of a mean
LARGEST = 64  # pixels a side: above, one pixel rarely fools a network and the search takes hours
WIDE, CLOSE = 0.5, 0.5  # "global": half of the sites; "close to the maximum": half of it


class OnePixel:
    """The three claims, on one-pixel attacks."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.attack = "guided search for one pixel"
        self.claims = {
            "reaches the last layer": self.reaches,
            "becomes global": self.spreads,
            "neighbors share the weakness": self.neighbors,
        }

    @cached_property
    def pairs(self) -> AttackResult | None:
        """One-pixel attacks on every image; None where the images are too large."""
        material = self.material
        if max(material.images.shape[2:]) > LARGEST:
            return None
        material.log("searching for one-pixel attacks")
        return attacks.few_pixel(
            material.model, material.images, material.labels, count=1, method="guided", seed=material.seed
        )

    @cached_property
    def study(self) -> PropagationStudy:
        """Propagation of successful attacks, failed ones and random edits."""
        assert self.pairs is not None  # noqa: S101 - `_why_not` is asked first
        self.material.log("following the pixel through the layers")
        return propagation_study(self.material.model, self.pairs, seed=self.material.seed)

    def _why_not(self) -> str:
        if self.pairs is None:
            height, width = self.material.images.shape[2:]
            return f"The images have {height} x {width} pixels; the test needs images of up to {LARGEST} x {LARGEST}."
        fooled = int(self.pairs.success.sum())
        if fooled < FEWEST:
            return (
                f"{fooled} of {counted(self.material.count)} can be fooled by one pixel; {FEWEST} are needed."
            )
        return ""

    def _last(self) -> dict[str, pd.Series]:
        """The row of each group in the last layer."""
        table = self.study.table
        last = table[table["layer"] == self.study.layers[-1]]
        return {str(row["group"]): row for _, row in last.iterrows()}

    def reaches(self) -> Claim:
        """Whether any change arrives at the last layer."""
        name = "reaches the last layer"
        if why := self._why_not():
            return untested(name, REACHES, why)
        rows = self._last()
        own = rows["successes"]
        measured = (
            f"In the last layer ({self.study.layers[-1]}), successful one-pixel attacks change "
            f"{_rate(own, 'spread')} of the sites by more "
            f"than a tenth of the layer's peak; the largest change is {_times(own)} the peak "
            f"({counted(int(own['images']))})."
        )
        # Every pixel reaches the last layer of a network with a global view: what counts is how much arrives.
        control = (
            _beside(rows)
            + " Random edits of one pixel arrive too; arriving says little about why an attack succeeds."
        )
        outcome = CAUTION if own["reach_low"] > 0 else NOT_CONFIRMED
        return Claim(name, REACHES, measured, control, outcome, _numbers(rows))

    def spreads(self) -> Claim:
        """Whether the change covers the last maps and comes close to their peak."""
        name = "becomes global"
        if why := self._why_not():
            return untested(name, GLOBAL, why)
        rows = self._last()
        own, random = rows["successes"], rows.get("random edits")
        measured = (
            f"In the last layer, {_rate(own, 'spread')} of the sites change by more than a tenth of the layer's "
            f"peak, and the largest "
            f"change is {_times(own)} that peak."
        )
        wide, close = own["spread_low"] >= WIDE, own["reach_low"] >= CLOSE
        beyond = random is not None and own["reach_low"] > random["reach_high"]
        outcome = NOT_CONFIRMED
        if wide and close:
            outcome = CONFIRMED if beyond else CAUTION
        elif wide or close:
            outcome = CAUTION
        control = (
            f"{_beside(rows)} Confirmed means at least {percent(WIDE)} of the sites and {percent(CLOSE)} of the peak, "
            "beyond random edits."
        )
        return Claim(name, GLOBAL, measured, control, outcome, _numbers(rows))

    def neighbors(self) -> Claim:
        """Whether the fooling pixel, moved by one, fools more often than elsewhere."""
        name = "neighbors share the weakness"
        if why := self._why_not():
            return untested(name, NEIGHBORS, why)
        assert self.pairs is not None  # noqa: S101
        self.material.log("moving the pixel")
        result = locality(self.material.model, self.pairs, seed=self.material.seed)
        rows = {str(row["control"]): row for _, row in result.controls.iterrows()}
        near, random, failed = rows["neighbors"], rows["random"], rows["neighbors of failed attacks"]
        measured = (
            f"Moved to a neighboring site, the pixel of a successful attack still fools the network at "
            f"{_rate(near, 'rate')} of these "
            f"sites; at any other site of the image, at {_rate(random, 'rate')} ({counted(int(near['images']))})."
        )
        control = (
            f"The pixel of a failed attack fools at {_rate(failed, 'rate')} of its neighbors "
            f"({counted(int(failed['images']))})."
        )
        numbers = {
            "neighbors": float(near["rate"]),
            "random": float(random["rate"]),
            "failed": float(failed["rate"]),
        }
        excess, low, high = mean_interval(self._excess(result.success), self.material.seed)
        points = f"{100 * excess:+.0f} points [{100 * low:.0f}, {100 * high:.0f}]"
        measured += f" The difference within an image is {points}."
        outcome = CONFIRMED if low > 0 else NOT_CONFIRMED
        if low > 0 and failed["images"] and failed["high"] >= near["low"]:
            outcome = CAUTION
        return Claim(name, NEIGHBORS, measured, control, outcome, numbers)

    def _excess(self, success: Tensor) -> NDArray[np.float64]:
        """Of each successful attack: the rate among the eight neighbors minus the rate at all other sites."""
        assert self.pairs is not None  # noqa: S101
        changed = (self.pairs.perturbation != 0).any(1, keepdim=True)
        around = max_pool2d(changed.float(), 3, 1, 1).bool() & ~changed
        near, other = around[:, 0], ~changed[:, 0]

        def rate(sites: Tensor) -> Tensor:
            return (success.cpu() & sites).sum((1, 2)) / sites.sum((1, 2))

        return (rate(near) - rate(other))[self.pairs.success].double().numpy()


def _rate(row: pd.Series, name: str) -> str:
    low, high = ("low", "high") if name == "rate" else (f"{name}_low", f"{name}_high")
    return f"{percent(float(row[name]))} [{percent(float(row[low]))}, {percent(float(row[high]))}]"


def _times(row: pd.Series) -> str:
    reach, low, high = (number(float(row[name])) for name in ("reach", "reach_low", "reach_high"))
    return f"{reach} [{low}, {high}] times"


def _beside(rows: dict[str, pd.Series]) -> str:
    others = [group for group in rows if group != "successes"]
    parts = [
        f"{group}: {_rate(rows[group], 'spread')} of the sites, {_times(rows[group])} the peak"
        for group in others
    ]
    return f"{'; '.join(parts)}.".capitalize() if parts else "No failed attack to compare with."


def _numbers(rows: dict[str, pd.Series]) -> dict[str, float]:
    return {
        f"{group} {name}": float(row[name]) for group, row in rows.items() for name in ("spread", "reach")
    }
