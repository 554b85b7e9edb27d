"""Does masking units help? The attacker who knows the mask attacks again; replayed attacks are weak evidence."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot.attacks import pgd
from weakspot.attribution.layout import unit_axis
from weakspot.attribution.replacing import replacing
from weakspot.checks import check_classes, check_seed
from weakspot.classifier import check_images, default_batch, evaluating, predict
from weakspot.defenses.masking import mask_units, unit_numbers
from weakspot.pairs import Pairs
from weakspot.statistics import mcnemar, share_interval

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 3  # sets of random units
LEVEL = 0.05  # of McNemar's test
UNMASKED, THESE, ACTIVE = "none", "these units", "most active units"
MEASURES = ("clean", "transfer", "attacked_again")
Attack = Callable[[nn.Module, Tensor, Tensor], Pairs]


def masking_test(
    model: nn.Module,
    layer: str,
    units: Sequence[int] | Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack = pgd,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> pd.DataFrame:
    """Accuracy of the network with units masked: clean, under replayed attacks, and attacked again.

    The controls are as many random units, three sets of them, and the most active units. A control that happens to be
    the same set as these units or another control is left out.

    Args:
        model: any classifier.
        layer: as in `mask_units`.
        units: to be masked; if they were chosen by their sensitivity, then on *other* images.
        images: (N, C, H, W).
        labels: (N,).
        attack: `attacks.pgd` or any function of model, images and labels that returns pairs.
        seed: of the random units.
        progress: called with the fraction done.

    Returns:
        One row per network (masked: "none", "these units", "random units 1" to "3", "most active units"), with
        units, images; clean, transfer (attacks on the unmasked network, replayed) and attacked_again, each with _low
        and _high, exact 95% intervals; lead (attacked_again of these units less that of this row, on the same
        images) and p (of the lead, by McNemar's exact test).

    Raises:
        ValueError: if an argument does not fit, naming it.
    """
    import pandas as pd

    check_seed(seed)
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        check_classes(labels, len(images))
        labels = labels.to(images.device, torch.long)
    wanted = unit_numbers(units)
    activity, count = _activity(model, layer, images), len(wanted)
    if not 0 < count <= len(activity):
        raise ValueError(f"units must be 1 to {len(activity)} units, as many as {layer!r} has, got {count}")
    groups: dict[str, Sequence[int]] = {UNMASKED: (), THESE: wanted, **_controls(wanted, activity, seed)}
    replayed = attack(model, images, labels).adversarial
    outcomes: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for number, (name, chosen) in enumerate(groups.items(), start=1):
        masked = mask_units(model, layer, chosen) if len(chosen) else model
        again = attack(masked, images, labels).adversarial if len(chosen) else replayed
        with evaluating(masked) as classifier:
            outcomes[name] = {
                measure: (predict(classifier, shown).argmax(1) == labels).cpu().numpy()
                for measure, shown in zip(MEASURES, (images, replayed, again), strict=True)
            }
        if progress is not None:
            progress(number / len(groups))
    return pd.DataFrame([_row(name, len(chosen), outcomes) for name, chosen in groups.items()])


def _controls(wanted: Sequence[int], activity: Tensor, seed: int) -> dict[str, Sequence[int]]:
    """As many random and most active units, without sets that are the units asked for or another control."""
    rng = np.random.default_rng(seed)
    sets = {
        f"random units {number}": rng.choice(len(activity), len(wanted), replace=False).tolist()
        for number in range(1, DRAWS + 1)
    } | {ACTIVE: activity.topk(len(wanted)).indices.tolist()}
    seen = [set(wanted)]
    different = {}
    for name, chosen in sets.items():
        if set(chosen) not in seen:
            different[name] = chosen
            seen.append(set(chosen))
    return different


def _row(name: str, count: int, outcomes: dict[str, dict[str, NDArray[np.bool_]]]) -> dict[str, object]:
    own, these = outcomes[name], outcomes[THESE]["attacked_again"]
    row: dict[str, object] = {"masked": name, "units": count, "images": len(these)}
    for measure, right in own.items():
        interval = share_interval(right)
        row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), interval, strict=True))
    other = own["attacked_again"]
    return row | {"lead": float(these.mean() - other.mean()), "p": mcnemar(these, other)}


def masking_sentence(table: pd.DataFrame, level: float = LEVEL) -> str:
    """Whether masking these units is shown to help against an attack made anew, and more than the controls do.

    Args:
        table: from `masking_test`.
        level: of McNemar's test; a lead over the controls must reach it against each of them.
    """
    rows = {row["masked"]: row for row in table.to_dict("records")}
    bare, these = rows.pop(UNMASKED), rows.pop(THESE)
    count = int(these["units"])
    units = f"{count} unit{'s' if count > 1 else ''}"
    figures = (
        f"attacked again, the masked network classifies {_ranged(these)} of {these['images']} images correctly, the "
        f"unmasked one {_ranged(bare)} (p = {bare['p']:.2g})"
    )
    cost = f"Without any attack it is {these['clean']:.0%} masked and {bare['clean']:.0%} unmasked."
    if bare["p"] > level or bare["lead"] == 0:
        return f"Masking {units} is not shown to change robustness: {figures}. {cost}"
    if bare["lead"] < 0:
        return f"Masking {units} makes the network weaker: {figures}. {cost}"
    if not rows:
        return f"Masking {units} helps; there are no other units to compare with: {figures}. {cost}"
    behind = [str(name) for name, row in rows.items() if row["lead"] <= 0 or row["p"] > level]
    if behind:
        return (
            f"Masking {units} helps, but is not shown to help more than masking as many others "
            f"({', '.join(behind)}): {figures}. {cost}"
        )
    return (
        f"Masking {units} helps, and more than masking as many others, at random or the most active (p at most "
        f"{max(row['p'] for row in rows.values()):.2g}): {figures}. {cost}"
    )


def _ranged(row: dict[Hashable, Any]) -> str:
    share, low, high = (row[f"attacked_again{suffix}"] for suffix in ("", "_low", "_high"))
    return f"{share:.0%} [{low:.0%}, {high:.0%}]"


def _activity(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """(U,) mean activation of the layer's units in these images."""
    bare = mask_units(model, layer, [])
    sums: list[Tensor] = []
    inner = bare.network
    module = inner.get_submodule("network").get_submodule(str(inner.layer))

    def note(activation: Tensor, count: int) -> Tensor:
        axis = unit_axis(activation, images)
        by_unit = activation[:count].movedim(axis, 1).reshape(count, activation.shape[axis], -1)
        sums.append(by_unit.mean(2).sum(0))
        return activation

    with evaluating(bare) as classifier, torch.no_grad():
        for part in images.split(classifier.fixed_batch or default_batch(images)):
            with replacing(module, partial(note, count=len(part))):
                classifier(classifier.filled(part))
    return torch.stack(sums).sum(0) / len(images)
