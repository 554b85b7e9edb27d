"""Unit studies: the unit that attacks use is chosen and masked, and evaluated on other images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tests.defenses.test_unit_masking import Leaking
from tests.networks import untouched
from weakspot import Classifier, Linf, Pairs, attacks
from weakspot.defenses.unit_study import association_sentences, unit_study
from weakspot.dissection import Dissection, DissectionOptions


def dissected(units: int, concepts: list[str | None]) -> Dissection:
    table = pd.DataFrame(
        {
            "unit": range(units), "threshold": 0.0, "concept": concepts, "iou": np.linspace(0.2, 0.01, units),
            "category": [None if concept is None else "object" for concept in concepts],
        }
    )  # fmt: skip
    empty = torch.zeros(units, 0)
    return Dissection("look", table, (), empty, empty.long(), empty, DissectionOptions(min_iou=0.04))


def leaking(count: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """Unit 0 carries the class, unit 1 is loud and what attacks use."""
    labels = torch.arange(count).div(2, rounding_mode="floor") % 2
    noise = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    images = 0.5 + 0.05 * noise
    images[:, 0] += ((labels.float() - 0.5) * 0.6)[:, None, None]
    images = images.clamp(0, 1)
    model = Classifier.wrap(Leaking().eval(), input_size=(8, 8))
    return model, images, model(images).argmax(1).detach()


class Recorded:
    """PGD that remembers what it was called with."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Any:
        self.seen.append(images.clone())
        return attacks.pgd(model, images, labels, budget=Linf(0.2), steps=10)


def test_the_unit_that_attacks_use_is_chosen_and_evaluated_on_other_images() -> None:
    model, images, labels = leaking()
    attack = Recorded()
    pairs = attack(model, images, labels)
    progress: list[float] = []
    with untouched(model, images):
        study = unit_study(
            model,
            dissected(8, ["blue", None, *[None] * 6]),
            pairs,
            mask=1,
            attack=attack,
            progress=progress.append,
        )
    assert study.masked == [1]
    assert study.masking is not None
    assert (study.masking["images"] == 20).all()
    assert all(torch.equal(seen, images[1::2]) for seen in attack.seen[1:])
    assert "helps" in study.sentences[-1]
    assert progress[-1] == pytest.approx(1)
    assert progress == sorted(progress)
    assert repr(study) == "UnitStudy('look', 8 units, 1 masked)"
    assert study.sentences[2].startswith("Fewer than 10 units vary")  # six units see nothing


def test_given_units_are_evaluated_on_all_images_and_noise_masks_nothing() -> None:
    model, images, labels = leaking()
    attack = Recorded()
    pairs = attack(model, images, labels)
    dissection = dissected(8, [None] * 8)
    given = unit_study(model, dissection, pairs, mask=[3, 1], attack=attack)
    assert given.masked == [3, 1]
    assert given.masking is not None
    assert (given.masking["images"] == 40).all()
    still = unit_study(model, dissection, Pairs(images, images, labels, labels), mask=0, attack=attack)
    assert still.masking is None
    assert "nothing is masked" in still.sentences[-1]
    assert still.sentences[0].startswith("No unit clearly moves more")
    assert unit_study(model, dissection, pairs).masking is None
    with pytest.raises(ValueError, match="mask must be a number of units from 0 to 8"):
        unit_study(model, dissection, pairs, mask=9)
    few = Pairs(images[:3], images[:3], labels[:3], labels[:3])
    with pytest.raises(ValueError, match="at least 4"):
        unit_study(model, dissection, few, mask=1)


def test_noise_has_its_own_sentence_beside_the_attack() -> None:
    rng = np.random.default_rng(0)
    own, activation = rng.normal(size=(2, 60))
    table = pd.DataFrame(
        {
            "sensitivity": np.exp(own), "noise": np.exp(rng.normal(size=60)), "iou": np.exp(own),
            "mean_activation": activation,
        }
    )  # fmt: skip
    sentences = association_sentences(table)
    assert sentences[0].startswith("Units that agree better with a concept are more sensitive")
    assert sentences[1].startswith("For sensitivity to noise of the same size, ")
    assert len(association_sentences(table.head(15))) == 1
    assert association_sentences(table.assign(sensitivity=np.inf))[0].startswith("Fewer than 10 units vary")
    constant = association_sentences(table.assign(noise=1.0))
    assert constant[1] == "For sensitivity to noise of the same size, nothing is left to correlate."


def test_of_units_that_were_not_tested_nothing_is_denied() -> None:
    model, images, labels = leaking(8)
    # Noise with changes of more than a half does not fit into the middle of the range.
    pairs = Pairs(images, (images < 0.5).float(), labels, labels)
    study = unit_study(model, dissected(8, ["blue", *[None] * 7]), pairs, mask=1)
    assert study.sentences[0].startswith("No unit was tested")
    assert not any("No detector" in sentence or "No unit changes" in sentence for sentence in study.sentences)
    assert "No unit was shown to change more than under noise" in study.sentences[-1]
