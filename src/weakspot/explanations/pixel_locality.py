"""Locality: does the same pixel value, moved elsewhere, still fool the network?

After Vargas and Su 2019 (arXiv 1902.02947). Rings, intervals over images and the controls are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_seed
from weakspot.attacks.sweeps import pixel_sweep
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.edits import Edits, Prepared, prepare
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, prepare_pairs
from weakspot.explanations.locality_by_radius import MEANINGS, RADII, RANDOM, ring_score
from weakspot.pairs import Pairs
from weakspot.statistics import rate_interval

if TYPE_CHECKING:
    import pandas as pd


COLORS = 32  # random colors tried at the attack's own site
SHIFTS = [(down, along) for down in (-1, 0, 1) for along in (-1, 0, 1) if (down, along) != (0, 0)]


@dataclass(frozen=True, eq=False)
class Locality:
    """Where the one changed pixel of an attack would have worked as well.

    Attributes:
        success: bool (N, H, W), whether the same pixel value moved there changes the class from the label.
        same_class: bool (N, H, W), whether into the class that the attack itself reached.
        by_radius: rates over the attacks that succeed: one row for each radius 1 to R, the sites at that Chebyshev
            distance, and a row "random" of all other sites; columns radius, rate, low, high (mean over images with its
            95% interval, `rate_interval`), same_class, images.
        controls: likewise, rows "neighbors", "random", "neighbors of failed attacks", "random site of failed
            attacks", "random color", "moved with the image".
    """

    success: Tensor
    same_class: Tensor
    by_radius: pd.DataFrame
    controls: pd.DataFrame


def locality(
    model: nn.Module, pairs: Pairs, *, radius: int = 8, seed: int = 0, batch_size: int | None = None
) -> Locality:
    """Move the changed pixel of one-pixel attacks to every other site of the image.

    Neighbors share the weakness if it belongs to what filters see around the pixel, and not if it is the pixel's
    own. Controls: attacks that failed, moved likewise; 32 random colors at the attack's own site; image and pixel
    moved together by one site (wrapping around), which filters should not mind.

    Args:
        model: any classifier.
        pairs: N pairs, each different in exactly one pixel.
        radius: of the largest ring.
        seed: of the random colors.
        batch_size: edits at once; changes no result.

    Raises:
        ValueError: when a pair differs in another number of pixels, or an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).eval()
    >>> clean = torch.full((1, 3, 4, 4), 0.5)
    >>> adversarial = clean.clone()
    >>> adversarial[0, :, 1, 2] = 1
    >>> locality(model, Pairs.of(model, clean, adversarial), radius=2).by_radius["radius"].tolist()
    [1, 2, 'random']
    """
    check_pairs(pairs, model)
    check_seed(seed)
    if not isinstance(radius, int) or radius < 1:
        raise ValueError(f"radius is {radius!r}; accepted is a whole number of pixels from 1")
    changed = (pairs.perturbation != 0).any(1).flatten(1)
    counts = changed.sum(1)
    if not bool((counts == 1).all()):
        wrong = int((counts != 1).nonzero()[0])
        raise ValueError(
            f"pairs[{wrong}] differ in {int(counts[wrong])} pixels; accepted are pairs that differ in exactly one"
        )
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        site = changed.to(pairs.clean.device).long().argmax(1)
        prepared = prepare(classifier, pairs.clean[:1])
        adversarial_class = predict(classifier, pairs.adversarial).argmax(1)
        right = predict(classifier, pairs.clean).argmax(1) == pairs.labels
        predicted = torch.stack(
            [
                _everywhere(classifier, pairs, number, site, prepared, batch_size)
                for number in range(len(pairs))
            ]
        )
        colored = _recolored(classifier, pairs, site, prepared, seed, batch_size)
        moved = _moved_together(classifier, pairs)
    success = predicted != pairs.labels[:, None, None]
    same = success & (predicted == adversarial_class[:, None, None])
    fooled, failed = right & (adversarial_class != pairs.labels), right & (adversarial_class == pairs.labels)
    rings = _rings(site, pairs.clean.shape[2:])
    return Locality(
        success,
        same,
        _by_radius(success, same, rings, fooled, radius),
        _controls(success, rings, fooled, failed, colored, moved),
    )


def _everywhere(
    classifier: Classifier,
    pairs: Pairs,
    number: int,
    site: Tensor,
    prepared: Prepared,
    batch_size: int | None,
) -> Tensor:
    """(H, W) classes of the clean image with the pair's pixel value at every site."""
    height, width = pairs.clean.shape[2:]
    color = pairs.adversarial[number].flatten(1)[:, site[number]]
    places = torch.arange(height * width, device=site.device)
    edits = Edits(classifier, pairs.clean[number : number + 1], prepared, batch_size=batch_size)
    patches = color.view(1, -1, 1, 1).expand(len(places), -1, -1, -1)
    logits = edits.logits(torch.zeros_like(places), places // width, places % width, patches)
    return logits.argmax(1).view(height, width)


def _recolored(
    classifier: Classifier,
    pairs: Pairs,
    site: Tensor,
    prepared: Prepared,
    seed: int,
    batch_size: int | None,
) -> Tensor:
    """(N,) share of random colors at the attack's own site that fool."""
    channels, width = pairs.clean.shape[1], pairs.clean.shape[3]
    colors = _random.uniform(_random.keys(pairs.clean, seed), 0, COLORS, channels)
    rates = []
    for number in range(len(pairs)):
        edits = Edits(classifier, pairs.clean[number : number + 1], prepared, batch_size=batch_size)
        places = site[number].expand(COLORS)
        logits = edits.logits(
            torch.zeros_like(places),
            places // width,
            places % width,
            colors[number, :, :, None, None].to(pairs.clean),
        )
        rates.append((logits.argmax(1) != pairs.labels[number]).double().mean())
    return torch.stack(rates)


def _moved_together(classifier: Classifier, pairs: Pairs) -> Tensor:
    """(N,) share of the eight shifts under which the clean image is still read rightly and the attack still fools.

    Only shifts that leave the clean image's class count; NaN where none does.
    """
    worked, counted = (
        torch.zeros(len(pairs), dtype=torch.float64, device=pairs.clean.device) for _ in range(2)
    )
    for shift in SHIFTS:
        clean, adversarial = (
            predict(classifier, images.roll(shift, (2, 3))).argmax(1)
            for images in (pairs.clean, pairs.adversarial)
        )
        right = clean == pairs.labels
        counted += right
        worked += right & (adversarial != pairs.labels)
    return worked / counted.where(counted > 0, torch.nan)


def _rings(site: Tensor, size: torch.Size) -> Tensor:
    """(N, H, W) Chebyshev distance from each pair's changed pixel."""
    rows = torch.arange(size[0], device=site.device)[:, None]
    columns = torch.arange(size[1], device=site.device)
    down = (rows - (site // size[1]).view(-1, 1, 1)).abs()
    along = (columns - (site % size[1]).view(-1, 1, 1)).abs()
    return torch.maximum(down, along)


def _rates(hits: Tensor, where: Tensor, chosen: Tensor) -> np.ndarray:
    """Of each chosen image that has such sites, the share of them that hit."""
    sites = where[chosen].flatten(1).sum(1).double()
    found = (hits & where)[chosen].flatten(1).sum(1) / sites
    return found[sites > 0].cpu().numpy()


def _row(name: object, rates: np.ndarray) -> dict[str, object]:
    rate, low, high = rate_interval(rates)
    return {"radius": name, "rate": rate, "low": low, "high": high, "images": len(rates)}


def _by_radius(success: Tensor, same: Tensor, rings: Tensor, fooled: Tensor, radius: int) -> pd.DataFrame:
    import pandas as pd

    areas: list[tuple[object, Tensor]] = [(ring, rings == ring) for ring in range(1, radius + 1)]
    areas.append(("random", rings > 0))
    table = pd.DataFrame([_row(name, _rates(success, area, fooled)) for name, area in areas])
    reached = [_rates(same, area, fooled) for _, area in areas]
    table.insert(4, "same_class", [float(rates.mean()) if len(rates) else np.nan for rates in reached])
    return table


def _controls(
    success: Tensor, rings: Tensor, fooled: Tensor, failed: Tensor, colored: Tensor, moved: Tensor
) -> pd.DataFrame:
    import pandas as pd

    near, far = rings == 1, rings > 0
    rates = {
        "neighbors": _rates(success, near, fooled),
        "random": _rates(success, far, fooled),
        "neighbors of failed attacks": _rates(success, near, failed),
        "random site of failed attacks": _rates(success, far, failed),
        "random color": colored[fooled].cpu().numpy(),
        "moved with the image": moved[fooled & moved.isfinite()].cpu().numpy(),
    }
    table = pd.DataFrame([_row(name, values) for name, values in rates.items()])
    return table.rename(columns={"radius": "control"})


SMALL = 64 * 64  # pixels of an image that `analyze` sweeps whole
FEW = 7 * 7  # pixels that it sweeps of a larger one, about
MOVED = ("does not fool", "fools into another class", "fools into the same class", "no attack by one pixel")


def analyze_locality(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """What one pixel can do anywhere; for pairs that differ in one pixel also where else it would have worked.

    Images that are misread without any attack have no scores: there is nothing to fool.
    """
    import pandas as pd

    height, width = pairs.clean.shape[2:]
    step = 1 if height * width <= SMALL else int(np.ceil(np.sqrt(height * width / FEW)))
    first = [min(step // 2, size - 1) for size in (height, width)]
    region = torch.zeros(1, 1, height, width, dtype=torch.bool)
    region[:, :, first[0] :: step, first[1] :: step] = True
    with evaluating(model) as classifier:
        misread = predict(classifier, pairs.clean).argmax(1) != pairs.labels
    sweep = pixel_sweep(model, pairs.clean, pairs.labels, region=region)
    tried = sweep.margin[:, first[0] :: step, first[1] :: step]
    margins = torch.nn.functional.interpolate(tried[:, None], (height, width), mode="nearest")
    scores = {
        "weakest_pixel": tried.flatten(1).amin(1).double(),
        "weak_pixels": (tried < 0).flatten(1).double().mean(1),
    }
    which = "every pixel" if step == 1 else f"one pixel of every {step} x {step}"
    maps = {"one_pixel_margin": margins}
    meanings = {
        "weakest_pixel": f"Smallest lead of the label when a pixel takes a corner color, {which} tried; below 0 "
        "that pixel is enough.",
        "weak_pixels": "Share of these pixels that are enough alone.",
    }
    pictures = {
        "one_pixel_margin": Picture(
            "Lead left after one pixel",
            kind="signed",
            meaning=f"The smallest lead of {{label}} over any class when this pixel alone takes the worst corner "
            f"color; {which} was tried. Below 0 it is enough.",
        )
    }
    one = (pairs.perturbation != 0).any(1).flatten(1).sum(1) == 1
    if bool(one.any()):
        rates, maps["moved_pixel"] = _moved(model, pairs, one, seed)
        scores |= rates
        meanings |= MEANINGS
        pictures["moved_pixel"] = Picture(
            "The same pixel moved",
            kind="category",
            categories=MOVED,
            meaning="Where the attack's pixel value would have worked as well.",
        )
    return Analysis(
        scores=pd.DataFrame(
            {name: values.masked_fill(misread, torch.nan).cpu().numpy() for name, values in scores.items()}
        ),
        maps=maps,
        meanings=meanings,
        pictures=pictures,
    )


def _moved(model: nn.Module, pairs: Pairs, one: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Rates (N,) by radius, NaN where not one pixel differs, and the map of `MOVED` (N, 1, H, W)."""
    chosen = Pairs(*(part[one] for part in (pairs.clean, pairs.adversarial, pairs.labels, pairs.targets)))
    found = locality(model, chosen, seed=seed)
    site = (chosen.perturbation != 0).any(1).flatten(1).long().argmax(1)
    rings = _rings(site, found.success.shape[1:])
    areas = {ring_score(radius): rings == radius for radius in RADII} | {RANDOM: rings > 0}
    rates = {}
    for name, area in areas.items():
        rates[name] = torch.full((len(pairs),), torch.nan, dtype=torch.float64, device=site.device)
        sites = area.flatten(1).sum(1).double()
        hits = (found.success & area).flatten(1).sum(1)
        rates[name][one] = (hits / sites.where(sites > 0, torch.nan)).to(rates[name])
    kinds = torch.full_like(pairs.clean[:, :1], len(MOVED) - 1, dtype=torch.long)
    kinds[one] = (found.success * 1 + found.same_class)[:, None]
    return rates, kinds
