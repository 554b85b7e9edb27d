"""Locality: does the same pixel value, moved elsewhere, still fool the network?

After Vargas and Su 2019 (arXiv 1902.02947): neighbors of an attacked pixel share its weakness if the weakness belongs
to a receptive field. The rings, the intervals over images and the controls (failed attacks, random colors, image and
pixel moved together) are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_count, check_seed
from weakspot.attacks.sweeps import pixel_sweep
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.edits import Edits, Prepared, prepare
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, prepare_pairs
from weakspot.explanations.locality_by_radius import MEANINGS, RADII, RANDOM, ring_score
from weakspot.images import first_copies
from weakspot.pairs import Pairs
from weakspot.statistics import rate_interval
from weakspot.statistics.number_format import counted, percent

if TYPE_CHECKING:
    import pandas as pd

COLORS = 32  # random colors tried at the attack's own site
SHIFTS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
SMALL = 64 * 64  # pixels up to which `analyze_locality` sweeps the whole image
FEW = 7 * 7  # pixels that it sweeps of a larger image, about
MOVED = ("does not fool", "fools into another class", "fools into the same class", "no one-pixel attack")


@dataclass(frozen=True, eq=False)
class Locality:
    """Where the one changed pixel of an attack would also have worked.

    Attributes:
        success: bool (N, H, W), whether the same pixel value moved there changes the class from the label.
        same_class: bool (N, H, W), whether it changes it to the class that the attack itself reached.
        by_radius: rates over the attacks that succeed: one row for each radius 1 to R, the sites at that Chebyshev
            distance, and a row "random" of all other sites; columns radius, rate, low, high (mean over images with its
            95% interval, `rate_interval`), same_class, images. Pairs of one image count as one image, with their mean.
        controls: the same columns without same_class; rows "neighbors", "random", "neighbors of failed attacks",
            "random site of failed attacks", "random color", "moved with the image".
    """

    success: Tensor
    same_class: Tensor
    by_radius: pd.DataFrame
    controls: pd.DataFrame

    def __repr__(self) -> str:
        count, height, width = self.success.shape
        lines = [
            f"Locality of {counted(count, 'one-pixel change')} in images of {height} x {width}; rates of fooling:"
        ]
        lines += [
            f"  {row['control']} ({counted(row['images'])}): {percent(row['rate'])}"
            for row in self.controls.to_dict("records")
        ]
        return "\n".join(lines)


def locality(
    model: nn.Module, pairs: Pairs, *, radius: int = 8, seed: int = 0, batch_size: int | None = None
) -> Locality:
    """Move the changed pixel of one-pixel attacks to every other site of the image.

    Neighbors share the weakness if it belongs to what filters see around the pixel, and not if it is the pixel's own.
    Controls: the pixels of attacks that failed, moved in the same way; 32 random colors at the attack's own site; image
    and pixel moved together by one site (wrapping around), which should matter little to filters.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs, each of which differs in exactly one pixel.
        radius: of the largest ring.
        seed: of the random colors.
        batch_size: edits at once; changes no result.

    Raises:
        ValueError: if a pair differs in another number of pixels, or an argument is invalid; the message names it.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).eval()
    >>> clean = torch.full((1, 3, 4, 4), 0.5)
    >>> adversarial = clean.clone()
    >>> adversarial[0, :, 1, 2] = 1
    >>> locality(model, Pairs.of(model, clean, adversarial), radius=2).by_radius["radius"].tolist()
    [1, 2, 'random']
    """
    check_pairs(pairs, model)
    check_seed(seed)
    check_count("radius", radius)
    # A pixel counts as changed if any of its channels is.
    changed = (pairs.perturbation != 0).any(1).flatten(1)
    counts = changed.sum(1)
    if not bool((counts == 1).all()):
        wrong = int((counts != 1).nonzero()[0])
        raise ValueError(
            f"pairs must differ in exactly one pixel, got {int(counts[wrong])} different pixels in pairs[{wrong}]"
        )
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        # The place of the only 1 in each row.
        site = changed.to(pairs.clean.device).long().argmax(1)
        adversarial_class = predict(classifier, pairs.adversarial).argmax(1)
        correct = predict(classifier, pairs.clean).argmax(1) == pairs.labels
        editor = _PixelEditor(classifier, pairs, site, prepare(classifier, pairs.clean[:1]), batch_size)
        predicted = editor.moved(torch.ones_like(pairs.clean[:, 0], dtype=torch.bool))
        colored = editor.recolored(seed)
        moved = _moved_together(classifier, pairs)
    success = predicted != pairs.labels[:, None, None]
    same = success & (predicted == adversarial_class[:, None, None])
    fooled, failed = (
        correct & (adversarial_class != pairs.labels),
        correct & (adversarial_class == pairs.labels),
    )
    rings = _rings(site, pairs.clean.shape[2:])
    # Random sites are all sites but the attack's own; the neighbors are among them.
    near, elsewhere = _rates(success, rings == 1), _rates(success, rings > 0)
    images = first_copies(pairs.clean)
    controls: dict[object, np.ndarray] = {
        "neighbors": _by_image(near, fooled, images),
        "random": _by_image(elsewhere, fooled, images),
        "neighbors of failed attacks": _by_image(near, failed, images),
        "random site of failed attacks": _by_image(elsewhere, failed, images),
        "random color": _by_image(colored, fooled, images),
        "moved with the image": _by_image(moved, fooled, images),
    }
    areas: dict[object, Tensor] = {ring: rings == ring for ring in range(1, radius + 1)}
    areas["random"] = rings > 0
    by_radius, reached = (
        {name: _by_image(_rates(hits, area), fooled, images) for name, area in areas.items()}
        for hits in (success, same)
    )
    table = _rate_table("radius", by_radius)
    table.insert(
        4, "same_class", [float(rates.mean()) if len(rates) else np.nan for rates in reached.values()]
    )
    return Locality(success, same, table, _rate_table("control", controls))


@dataclass(frozen=True)
class _PixelEditor:
    """Clean images with the changed pixel of their pair moved or recolored.

    Attributes:
        classifier: in eval mode.
        pairs: N pairs.
        site: (N,) flat position of each pair's changed pixel.
        prepared: the classifier's recording.
        batch_size: edits at once.
    """

    classifier: Classifier
    pairs: Pairs
    site: Tensor
    prepared: Prepared
    batch_size: int | None

    def classes(self, number: int, positions: Tensor, colors: Tensor) -> Tensor:
        """(M,) classes of one clean image with a color (M, C) at each flat position (M,), one at a time."""
        width = self.pairs.clean.shape[3]
        image = self.pairs.clean[number : number + 1]
        edits = Edits(self.classifier, image, self.prepared, batch_size=self.batch_size)
        # Every edit is one of the only image.
        owners = torch.zeros_like(positions)
        logits = edits.logits(owners, positions // width, positions % width, colors[:, :, None, None])
        return logits.argmax(1)

    def moved(self, tried: Tensor) -> Tensor:
        """(N, H, W) classes of the clean images with the pair's pixel value at each site tried; elsewhere the label."""
        predicted = self.pairs.labels[:, None, None].expand(tried.shape).clone()
        for number, sites in enumerate(tried.flatten(1)):
            color = self.pairs.adversarial[number].flatten(1)[:, self.site[number]]
            positions = sites.nonzero()[:, 0]
            classes = self.classes(number, positions, color.expand(len(positions), -1))
            predicted[number].view(-1)[positions] = classes
        return predicted

    def recolored(self, seed: int) -> Tensor:
        """(N,) fraction of random colors at the attack's own site that fool the model."""
        clean, labels = self.pairs.clean, self.pairs.labels
        colors = _random.uniform(_random.keys(clean, seed), 0, COLORS, clean.shape[1]).to(clean)
        fooled = [
            self.classes(number, self.site[number].expand(COLORS), colors[number]) != labels[number]
            for number in range(len(clean))
        ]
        return torch.stack(fooled).double().mean(1)


def _moved_together(classifier: Classifier, pairs: Pairs) -> Tensor:
    """(N,) fraction of the eight one-site shifts of image and pixel under which the attack still fools the model.

    Only shifts that leave the clean image's class count; NaN if none does.
    """
    worked, usable = (
        torch.zeros(len(pairs), dtype=torch.float64, device=pairs.clean.device) for _ in range(2)
    )
    # Image and pixel move together, so a network without border effects gives the same class.
    for shift in SHIFTS:
        clean, adversarial = (
            predict(classifier, images.roll(shift, (2, 3))).argmax(1)
            for images in (pairs.clean, pairs.adversarial)
        )
        correct = clean == pairs.labels
        usable += correct
        worked += correct & (adversarial != pairs.labels)
    return worked / usable.where(usable > 0, torch.nan)


def _rings(site: Tensor, size: torch.Size) -> Tensor:
    """(N, H, W) Chebyshev distance from each pair's changed pixel: max(|rows apart|, |columns apart|)."""
    rows = torch.arange(size[0], device=site.device)[:, None]
    columns = torch.arange(size[1], device=site.device)
    down = (rows - (site // size[1]).view(-1, 1, 1)).abs()
    right = (columns - (site % size[1]).view(-1, 1, 1)).abs()
    return torch.maximum(down, right)


def _rates(hits: Tensor, area: Tensor) -> Tensor:
    """(N,) the fraction of each image's sites in the area (N, H, W) that hit; NaN without such sites."""
    sites = area.flatten(1).sum(1).double()
    return (hits & area).flatten(1).sum(1) / sites.where(sites > 0, torch.nan)


def _by_image(rates: Tensor, chosen: Tensor, images: NDArray[np.int_]) -> np.ndarray:
    """The mean rate of each image with chosen pairs; rates (N,) that are NaN are left out."""
    known = (chosen & rates.isfinite()).cpu().numpy()
    _, number = np.unique(images[known], return_inverse=True)
    means: np.ndarray = np.bincount(number, rates.cpu().numpy()[known]) / np.bincount(number)
    return means


def _rate_table(title: str, rates: Mapping[object, np.ndarray]) -> pd.DataFrame:
    """One row per name, in the column `title`, with rate, low, high and images."""
    import pandas as pd

    rows = []
    for name, values in rates.items():
        rate, low, high = rate_interval(values)
        rows.append({title: name, "rate": rate, "low": low, "high": high, "images": len(values)})
    return pd.DataFrame(rows)


def analyze_locality(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:  # noqa: ARG001
    """What a change of one pixel can do at every site; for one-pixel attacks also where else they would have worked.

    Images that are misclassified without any attack have no scores: there is nothing to fool.
    """
    import pandas as pd

    height, width = pairs.clean.shape[2:]
    # Larger images are swept on a grid of about 49 pixels, each in the middle of its step.
    step = 1 if height * width <= SMALL else int(np.ceil(np.sqrt(height * width / FEW)))
    top, left = (min(step // 2, size - 1) for size in (height, width))
    region = torch.zeros(1, 1, height, width, dtype=torch.bool)
    region[:, :, top::step, left::step] = True
    with evaluating(model) as classifier:
        misclassified = predict(classifier, pairs.clean).argmax(1) != pairs.labels
    sweep = pixel_sweep(model, pairs.clean, pairs.labels, region=region)
    # Beside the grid nothing was tried and margins are infinite, so the map repeats each pixel of the grid.
    tried = sweep.margin[:, top::step, left::step]
    margins = torch.nn.functional.interpolate(tried[:, None], (height, width), mode="nearest")
    scores = {
        "weakest_pixel": tried.flatten(1).amin(1).double(),
        "weak_pixels": (tried < 0).flatten(1).double().mean(1),
    }
    which = "every pixel" if step == 1 else f"one pixel of every {step} x {step}"
    maps = {"one_pixel_margin": margins}
    meanings = {
        "weakest_pixel": "Smallest margin of the label if one pixel takes a corner color (each channel 0 or 1); below "
        f"0, that pixel is enough. {which.capitalize()} was tried.",
        "weak_pixels": "Fraction of these pixels that are enough alone.",
    }
    pictures = {
        "one_pixel_margin": Picture(
            "Lead left after one pixel",
            kind="signed",
            meaning="The smallest lead of {label} over any class if this pixel alone takes the worst corner color; "
            f"below 0, it is enough. {which.capitalize()} was tried.",
        )
    }
    one_pixel = (pairs.perturbation != 0).any(1).flatten(1).sum(1) == 1
    if bool(one_pixel.any()):
        rates, maps["moved_pixel"] = _moved(model, pairs, one_pixel, region[0, 0])
        scores |= rates
        far = "" if step == 1 else f" More than {max(RADII)} pixels away, {which} was tried."
        meanings |= MEANINGS | ({RANDOM: f"The same for other sites, {which}."} if step > 1 else {})
        pictures["moved_pixel"] = Picture(
            "The same pixel moved",
            kind="category",
            categories=MOVED,
            meaning=f"Where the attack's pixel value would also have worked.{far}",
        )
    columns = {
        name: values.masked_fill(misclassified, torch.nan).cpu().numpy() for name, values in scores.items()
    }
    return Analysis(scores=pd.DataFrame(columns), maps=maps, meanings=meanings, pictures=pictures)


def _moved(
    model: nn.Module, pairs: Pairs, one_pixel: Tensor, grid: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Rates (N,) by radius, NaN for pairs that differ in more than one pixel, and the map of `MOVED` (N, 1, H, W).

    Farther away than the largest radius, the sites tried are those where the grid (H, W) of rows and columns is True.
    """
    chosen = pairs[one_pixel]
    site = (chosen.perturbation != 0).any(1).flatten(1).long().argmax(1)
    rings = _rings(site, grid.shape)
    grid = grid.to(site.device)
    tried = grid | (rings <= max(RADII))
    with evaluating(model) as classifier:
        chosen = prepare_pairs(classifier, chosen)
        adversarial_class = predict(classifier, chosen.adversarial).argmax(1)
        editor = _PixelEditor(classifier, chosen, site, prepare(classifier, chosen.clean[:1]), None)
        predicted = editor.moved(tried)
    success = predicted != chosen.labels[:, None, None]
    areas = {ring_score(radius): rings == radius for radius in RADII} | {RANDOM: (rings > 0) & grid}
    rates = {}
    for name, area in areas.items():
        rates[name] = torch.full((len(pairs),), torch.nan, dtype=torch.float64, device=site.device)
        rates[name][one_pixel] = _rates(success, area).to(rates[name])
    # Reaching the same class implies success, so the sum is a position in MOVED: 0, 1 or 2.
    reached = success * 1 + (success & (predicted == adversarial_class[:, None, None]))
    # Sites that were not tried are drawn as the nearest one of the grid.
    rough = reached[:, grid.any(1)][:, None, :, grid.any(0)]
    nearest = torch.nn.functional.interpolate(rough.double(), grid.shape, mode="nearest").long()
    kinds = torch.full_like(pairs.clean[:, :1], len(MOVED) - 1, dtype=torch.long)
    kinds[one_pixel] = reached[:, None].where(tried[:, None], nearest)
    return rates, kinds
