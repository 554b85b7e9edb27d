"""The causal check: a planted unit that carries the decision brings it back, others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, untouched
from weakspot import Pairs, attacks, unit_restoration
from weakspot.budgets import Linf
from weakspot.dissection.causal import analyze_units


class Carried(nn.Module):
    """Eight units see the image's brightness; the decision hangs on the blue one, number 3, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 8, 1, bias=False)
        with torch.no_grad():
            self.look.weight.fill_(0.01)
            self.look.weight[3, :, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.relu(self.look(images)).mean((2, 3))[:, 3]
        return torch.stack([seen, 0.5 - seen], 1)


def carried() -> tuple[nn.Module, Pairs]:
    model, clean = Carried().eval(), torch.full((6, 3, 5, 5), 0.4)
    clean[:, 1, 0, 0] += torch.arange(6) / 1000  # six different images
    adversarial = clean.clone()
    adversarial[:, 2] = 0.1
    adversarial[5] = clean[5]
    return model, Pairs.of(model, clean, adversarial)


def test_the_unit_that_carries_the_decision_restores_it() -> None:
    model, pairs = carried()
    with untouched(model, pairs.clean, pairs.adversarial):
        table = unit_restoration(model, "look", pairs, fractions=(1 / 8, 1.0))
    assert table["images"].tolist() == [5, 5]
    assert table["units"].tolist() == [1, 8]
    assert table["reverted"].tolist() == [1, 1]
    assert table["random"][0] < 1
    assert table["random"][1] == 1
    # The exact interval of 5 of 5, where resampling would say that nothing is left open.
    assert table["reverted_low"].tolist() == pytest.approx([0.4782] * 2, abs=1e-3)
    assert table["p"][1] == 1


@pytest.mark.parametrize(("kind", "layer"), [("pooling", "stem"), ("tokens, not square", "encoder.layers.0")])
def test_restoring_all_units_gives_the_clean_decision(kind: str, layer: str) -> None:
    model, images = NETWORKS[kind]()
    with torch.no_grad():
        model.get_submodule("head").bias.sub_(model(images).mean(0))  # type: ignore[operator]
    labels = model(images).argmax(1)
    pairs = attacks.pgd(model, images, labels, budget=Linf(0.5), steps=10)
    assert bool(pairs.success.any())
    table = unit_restoration(model, layer, pairs, fractions=(0.2, 1.0), batch_size=2)
    assert table["reverted"][1] == table["random"][1] == 1
    assert unit_restoration(model, layer, pairs, fractions=(0.2, 1.0)).equals(table)


def test_invalid_input_is_an_error() -> None:
    model, pairs = carried()
    with pytest.raises(ValueError, match="fractions must be a list of fractions"):
        unit_restoration(model, "look", pairs, fractions=(0.0,))
    with pytest.raises(ValueError, match=r"layer must .* got 'luck'"):
        unit_restoration(model, "luck", pairs)


def test_the_analysis_counts_the_units_that_restore_the_decision() -> None:
    model, pairs = carried()
    result = analyze_units(model, pairs)
    assert result.scores["units_to_revert"].tolist()[:5] == [1 / 8] * 5  # one unit, for 1% as well
    assert result.scores["units_to_revert"].isna().tolist() == [False] * 5 + [True]
    assert (result.scores["random_units_to_revert"][:5] >= 1 / 8).all()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(75, 2)).eval()
    assert len(analyze_units(flat, pairs).scores) == len(pairs)


def test_copies_of_an_image_count_once() -> None:
    model, pairs = carried()
    copies = pairs[[0, 1] * 10]
    table = unit_restoration(model, "look", copies, fractions=(1 / 8, 1.0))
    assert table.equals(unit_restoration(model, "look", pairs[:2], fractions=(1 / 8, 1.0)))
    assert table["images"].tolist() == [2, 2]
