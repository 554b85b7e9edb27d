"""Vargas and Su, "Understanding the One-Pixel Attack: Propagation Maps and Locality Analysis", arXiv 1902.02947."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool2d

from weakspot import _random, attacks
from weakspot.classifier import evaluating, predict
from weakspot.explanations import Locality, PropagationStudy, locality, propagation_study
from weakspot.explanations.visible_change import with_shuffled_weights
from weakspot.pairs import AttackResult, Pairs
from weakspot.proofs import certify_pixels
from weakspot.reproduction.claim_panels import Panel, Series, rounded
from weakspot.reproduction.claims import CAUTION, CONFIRMED, NOT_CONFIRMED, Claim, Measurement, untested
from weakspot.reproduction.material import Material
from weakspot.statistics import fraction_interval, mean_interval, rate_interval
from weakspot.statistics.number_format import counted, number, percent, points, with_interval

TITLE = "Understanding the One-Pixel Attack: Propagation Maps and Locality Analysis"
CITATION = "Vargas and Su, arXiv 1902.02947"
REACHES = (
    "even in extremely deep networks such as Resnet, modification in one pixel easily propagates until the last "
    "layer"
)
GLOBAL = (
    "this initial local perturbation is also shown to spread becoming a global one and reaching absolute difference "
    "values that are close to the maximum value of the original feature maps in a given layer"
)
NEIGHBORS = "nearby pixels of the perturbed one in the one-pixel attack tend to share the same vulnerability"
METHOD = (
    "One pixel of every image may take any color, and a search guided by gradients looks for one that changes "
    "the class. For the first two claims, the change of every layer's maps is measured for successful attacks, "
    "for attacks that failed, and for the successful pixels at random sites; and once more, for random pixels, "
    "in the network with permuted weights. Reach is the largest change as a multiple of the layer's peak in the "
    "clean image, and spread the fraction of sites that change by more than a tenth of that peak. For the third "
    "claim, the color of a successful attack is moved to every other site of its image. Neighboring sites are "
    "compared with all other sites of the same image, and with the neighbors of failed attacks."
)
LIMITS = (
    'The abstract gives no thresholds for "global" and "close to the maximum": half of the sites and half of '
    "the peak are ours. The paper searches by differential evolution; the guided search finds more, so the "
    "pixels it finds may be others. A failed search does not prove that no pixel fools; the pixels proven safe "
    "are a sample, and are missing for networks without bounds."
)
QUOTES: Mapping[str, str] = {
    "reaches the last layer": REACHES,
    "becomes global": GLOBAL,
    "neighbors share the weakness": NEIGHBORS,
}
FEWEST = 20  # attacks that succeed, for the interval of a mean
LARGEST = 64  # pixels a side: above, one pixel rarely fools a network and the search takes hours
ARRIVES = 0.1  # of the peak of the last layer: from here on, a change counts as having arrived
CONTROLS = ("failures", "random edits")
RADII = (1, 2, 3, 4, 6, 8, 12)
EXCESS = 0.05  # by which neighbors must exceed other sites, at least
WIDE, CLOSE = 0.5, 0.5  # "global": half of the sites; "close to the maximum": half of it
# Of proofs, quick or full: so many images, so many pixels of each, drawn at random, and a limit of time that is not
# reached as a rule; the pixels that are left then are not decided.
IMAGES, PIXELS, SECONDS = {True: 8, False: 100}, {True: 16, False: 64}, {True: 120.0, False: 600.0}


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

        def attack(rows: Tensor) -> AttackResult:
            images, labels = material.images[rows], material.labels[rows]
            return attacks.few_pixel(
                material.model, images, labels, count=1, method="guided", seed=material.seed
            )

        return material.attacked("searching for one-pixel attacks", attack)

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
            return f"One pixel fooled the network on {fooled} of {counted(self.material.count)}; {FEWEST} are needed."
        return ""

    def reaches(self) -> Claim:
        """Whether any change arrives at the last layer."""
        name = "reaches the last layer"
        if why := self._why_not():
            return untested(name, REACHES, why)
        rows = _in_last_layer(self.study)
        own = rows["successes"]
        measured = (
            f"In the last layer ({self.study.layers[-1]}), successful one-pixel attacks change {_rate(own, 'spread')} "
            f"of the sites by more than a tenth of the layer's peak; the largest change is {_times(own)} the peak "
            f"({counted(int(own['images']))})."
        )
        control = (
            f"{_beside(rows)} In the network with permuted weights, a random pixel reaches {_times(self.unlearned)} "
            "the peak."
        )
        learned = self._learned(rows)
        beyond = self._beyond(rows)
        outcome = NOT_CONFIRMED
        if own["reach_low"] >= ARRIVES and learned:
            outcome = CONFIRMED if beyond else CAUTION
            if not beyond:
                control += (
                    " Successful attacks do not clearly exceed failed ones and random pixels: arriving does not say "
                    "why an attack succeeds."
                )
        elif not learned:
            control += " Random pixels do not clearly arrive more strongly than in a network that has learned nothing."
        return Claim(
            name, REACHES, measured, control, outcome, self._measurements(rows, "reach"), (self._depth(),)
        )

    @cached_property
    def unlearned(self) -> pd.Series:
        """The row of random edits in the last layer of the network with permuted weights."""
        assert self.pairs is not None  # noqa: S101
        with evaluating(self.material.model) as classifier:
            shuffled = with_shuffled_weights(classifier, self.material.seed)
        pairs = self.pairs[self.pairs.success]
        # With a label that this network does not predict, no pair succeeds: its random edits are those of all pairs.
        logits = predict(shuffled, pairs.clean)
        wrong = (logits.argmax(1).cpu() + 1) % logits.shape[1]
        edited = Pairs(pairs.clean, pairs.adversarial, wrong, wrong)
        return _in_last_layer(propagation_study(shuffled, edited, seed=self.material.seed))["random edits"]

    def _learned(self, rows: dict[str, pd.Series]) -> bool:
        """Whether the same random pixels arrive more strongly than without learning, beyond doubt."""
        return bool(rows["random edits"]["reach_low"] > self.unlearned["reach_high"])

    def _beyond(self, rows: dict[str, pd.Series]) -> bool:
        """Whether successful attacks arrive more strongly than both controls, beyond doubt."""
        others = [rows[group] for group in CONTROLS if group in rows and rows[group]["images"]]
        return bool(others) and all(rows["successes"]["reach_low"] > other["reach_high"] for other in others)

    def _measurements(self, rows: dict[str, pd.Series], quantity: str) -> tuple[Measurement, ...]:
        """One quantity of every group in the last layer."""
        named = {f"{quantity}, {group}": row for group, row in rows.items()}
        named[f"{quantity}, random pixels, permuted weights"] = self.unlearned
        kind = "fraction" if quantity == "spread" else "number"
        return tuple(
            Measurement(
                name, row[quantity], row[f"{quantity}_low"], row[f"{quantity}_high"], int(row["images"]), kind
            )
            for name, row in named.items()
        )

    def _depth(self) -> Panel:
        """Spread from the first layer to the last."""
        series = []
        for group, rows in self.study.table.groupby("group", sort=False):
            if rows["images"].iloc[0]:
                columns = [rounded(rows[part].tolist()) for part in ("spread", "spread_low", "spread_high")]
                depth = tuple(range(1, len(rows) + 1))
                series.append(Series(f"{group} ({int(rows['images'].iloc[0])})", depth, *columns))
        title = "How far one pixel spreads, layer by layer"
        return Panel("curves", title, "layer", "fraction of sites changed", tuple(series))

    def spreads(self) -> Claim:
        """Whether the change covers the last maps and comes close to their peak."""
        name = "becomes global"
        if why := self._why_not():
            return untested(name, GLOBAL, why)
        rows = _in_last_layer(self.study)
        own = rows["successes"]
        measured = (
            f"In the last layer, {_rate(own, 'spread')} of the sites change by more than a tenth of the layer's peak, "
            f"and the largest change is {_times(own)} that peak."
        )
        wide, close = own["spread_low"] >= WIDE, own["reach_low"] >= CLOSE
        outcome = NOT_CONFIRMED
        if self._learned(rows) and (wide or close):
            outcome = CONFIRMED if wide and close and self._beyond(rows) else CAUTION
        control = (
            f"{_beside(rows)} Confirmed means at least {percent(WIDE)} of the sites and {percent(CLOSE)} of the peak, "
            "beyond failed attacks and random pixels; with a caution, one of the two, beyond the network with permuted "
            f"weights ({_times(self.unlearned)} the peak)."
        )
        return Claim(name, GLOBAL, measured, control, outcome, self._measurements(rows, "spread"))

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
            if failed["images"]
            else "There is no failed attack to compare with."
        )
        excess, low, high = mean_interval(_excess(self.pairs, result.success), self.material.seed)
        measured += f" The difference within an image is {points(excess, low, high)}."
        outcome = CONFIRMED if low >= EXCESS else NOT_CONFIRMED
        if outcome == CONFIRMED and failed["images"] and failed["high"] >= near["low"]:
            outcome = CAUTION
        table = (
            *(
                Measurement(names, row["rate"], row["low"], row["high"], int(row["images"]))
                for names, row in rows.items()
            ),
            Measurement("neighbors minus other sites", excess, low, high, int(near["images"]), "number"),
            *proven_safe(self.material, self.pairs),
        )
        return Claim(name, NEIGHBORS, measured, control, outcome, table, (_rings(self.pairs, result),))


def _rings(pairs: AttackResult, result: Locality) -> Panel:
    """The rate of fooling by the distance that the pixel was moved, for successful and failed attacks."""
    places = (pairs.perturbation != 0).any(1).flatten(1).long().argmax(1)
    series = []
    for label, chosen in (("successful attacks", pairs.success), ("failed attacks", ~pairs.success)):
        rows = chosen.nonzero()[:, 0]
        if len(rows) >= FEWEST:
            rings = [ring_rates(result.success[rows], places[rows], radius) for radius in RADII]
            columns = [rounded(column) for column in zip(*map(rate_interval, rings), strict=True)]
            series.append(Series(f"{label} ({len(rows)})", RADII, *columns))
    anywhere = result.controls.set_index("control")["rate"]["random"]
    return Panel(
        "curves", "The same color, moved: how often it still fools", "pixels away from the attack",
        "fraction of sites that fool", tuple(series), guide=round(float(anywhere), 4), guide_label="any other site",
    )  # fmt: skip


def _excess(pairs: AttackResult, success: Tensor) -> NDArray[np.float64]:
    """Of each successful attack: the rate among the eight neighbors minus the rate at all other sites."""
    changed = (pairs.perturbation != 0).any(1, keepdim=True)
    # A maximum over 3 x 3 marks the eight neighbors.
    around = max_pool2d(changed.float(), 3, 1, 1).bool() & ~changed

    def rate(sites: Tensor) -> Tensor:
        return (success.cpu() & sites).sum((1, 2)) / sites.sum((1, 2))

    return (rate(around[:, 0]) - rate(~changed[:, 0]))[pairs.success].double().numpy()


def _in_last_layer(study: PropagationStudy) -> dict[str, pd.Series]:
    """The row of each group in the last layer."""
    last = study.table[study.table["layer"] == study.layers[-1]]
    return {str(row["group"]): row for _, row in last.iterrows()}


def _rate(row: pd.Series, name: str) -> str:
    low, high = ("low", "high") if name == "rate" else (f"{name}_low", f"{name}_high")
    return with_interval(float(row[name]), float(row[low]), float(row[high]))


def _times(row: pd.Series) -> str:
    reach, low, high = (float(row[name]) for name in ("reach", "reach_low", "reach_high"))
    interval = "" if np.isnan(low) else f" [{number(low)}, {number(high)}]"
    return f"{number(reach)}{interval} times"


def _beside(rows: dict[str, pd.Series]) -> str:
    parts = [
        f"{group}: {_rate(row, 'spread')} of the sites, {_times(row)} the peak"
        for group, row in rows.items()
        if group != "successes" and row["images"]
    ]
    text = f"{'; '.join(parts)}." if parts else "there is no other attack to compare with."
    return text[0].upper() + text[1:]


def ring_rates(success: Tensor, places: Tensor, radius: int) -> NDArray[np.float64]:
    """Of each image, how many of the sites at this Chebyshev distance fool; images without such sites are left out.

    Args:
        success: bool (N, H, W).
        places: (N,) flat index of each attack's pixel.
        radius: in pixels.
    """
    height, width = success.shape[1:]
    down = (torch.arange(height)[None, :, None] - (places // width).cpu()[:, None, None]).abs()
    along = (torch.arange(width)[None, None] - (places % width).cpu()[:, None, None]).abs()
    ring = torch.maximum(down, along) == radius
    hits, sites = (success.cpu() & ring).sum((1, 2)), ring.sum((1, 2))
    return (hits[sites > 0] / sites[sites > 0]).double().numpy()


def proven_safe(material: Material, pairs: Pairs) -> tuple[Measurement, ...]:
    """Fractions of pixels that are proven safe, refuted and not decided, over all colors, for float32 as run.

    Args:
        material: the network, and whether the work is to be quick.
        pairs: whose clean images are asked about; all are classified as their labels.

    Returns:
        Three measurements; none if no pixel is proven, as in networks with layers that have no bounds.
    """
    quick = material.quick
    chosen = pairs[: IMAGES[quick]]
    clean = chosen.clean
    material.log("proving pixels safe")
    draws = _random.uniform(_random.keys(clean, material.seed), 0, clean[0, 0].numel())
    # The place of each pixel in a random order, which depends on the image and the seed alone.
    ranks = draws.argsort(1).argsort(1)
    region = (ranks < PIXELS[quick]).view(len(clean), 1, *clean.shape[2:])
    result = certify_pixels(material.model, clean, chosen.labels, region=region, seconds=SECONDS[quick])
    if not bool((result.status == 1).any()):
        return ()
    named = {
        "pixels proven safe": result.proven_fraction,
        "pixels with a color that fools": result.refuted_fraction,
        "pixels not decided": result.unknown_fraction,
    }
    return tuple(
        Measurement(name, *fraction_interval(values.numpy(), material.seed), len(clean))
        for name, values in named.items()
    )
