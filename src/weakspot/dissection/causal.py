"""Causal check: the units that change most get their clean values back; does the decision follow?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_batch_size, check_seed, is_number
from weakspot.attribution.hooks import Place, default_layers, replacing, spatial_layers
from weakspot.attribution.layers import unit_axis
from weakspot.classifier import Classifier, default_batch, evaluating
from weakspot.explanations.analysis import Analysis, check_pairs, prepare_pairs
from weakspot.pairs import Pairs
from weakspot.statistics import mcnemar, proportion_interval

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


def unit_restoration(
    model: nn.Module,
    layer: str,
    pairs: Pairs,
    *,
    fractions: Sequence[float] = SHARES,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """How often the decision comes back when the units that change most get their clean values back.

    Of each pair that fools the model, the units of the layer are ranked by their mean absolute change over all sites; a
    share of them gets its clean values back, the others keep their values under attack. The control are as many units
    drawn at random for each pair. The ranking says nothing about noise: `unit_sensitivity` does.

    Args:
        model: any classifier.
        layer: a module whose output is a map.
        pairs: N pairs.
        fractions: of the units that are put back; at least one unit is.
        seed: of the random units.
        batch_size: pairs at once; changes no result.

    Returns:
        One row per share: share, units, reverted, reverted_low, reverted_high (share of the pairs that are classified
        as their label again, with its exact 95% interval), random, random_low, random_high (as many random units),
        p (of the difference of the two, by McNemar's exact test), images.

    Raises:
        ValueError: if an argument does not fit, naming it.
    """
    import pandas as pd

    check_pairs(pairs, model)
    check_seed(seed)
    check_batch_size(batch_size)
    listed = (
        isinstance(fractions, Sequence)
        and len(fractions)
        and all(is_number(fraction) for fraction in fractions)
    )
    if not listed or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(
            f"shares is {fractions!r}; accepted is a list of shares of the units, above 0 up to 1"
        )
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        place = spatial_layers(classifier, pairs.clean[:1], [layer])[layer]
        if place.module is None or place.calls > 1:
            raise ValueError(
                f"layer is {layer!r}, which is called {place.calls} times in a forward pass; accepted is a module that "
                "is called once, such as the block around it"
            )
        changed, random, units = _all_restored(classifier, place, pairs, fractions, seed, batch_size)
    fooled = changed[0].isfinite()
    table = []
    for number, fraction in enumerate(fractions):
        row: dict[str, object] = {"fraction": fraction, "units": _count(fraction, units)}
        for name, values in (("reverted", changed), ("random", random)):
            interval = proportion_interval((values[number, fooled] == 1).cpu().numpy())
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
        row["p"] = mcnemar(*((values[number, fooled] == 1).cpu().numpy() for values in (changed, random)))
        table.append({**row, "images": int(fooled.sum())})
    return pd.DataFrame(table)


def _all_restored(
    classifier: Classifier,
    place: Place,
    pairs: Pairs,
    fractions: Sequence[float],
    seed: int,
    batch_size: int | None,
) -> tuple[Tensor, Tensor, int]:
    """`_restored` of all pairs, batch by batch."""
    size = classifier.fixed_batch or batch_size or default_batch(pairs.clean)
    keys = _random.keys(pairs.clean, seed)
    found = [
        _restored(classifier, place, pairs, part, keys[part], fractions)
        for part in torch.arange(len(pairs), device=pairs.clean.device).split(size)
    ]
    changed, random, units = zip(*found, strict=True)
    return torch.cat(changed, 1), torch.cat(random, 1), units[0]


def _restored(
    classifier: Classifier,
    place: Place,
    pairs: Pairs,
    rows: Tensor,
    keys: Tensor,
    fractions: Sequence[float],
) -> tuple[Tensor, Tensor, int]:
    """Whether the decision came back (shares, n), by changed and by random units; and the number of units.

    NaN for pairs that do not fool the model.
    """
    clean, adversarial, labels = pairs.clean[rows], pairs.adversarial[rows], pairs.labels[rows]
    seen: list[Tensor] = []
    assert place.module is not None  # noqa: S101 - the caller has looked

    def keep(activation: Tensor) -> Tensor:
        seen.append(activation.clone())
        return activation

    def classes(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        with replacing(place.module, change), torch.no_grad():  # type: ignore[arg-type]
            predicted: Tensor = classifier(classifier.filled(images))[: len(rows)].argmax(1)
        return predicted

    right, fooled = classes(clean, keep) == labels, classes(adversarial, keep) != labels
    own, attacked = seen
    axis = unit_axis(own, clean)
    count = own.shape[axis]
    change = (own - attacked).abs().movedim(axis, 1).flatten(2).mean(2)[: len(rows)]
    chance = _random.uniform(keys, 0, count)
    outcomes: list[Tensor] = []
    for scores in (change, chance):
        order = scores.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(count, device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, ranks)
        back = []
        for fraction in fractions:
            chosen = torch.zeros(len(own), count, dtype=torch.bool, device=own.device)
            chosen[: len(rows)] = ranks < _count(fraction, count)
            chosen = chosen.view(len(own), *(count if at == axis else 1 for at in range(1, own.ndim)))
            again = classes(adversarial, partial(_put_back, own, chosen))
            back.append((again == labels).double().where(right & fooled, torch.nan))
        outcomes.append(torch.stack(back))
    return outcomes[0], outcomes[1], count


def _put_back(own: Tensor, chosen: Tensor, activation: Tensor) -> Tensor:
    return torch.where(chosen, own, activation)


def _count(fraction: float, units: int) -> int:
    return max(1, round(fraction * units))


MEANINGS = {
    "units_to_revert": "Smallest share of the last layer's units, those that changed most, whose clean values bring "
    "the decision back; shares of 1, 3, 10, 30 and 100% are tried.",
    "random_units_to_revert": "The same for units at random.",
}


def analyze_units(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """How many of the last layer's units carry the decision; nothing of networks without such a layer."""
    import pandas as pd

    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        places = default_layers(classifier, pairs.clean[:1])
        once = [place for place in places.values() if place.module is not None and place.calls == 1]
        if not once:
            return Analysis(scores=pd.DataFrame(index=range(len(pairs))), maps={})
        changed, random, _ = _all_restored(classifier, once[-1], pairs, SHARES, seed, None)
    smallest = torch.tensor(SHARES, dtype=torch.float64, device=changed.device)[:, None]
    scores = {}
    for name, back in zip(MEANINGS, (changed, random), strict=True):
        found = smallest.where(back == 1, torch.inf).amin(0)
        scores[name] = found.where(found.isfinite(), torch.nan).cpu().numpy()
    return Analysis(scores=pd.DataFrame(scores), maps={}, meanings=MEANINGS)
