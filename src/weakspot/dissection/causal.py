"""Causal check of units: if the units that change most get their clean values back, does the decision follow?

A follow-up of the unit sensitivity of Xu et al. 2019 (arXiv 1904.02057); the check is ours. The control is as many
units drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_seed, checked_batch_size, is_number
from weakspot.attribution.hooks import Place, default_layers, replacing, spatial_layers
from weakspot.attribution.layout import unit_axis
from weakspot.classifier import Classifier, default_batch, evaluating
from weakspot.explanations.analysis import Analysis, check_pairs, prepare_pairs
from weakspot.images import distinct
from weakspot.pairs import Pairs
from weakspot.statistics import mcnemar, proportion_interval

if TYPE_CHECKING:
    import pandas as pd

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
MEANINGS = {
    "units_to_revert": "Smallest fraction of the last layer's units, those that changed most, whose clean values "
    "restore the decision; 1, 3, 10, 30 and 100% are tried, rounded to whole units, at least one.",
    "random_units_to_revert": "The same for units drawn at random.",
}


def unit_restoration(
    model: nn.Module,
    layer: str,
    pairs: Pairs,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure how often the decision is restored if the units that change most get their clean values back.

    In each pair that fools the model, the units of the layer are ranked by their mean absolute change over all sites. A
    fraction of them gets its clean values back; the others keep their values under attack. The control is as many units
    drawn at random for each pair. The ranking does not account for noise: `unit_sensitivity` does.

    Args:
        model: any classifier. It is not changed.
        layer: a module whose output is a map.
        pairs: N pairs. Of several that fool the model with the same clean image, which are no independent evidence,
            the first counts.
        fractions: of the units that are restored; at least one unit is.
        seed: of the random units.
        batch_size: pairs at once; changes no result.

    Returns:
        One row per fraction: fraction, units, reverted, reverted_low, reverted_high (fraction of the pairs that are
        classified as their label again, with its exact 95% interval), random, random_low, random_high (the same for
        random units), p (of the difference of the two, by McNemar's exact test), images.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    import pandas as pd

    check_pairs(pairs, model)
    check_seed(seed)
    batch_size = checked_batch_size(batch_size)
    if (
        not isinstance(fractions, Sequence)
        or not len(fractions)
        or not all(is_number(fraction) and 0 < fraction <= 1 for fraction in fractions)
    ):
        raise ValueError(
            f"fractions must be a list of fractions of the units, above 0 and at most 1, got {fractions!r}"
        )
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        place = spatial_layers(classifier, pairs.clean[:1], [layer])[layer]
        if place.module is None or place.calls > 1:
            raise ValueError(
                f"layer must be a module that is called once in a forward pass, got {layer!r}, which is called "
                f"{place.calls} times (try the block around it)"
            )
        changed, random, units = _restore_all(
            classifier, place, pairs, fractions, seed=seed, batch_size=batch_size
        )
    # Pairs that do not fool the model are NaN at every fraction.
    fooled = changed[0].isfinite().nonzero()[:, 0]
    fooled = fooled[distinct(pairs.clean[fooled])]
    table = []
    for number, fraction in enumerate(fractions):
        row: dict[str, object] = {"fraction": fraction, "units": _count(fraction, units)}
        outcomes = {
            name: (values[number, fooled] == 1).cpu().numpy()
            for name, values in (("reverted", changed), ("random", random))
        }
        for name, reverted in outcomes.items():
            interval = proportion_interval(reverted)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
        table.append({**row, "p": mcnemar(*outcomes.values()), "images": len(fooled)})
    return pd.DataFrame(table)


def _restore_all(
    classifier: Classifier,
    place: Place,
    pairs: Pairs,
    fractions: Sequence[float],
    *,
    seed: int,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """`_restore` for all pairs, batch by batch."""
    size = classifier.fixed_batch or batch_size or default_batch(pairs.clean)
    keys = _random.keys(pairs.clean, seed)
    results = [
        _restore(classifier, place, pairs, fractions, rows=rows, keys=keys[rows])
        for rows in torch.arange(len(pairs), device=pairs.clean.device).split(size)
    ]
    changed, random, units = zip(*results, strict=True)
    return torch.cat(changed, 1), torch.cat(random, 1), units[0]


def _restore(
    classifier: Classifier,
    place: Place,
    pairs: Pairs,
    fractions: Sequence[float],
    *,
    rows: Tensor,
    keys: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """Whether the decision is restored (fractions, n), by changed and by random units, and the number of units.

    NaN for pairs that do not fool the model.
    """
    clean, adversarial, labels = pairs.clean[rows], pairs.adversarial[rows], pairs.labels[rows]
    activations: list[Tensor] = []
    assert place.module is not None  # noqa: S101 - callers pass places with a module

    def record(activation: Tensor) -> Tensor:
        activations.append(activation.clone())
        return activation

    def classes(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        with replacing(place.module, change), torch.no_grad():  # type: ignore[arg-type]
            predicted: Tensor = classifier(classifier.filled(images))[: len(rows)].argmax(1)
        return predicted

    correct, fooled = classes(clean, record) == labels, classes(adversarial, record) != labels
    # Activations of the clean and of the adversarial images, each once.
    own, attacked = activations
    axis = unit_axis(own, clean)
    count = own.shape[axis]
    # Mean |change| of each unit over all sites, whatever the position of the unit axis.
    change = (own - attacked).abs().movedim(axis, 1).flatten(2).mean(2)[: len(rows)]
    outcomes: list[Tensor] = []
    for scores in (change, _random.uniform(keys, 0, count)):
        order = scores.argsort(dim=1, descending=True, stable=True)
        positions = torch.arange(count, device=order.device).expand_as(order)
        # ranks[order[i]] = i, so ranks < k are the k largest scores.
        ranks = torch.empty_like(order).scatter_(1, order, positions)
        restored = []
        for fraction in fractions:
            chosen = torch.zeros(len(own), count, dtype=torch.bool, device=own.device)
            chosen[: len(rows)] = ranks < _count(fraction, count)  # the rest fills a fixed batch
            chosen = chosen.view(len(own), *(count if at == axis else 1 for at in range(1, own.ndim)))

            def put_back(activation: Tensor, chosen: Tensor = chosen) -> Tensor:
                return torch.where(chosen, own, activation)

            again = classes(adversarial, put_back) == labels
            restored.append(again.double().where(correct & fooled, torch.nan))
        outcomes.append(torch.stack(restored))
    return outcomes[0], outcomes[1], count


def _count(fraction: float, units: int) -> int:
    return max(1, round(fraction * units))


def analyze_units(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """How many of the last layer's units carry the decision; no scores for networks without such a layer."""
    import pandas as pd

    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        places = default_layers(classifier, pairs.clean[:1])
        called_once = [place for place in places.values() if place.module is not None and place.calls == 1]
        if not called_once:
            return Analysis(scores=pd.DataFrame(index=range(len(pairs))), maps={})
        changed, random, units = _restore_all(classifier, called_once[-1], pairs, FRACTIONS, seed=seed)
    # One unit of four is a quarter, whatever fraction was asked for.
    tried = [_count(fraction, units) / units for fraction in FRACTIONS]
    fractions = torch.tensor(tried, dtype=torch.float64, device=changed.device)[:, None]
    scores = {}
    for name, restored in zip(MEANINGS, (changed, random), strict=True):
        smallest = fractions.where(restored == 1, torch.inf).amin(0)
        scores[name] = smallest.where(smallest.isfinite(), torch.nan).cpu().numpy()
    return Analysis(scores=pd.DataFrame(scores), maps={}, meanings=MEANINGS)
