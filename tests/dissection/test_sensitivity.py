"""Unit sensitivity: a planted responsive unit, uniform p values where nothing is there, and the join's controls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from tests.conftest import NETWORKS, PoolingNetwork, TokenNetwork, untouched
from weakspot import Pairs
from weakspot.dissection import associate, by_category, in_words, join, moved_concepts, unit_sensitivity


class Planted(nn.Module):
    """Sixteen units that look at colours in their own way; `planted` lets number 5 look at blue alone."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.look(images).mean((2, 3)))
        return logits


def planted() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Planted().eval()
    with torch.no_grad():
        model.look.weight[5] = 0
        model.look.weight[5, 2] = 1
    return model


def noise(count: int, seed: int, side: int = 12) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pairs_of(clean: Tensor, adversarial: Tensor) -> Pairs:
    zeros = torch.zeros(len(clean), dtype=torch.long)
    return Pairs(clean, adversarial, zeros, zeros)


def test_a_planted_responsive_unit_ranks_first() -> None:
    clean = 0.4 + 0.2 * noise(30, 1)
    adversarial = clean.clone()
    adversarial[:, 2] += 0.3
    adversarial[:, :2] -= 0.01
    table = unit_sensitivity(planted(), "look", pairs_of(clean, adversarial))
    assert table["sensitivity"].idxmax() == 5
    assert table["change"][5] > 0
    assert table["p_value"][5] < 1e-6


def test_the_columns_are_what_brute_force_finds() -> None:
    model, clean = planted(), noise(9, 1)
    adversarial = (clean + 0.1 * noise(9, 2)).clamp(0, 1)
    table = unit_sensitivity(model, "look", pairs_of(clean, adversarial), batch_size=4)
    with torch.no_grad():
        first, second = (
            model.get_submodule("look")(images).double().mean((2, 3)) for images in (clean, adversarial)
        )
    change = second - first
    assert table["change"].to_numpy() == pytest.approx(change.mean(0).numpy(), abs=1e-6)
    assert table["spread"].to_numpy() == pytest.approx(first.std(0).numpy(), rel=1e-4)
    assert table["sensitivity"].to_numpy() == pytest.approx(
        (change.mean(0).abs() / first.std(0)).numpy(), rel=1e-3
    )
    assert table["mean_activation"].to_numpy() == pytest.approx(first.mean(0).numpy(), abs=1e-6)
    assert (table["p_value"] >= table["p"] - 1e-12).all()


def test_null_pairs_give_uniform_p_values() -> None:
    model = planted()
    found = []
    for seed in range(25):
        both = noise(24, 10 + seed).view(2, 12, 3, 12, 12)
        found.append(unit_sensitivity(model, "look", pairs_of(*both))["p"].to_numpy()[:1])
    assert kstest(np.concatenate(found), "uniform").pvalue > 0.01


def test_pairs_without_a_difference_move_nothing() -> None:
    clean = noise(5, 1)
    table = unit_sensitivity(planted(), "look", pairs_of(clean, clean))
    assert (table["sensitivity"] == 0).all()
    assert (table["p_value"] == 1).all()


def test_lots_in_a_stream_are_one_lot_and_the_model_comes_back() -> None:
    model, clean = planted(), noise(9, 1)
    adversarial = (clean + 0.1 * noise(9, 2)).clamp(0, 1)
    whole = unit_sensitivity(model, "look", pairs_of(clean, adversarial))
    with untouched(model, clean, adversarial):
        lots = (pairs_of(*both) for both in zip(clean.split(4), adversarial.split(4), strict=True))
        streamed = unit_sensitivity(model, "look", lots)
    assert streamed.to_numpy(float) == pytest.approx(whole.to_numpy(float), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("kind", "layer"), [("pooling", "stem"), ("tokens, not square", "encoder.layers.0")])
def test_networks_of_every_kind(kind: str, layer: str) -> None:
    model, images = NETWORKS[kind]()
    table = unit_sensitivity(model, layer, pairs_of(images, images.flip(3)))
    assert len(table) == {"stem": 8, "encoder.layers.0": 16}[layer]
    assert isinstance(model, PoolingNetwork | TokenNetwork)


def made_up(units: int, linked: float, seed: int = 0) -> pd.DataFrame:
    """Units whose activation drives both sensitivity and IoU, with or without a link of their own."""
    rng = np.random.default_rng(seed)
    activation, own = rng.normal(size=(2, units))
    return pd.DataFrame(
        {
            "sensitivity": np.exp(activation + 0.3 * rng.normal(size=units) + linked * own),
            "iou": np.exp(activation + 0.3 * rng.normal(size=units) + linked * own),
            "mean_activation": activation,
        }
    )


def test_an_association_that_activation_explains_is_none() -> None:
    found = associate(made_up(400, linked=0.0))
    assert found.correlation > 0.7
    assert found.low < 0 < found.high
    assert abs(found.partial) < 0.15
    linked = associate(made_up(400, linked=1.0))
    assert linked.low > 0.5


def test_an_association_that_layers_explain_is_none() -> None:
    rng = np.random.default_rng(0)
    layers = np.repeat([0, 1], 150)
    table = pd.DataFrame(
        {
            "sensitivity": layers + 0.2 * rng.normal(size=300), "iou": layers + 0.2 * rng.normal(size=300),
            "mean_activation": rng.normal(size=300), "layer": np.where(layers, "late", "early"),
        }
    )  # fmt: skip
    found = associate(table)
    assert found.correlation > 0.6
    assert found.low < 0 < found.high


def test_joined_units_say_which_concepts_an_attack_moves() -> None:
    sensitivity = pd.DataFrame(
        {
            "unit": range(5), "change": [2.0, 1.0, -3.0, -0.1, 5.0], "spread": [1.0, 1.0, 1.0, 1.0, 1.0],
            "sensitivity": [2.0, 1.0, 3.0, 0.1, 5.0], "p_value": [0.01, 0.2, 0.001, 0.9, 0.001],
            "mean_activation": range(5),
        }
    )  # fmt: skip
    units = pd.DataFrame(
        {
            "unit": range(5), "concept": ["dotted", "dotted", "ear", "sky", None], "iou": [0.1] * 5,
            "category": ["texture", "texture", "part", "object", None],
        }
    )  # fmt: skip
    table = join(sensitivity, units)
    moved = moved_concepts(table).set_index("concept")
    assert moved.loc[["dotted", "ear", "sky"], ["promoted", "suppressed"]].to_numpy().tolist() == [
        [1, 0],
        [0, 1],
        [0, 0],
    ]
    assert moved["change"].to_dict() == pytest.approx({"dotted": 1.5, "ear": -3.0, "sky": -0.1})
    assert in_words(moved_concepts(table)) == "The attack promotes dotted and suppresses ear."
    assert in_words(moved_concepts(table, level=0.0)) == "The attack moves no detector beyond doubt."
    kinds = by_category(table).set_index("category")
    assert kinds["units"].to_dict() == {"texture": 2, "part": 1, "object": 1, "none": 1}
    assert kinds.loc["texture", "sensitivity"] == pytest.approx(1.5)


def test_what_does_not_fit_is_refused() -> None:
    model, clean = planted(), noise(3, 1)
    with pytest.raises(ValueError, match="at least two, for a spread"):
        unit_sensitivity(model, "look", pairs_of(clean[:1], clean[:1]))
    with pytest.raises(ValueError, match="did you mean look"):
        unit_sensitivity(model, "lok", pairs_of(clean, clean))
    with pytest.raises(ValueError, match="no column 'iou'"):
        associate(made_up(20, 0).drop(columns="iou"))
    with pytest.raises(ValueError, match="3 units; accepted are at least ten"):
        associate(made_up(3, 0))
