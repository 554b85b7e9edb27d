"""Unit sensitivity: which units a perturbation moves, and whether the units that stand for something move more.

The measure is after Xu et al. 2019 (arXiv 1904.02057); the test, its correction, the join with dissection under control
for mean activation, and its interval are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot.attribution.reading import fused_for, reading, spatial_layers
from weakspot.checks import check_batch_size, check_seed
from weakspot.classifier import default_batch, evaluating
from weakspot.explanations.analysis import check_pairs, settled
from weakspot.pairs import Pairs
from weakspot.statistics import false_discovery

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 2000  # bootstrap samples of units


def unit_sensitivity(
    model: nn.Module, layer: str, pairs: Pairs | Iterable[Pairs], *, batch_size: int | None = None
) -> pd.DataFrame:
    """How far a perturbation moves each unit of a layer, beside how far the unit varies anyhow.

    A unit's change in one pair is that of its mean activation over all sites. Sensitivity is the size of its mean over
    pairs over its spread over clean images; p is that of a paired t test of no change, corrected for the number of
    units (Benjamini and Hochberg 1995, doi 10.1111/j.2517-6161.1995.tb02031.x).

    Args:
        model: any classifier.
        layer: a module whose output is a map; of tokens units are the channels.
        pairs: at least two pairs, or several lots of them one after the other.
        batch_size: pairs at once; changes no result.

    Returns:
        One row per unit: unit, change (mean over pairs, signed), spread (standard deviation of the clean activation),
        sensitivity, p (as tested), p_value (corrected), mean_activation.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> clean = torch.rand(8, 3, 16, 16)
    >>> table = unit_sensitivity(model.eval(), "1", Pairs.of(model, clean, (clean + 0.1).clamp(0, 1)))
    >>> list(table.columns)
    ['unit', 'change', 'spread', 'sensitivity', 'p', 'p_value', 'mean_activation']
    """
    import pandas as pd
    from scipy.stats import ttest_1samp

    clean, adversarial = (
        values.double().cpu().numpy() for values in unit_means(model, layer, pairs, batch_size)
    )
    if len(clean) < 2:
        raise ValueError(f"pairs has {len(clean)} pair; accepted are at least two, for a spread")
    change = adversarial - clean
    if not np.isfinite(change).all():
        raise ValueError(
            f"layer {layer!r} has NaN or infinity in pair {int((~np.isfinite(change)).any(1).argmax())}"
        )
    spread = clean.std(0, ddof=1)
    mean = change.mean(0)
    still = np.ptp(change, 0) == 0  # the same change in every pair, which is none or beyond any doubt
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity = np.where(mean == 0, 0.0, np.abs(mean) / spread)
        p = np.where(still, np.where(mean == 0, 1.0, 0.0), ttest_1samp(change, 0).pvalue)
    return pd.DataFrame(
        {
            "unit": range(change.shape[1]),
            "change": mean,
            "spread": spread,
            "sensitivity": sensitivity,
            "p": p,
            "p_value": false_discovery(p),
            "mean_activation": clean.mean(0),
        }
    )


def unit_means(
    model: nn.Module, layer: str, pairs: Pairs | Iterable[Pairs], batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(N, U) mean activation of every unit, in the clean and in the adversarial images."""
    check_batch_size(batch_size)
    if not isinstance(layer, str):
        raise ValueError(f"layer is {layer!r}; accepted is the name of one layer")
    clean: list[Tensor] = []
    adversarial: list[Tensor] = []
    with evaluating(model) as classifier:
        for lot in [pairs] if isinstance(pairs, Pairs) else pairs:
            check_pairs(lot, model)
            here = settled(classifier, lot)
            places = spatial_layers(classifier, here.clean[:1], [layer])
            size = classifier.fixed_batch or batch_size or default_batch(here.clean)
            with fused_for(classifier, here.clean[:1], places), torch.no_grad():
                for images, means in ((here.clean, clean), (here.adversarial, adversarial)):
                    for part in images.split(size):

                        def see(
                            _name: str, maps: Tensor, means: list[Tensor] = means, count: int = len(part)
                        ) -> None:
                            means.append(maps[:count].float().mean((2, 3)))

                        with reading(classifier, places, see):
                            classifier(classifier.filled(part))
    if not clean:
        raise ValueError("pairs holds no pairs; accepted are at least two")
    return torch.cat(clean), torch.cat(adversarial)


@dataclass(frozen=True)
class Association:
    """Whether units with a larger IoU are more sensitive.

    Attributes:
        correlation: Spearman's, of sensitivity and IoU over units.
        partial: the same with ranks of mean activation, and the layer, taken out of both.
        low: 2.5% quantile of the partial correlation over bootstrap samples of units.
        high: 97.5% quantile likewise.
        units: how many units it is of.
    """

    correlation: float
    partial: float
    low: float
    high: float
    units: int


def associate(joined: pd.DataFrame, *, seed: int = 0) -> Association:
    """Sensitivity against IoU, controlling for mean activation and layer: busy units move more and overlap more.

    Args:
        joined: one row per unit with sensitivity, iou, mean_activation and, of several layers, layer; `join` makes it.
        seed: of the bootstrap.

    Raises:
        ValueError: when a column is missing, or there are fewer than ten units.
    """
    check_seed(seed)
    missing = [name for name in ("sensitivity", "iou", "mean_activation") if name not in joined]
    if missing:
        raise ValueError(
            f"joined has no column {missing[0]!r}; accepted is what join(sensitivity, dissection) returns"
        )
    finite = joined[np.isfinite(joined[["sensitivity", "iou", "mean_activation"]].to_numpy(float)).all(1)]
    if len(finite) < 10:
        raise ValueError(f"joined has {len(finite)} units; accepted are at least ten, for a correlation")
    layers = finite["layer"].to_numpy() if "layer" in finite else np.zeros(len(finite))
    sensitivity, iou, activation = (
        finite[name].to_numpy(float) for name in ("sensitivity", "iou", "mean_activation")
    )
    samples = np.random.default_rng(seed).integers(0, len(finite), (DRAWS, len(finite)))
    partials = [_partial(sensitivity[rows], iou[rows], activation[rows], layers[rows]) for rows in samples]
    low, high = np.nanquantile(partials, [0.025, 0.975])
    return Association(
        _correlation(_ranks(sensitivity), _ranks(iou)),
        _partial(sensitivity, iou, activation, layers),
        float(low),
        float(high),
        len(finite),
    )


def join(sensitivity: pd.DataFrame, units: pd.DataFrame) -> pd.DataFrame:
    """One row per unit: what `unit_sensitivity` and `dissect` say of it.

    Raises:
        ValueError: when they are not of the same units.
    """
    if set(sensitivity["unit"]) != set(units["unit"]):
        raise ValueError(
            f"units has {len(units)} units and sensitivity {len(sensitivity)}; accepted are both of one layer"
        )
    return sensitivity.merge(units, on="unit", validate="one_to_one")


def moved_concepts(joined: pd.DataFrame, *, level: float = 0.05) -> pd.DataFrame:
    """Concepts that an attack promotes or suppresses: of their detectors, those that move beyond doubt.

    Args:
        joined: from `join`.
        level: of the corrected p value.

    Returns:
        One row per concept with detectors, the most moved first: concept, category, units, promoted, suppressed (how
        many move up and down), change (mean of change over spread, signed).
    """
    import pandas as pd

    detectors = joined[joined["concept"].notna()]
    rows = []
    for (concept, category), group in detectors.groupby(["concept", "category"], sort=True):
        sure = group["p_value"] <= level
        strength = (group["change"] / group["spread"].where(group["spread"] > 0)).fillna(0.0)
        rows.append(
            {
                "concept": concept,
                "category": category,
                "units": len(group),
                "promoted": int((sure & (group["change"] > 0)).sum()),
                "suppressed": int((sure & (group["change"] < 0)).sum()),
                "change": float(strength.mean()),
            }
        )
    columns = ["concept", "category", "units", "promoted", "suppressed", "change"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("change", key=abs, ascending=False, ignore_index=True)


def in_words(concepts: pd.DataFrame, most: int = 3) -> str:
    """One sentence: what the attack promotes and suppresses."""
    up = concepts[(concepts["change"] > 0) & (concepts["promoted"] > 0)]["concept"].head(most).tolist()
    down = concepts[(concepts["change"] < 0) & (concepts["suppressed"] > 0)]["concept"].head(most).tolist()
    parts = [
        f"{verb} {', '.join(names)}" for verb, names in (("promotes", up), ("suppresses", down)) if names
    ]
    return f"The attack {' and '.join(parts)}." if parts else "The attack moves no detector beyond doubt."


def _partial(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    control: NDArray[np.floating],
    layers: NDArray[np.generic],
) -> float:
    """Spearman's partial correlation: ranks, the control's and each layer's share taken out by least squares."""
    levels = np.unique(layers)
    design = np.column_stack([_ranks(control), *((layers == level).astype(float) for level in levels)])
    pair = np.column_stack([_ranks(first), _ranks(second)])
    rest = pair - design @ np.linalg.lstsq(design, pair, rcond=None)[0]
    scale = np.abs(pair).max(0)
    if (np.abs(rest).max(0) <= 1e-9 * scale).any():
        return float("nan")  # the control says all that there is to say
    return _correlation(rest[:, 0], rest[:, 1])


def _correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / size) if size > 0 else float("nan")


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=np.float64)


def by_category(joined: pd.DataFrame) -> pd.DataFrame:
    """Mean sensitivity of the detectors of each category, and of units that stand for nothing."""
    kinds = joined["category"].fillna("none")
    groups: Mapping[str, str] = {"units": "size", "sensitivity": "mean"}
    table = joined.groupby(kinds)["sensitivity"].agg(list(groups.values()))
    return table.set_axis(list(groups), axis=1).rename_axis("category").reset_index()
