"""Does masking units help? Attacks made before are weak evidence; the attacker who knows the mask attacks again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from weakspot.attacks import pgd
from weakspot.attribution.layout import unit_axis
from weakspot.attribution.replacing import replacing
from weakspot.checks import check_classes, check_seed
from weakspot.classifier import check_images, default_batch, evaluating, predict
from weakspot.defenses.masking import mask_units, unit_numbers
from weakspot.pairs import Pairs
from weakspot.statistics import mean_interval

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 3  # sets of random units
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
    """Accuracy of the network with units masked: clean, against attacks on the bare network, and attacked again.

    Beside the units asked for stand as many at random, three sets of them, and the most active ones.

    Args:
        model: any classifier.
        layer: as for `mask_units`.
        units: to be masked, as found to be sensitive on *other* images.
        images: (N, C, H, W).
        labels: (N,).
        attack: `attacks.pgd` or any function of model, images and labels that returns pairs.
        seed: of the random units.
        progress: called with the share done.

    Returns:
        One row per network (bare, these units, random units, most active units): masked, units, then clean, transfer
        (attacks on the bare network replayed) and attacked_again, each with _low and _high, 95% intervals over images.

    Raises:
        ValueError: when an argument does not fit, naming it.
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
        raise ValueError(f"units are {count}; accepted are 1 to {len(activity)}, as many as {layer!r} has")
    rng = np.random.default_rng(seed)
    groups: Mapping[str, list[Sequence[int]]] = {
        "bare": [()],
        "these units": [wanted],
        "random units": [rng.choice(len(activity), count, replace=False).tolist() for _ in range(DRAWS)],
        "most active units": [activity.topk(count).indices.tolist()],
    }
    replayed = attack(model, images, labels).adversarial
    rows, done, total = [], 0, sum(len(sets) for sets in groups.values())
    for name, sets in groups.items():
        right: dict[str, list[np.ndarray]] = {"clean": [], "transfer": [], "attacked_again": []}
        for chosen in sets:
            masked = mask_units(model, layer, chosen) if len(chosen) else model
            again = attack(masked, images, labels).adversarial if len(chosen) else replayed
            with evaluating(masked) as classifier:
                for key, shown in zip(right, (images, replayed, again), strict=True):
                    right[key].append((predict(classifier, shown).argmax(1) == labels).double().cpu().numpy())
            done += 1
            if progress is not None:
                progress(done / total)
        row: dict[str, object] = {"masked": name, "units": len(sets[0])}
        for key, values in right.items():
            found = mean_interval(np.mean(values, 0))
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), found, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def _activity(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """(U,) mean activation of the layer's units."""
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
