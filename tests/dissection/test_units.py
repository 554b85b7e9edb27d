"""Dissection: IoUs counted by hand, planted detectors, exact quantiles, and what must not change a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.dissection.broden_fixture import (
    CATEGORIES,
    CONCEPTS,
    CONTENTS,
    LEFT,
    QUARTER,
    TOP,
    paint,
    twelve_images,
)
from tests.networks import TokenNetwork, untouched
from weakspot.classifier import Classifier
from weakspot.dissection import ConceptSet, dissect, dissect_layers
from weakspot.dissection.site_counts import LARGEST, TopValues

HALF = 0.6  # of the fixture's sites at most half carry a color, so that the threshold is 0


class Seeing(nn.Module):
    """Units that pass the colors on, and one that sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 4, 1, bias=False)
        with torch.no_grad():
            self.look.weight.zero_()
            for unit in range(3):
                self.look.weight[unit, unit] = 1
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.look(images).mean((2, 3)))
        return logits


def seeing(size: tuple[int, int] = (16, 16)) -> Classifier:
    return Classifier.wrap(Seeing().eval(), input_size=size)


def by_hand(unit: np.ndarray, concept: tuple[str, str], denominator: str) -> float:
    """IoU of a unit that is active at the same sites in every picture, from the fixture's own masks."""
    both = active = own = 0
    place = CATEGORIES.index(concept[1])
    # Of picture 11 the column "object" holds a mask without any label: it is annotated all the same.
    annotated = [
        {key[1] for key in content} | ({"object"} if number == 11 else set())
        for number, content in enumerate(CONTENTS)
    ]
    for content, categories in zip(CONTENTS, annotated, strict=True):
        mask = content.get(concept, np.zeros((8, 8), bool))
        labeled = np.zeros((8, 8), bool)
        for (_, category), other in content.items():
            if category == CATEGORIES[place]:
                labeled |= other
        both += int((unit & mask).sum())
        own += int(mask.sum())
        active += {
            "all": int(unit.sum()),
            "category": int(unit.sum()) if concept[1] in categories else 0,
            "activated": int((unit & labeled).sum()),
        }[denominator]
    return both / max(1, active + own - both)


@pytest.mark.parametrize("denominator", ["category", "activated", "all"])
@pytest.mark.parametrize("alignment", ["receptive_field", "resize"])
def test_ious_are_those_counted_by_hand(tmp_path: Path, denominator: str, alignment: str) -> None:
    dataset = twelve_images(tmp_path / "set")
    result = dissect_layers(
        seeing(), ["look"], dataset, quantile=HALF, denominator=denominator, alignment=alignment
    )["look"]
    for number, unit in enumerate((LEFT, TOP, QUARTER, np.zeros((8, 8), bool))):
        expected = [by_hand(unit, concept, denominator) for concept in CONCEPTS]
        assert result.iou[number].tolist() == pytest.approx(expected)
        row = result.units.iloc[number]
        assert row["iou"] == pytest.approx(max(expected))
        assert row["second_iou"] == pytest.approx(sorted(expected)[-2])
        if max(expected) >= 0.04:
            assert (row["concept"], row["category"]) == CONCEPTS[int(np.argmax(expected))]
    assert result.units["concept"].isna().tolist() == [False, False, False, True]


def test_the_two_fractions_in_the_comment_of_the_fixture(tmp_path: Path) -> None:
    dataset = twelve_images(tmp_path / "set")
    sky = CONCEPTS.index(("sky", "object"))
    for denominator, expected in (("all", 1 / 3), ("category", 3 / 7)):
        result = dissect_layers(seeing(), ["look"], dataset, quantile=HALF, denominator=denominator)["look"]
        assert float(result.iou[0, sky]) == pytest.approx(expected)


def planted(folder: Path, count: int = 20, side: int = 32) -> Path:
    """Pictures with a red and a green square each, labeled, somewhere on noise."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    from PIL import Image

    rows = ["image,split,ih,iw,sh,sw,object"]
    for number in range(count):
        picture = rng.integers(0, 100, (side, side, 3))
        picture[..., :2] = 0
        labels = np.zeros((side, side), int)
        for channel, label, half in ((0, 1, 0), (1, 2, side // 2)):
            top, left = rng.integers(0, side - 8) // 2 * 2, rng.integers(half, half + side // 2 - 8) // 2 * 2
            picture[top : top + 8, left : left + 8, channel] = rng.integers(150, 256)
            labels[top : top + 8, left : left + 8] = label
        Image.fromarray(picture.astype(np.uint8)).save(images / f"{number}.png")
        paint(images / f"{number}_object.png", labels[::2, ::2])
        rows.append(f"{number}.png,train,{side},{side},{side // 2},{side // 2},{number}_object.png")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    (folder / "label.csv").write_text("number,name,category\n1,red,object\n2,green,object\n")
    return folder


def test_planted_detectors_are_found_and_nothing_else_is_accused(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    table = dissect(seeing((32, 32)), "look", dataset, quantile=0.07)
    assert table["concept"].tolist()[:2] == ["red", "green"]
    assert table["concept"].isna().tolist() == table["category"].isna().tolist() == [False, False, True, True]
    assert (table["iou"][:2] > 0.99).all()
    assert (table["iou"][2:] < 0.04).all()


@pytest.mark.parametrize("batch_size", [1, 5, 7, 64])
def test_no_result_depends_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    dataset = planted(tmp_path / "set")
    model = drawn((32, 32))
    one, other = (
        dissect_layers(model, ["network.0", "network.2"], dataset, quantile=0.02, batch_size=size)
        for size in (None, batch_size)
    )
    for layer, result in one.items():
        torch.testing.assert_close(result.iou, other[layer].iou)
        assert torch.equal(result.top_images, other[layer].top_images)


def drawn(size: tuple[int, int]) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
        )  # fmt: skip
    return Classifier.wrap(network.eval(), input_size=size)


def test_several_layers_equal_single_ones(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    model = drawn((32, 32))
    both = dissect_layers(model, ["0", "4"], dataset, quantile=0.02)
    for layer, result in both.items():
        alone = dissect_layers(model, [layer], dataset, quantile=0.02)[layer]
        torch.testing.assert_close(result.iou, alone.iou)
        assert result.units["concept"].tolist() == alone.units["concept"].tolist()


def test_the_top_images_have_the_largest_activations(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    result = dissect_layers(seeing((32, 32)), ["look"], dataset, quantile=0.07)["look"]
    from weakspot.images import read_images

    concepts = ConceptSet.open(dataset)
    pictures = torch.cat(
        [read_images(concepts.image(number), size=(32, 32))[0] for number in range(len(concepts))]
    )
    expected = pictures[:, 0].flatten(1).amax(1).sort(descending=True, stable=True)
    assert result.top_images[0].tolist() == expected.indices[:8].tolist()
    torch.testing.assert_close(result.top_values[0], expected.values[:8])


@pytest.mark.parametrize("quantile", [0.005, 0.1, 0.6])
@pytest.mark.parametrize("batches", [1, 3])
def test_thresholds_are_exact_quantiles_for_small_data_sets(quantile: float, batches: int) -> None:
    maps = torch.randn(6, 5, 9, 7, generator=torch.Generator().manual_seed(0))
    values = TopValues(quantile, 6 * 63)
    for part in maps.split(6 // batches):
        values.add(part)
    every = maps.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.thresholds(), every.quantile(1 - quantile, dim=1), rtol=1e-5, atol=1e-6)


def test_thresholds_of_large_data_sets_are_within_one_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    images, side, quantile = 40, 224, 0.05
    assert quantile * images * side * side > 10 * LARGEST
    maps = [torch.randn(4, 3, side, side, generator=generator).exp() for _ in range(images // 4)]
    values = TopValues(quantile, images * side * side)
    for part in maps:
        values.add(part)
    assert values._values is not None
    assert values._values.shape[1] < 2 * LARGEST
    every = torch.cat(maps).transpose(0, 1).flatten(1).numpy()
    exact = np.quantile(every, 1 - quantile, axis=1)
    assert values.thresholds().tolist() == pytest.approx(exact.tolist(), rel=0.01)


def test_tokens_are_dissected_as_the_grid_of_their_patches(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier.wrap(TokenNetwork((32, 32)).eval(), input_size=(32, 32))
    with torch.no_grad():
        embed = model.get_submodule("network.embed")
        embed.weight[0] = 0  # type: ignore[operator]
        embed.weight[0, 0] = 1  # type: ignore[operator]
    table = dissect(model, "embed", dataset, quantile=0.05)
    assert table["concept"][0] == "red"
    assert table["iou"][0] > 0.4


def test_the_cache_depends_on_network_data_set_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cache = planted(tmp_path / "set"), tmp_path / "cache"
    model = seeing((32, 32))
    first = dissect(model, "look", dataset, quantile=0.07, cache=cache)
    passes = counted(model, monkeypatch)
    assert dissect(model, "look", dataset, quantile=0.07, cache=cache).equals(first)
    assert passes == []
    of_numpy: Any = {"quantile": np.float64(0.07), "min_iou": np.float32(0.04)}
    same = dissect(model, "look", dataset, **of_numpy, cache=cache)
    assert same.equals(first)
    assert passes == []
    stricter = dissect(model, "look", dataset, quantile=0.07, min_iou=1.0, cache=cache)
    assert stricter["concept"].isna().tolist()[2:] == [True, True]
    assert passes == []
    for change in ({"quantile": 0.05}, {"denominator": "all"}, {"alignment": "resize"}):
        dissect(model, "look", dataset, **{"quantile": 0.07, **change}, cache=cache)  # type: ignore[arg-type]
        assert passes
        passes.clear()
    with torch.no_grad():
        model.get_submodule("network.look").weight.mul_(2)  # type: ignore[operator]
    dissect(model, "look", dataset, quantile=0.07, cache=cache)
    assert passes
    passes.clear()
    (dataset / "images" / "3_object.png").unlink()
    paint(dataset / "images" / "3_object.png", np.zeros((16, 16), int))
    assert not dissect(model, "look", dataset, quantile=0.07, cache=cache).equals(first)
    assert passes
    for kept in cache.iterdir():
        kept.write_bytes(b"not what it was")
    passes.clear()
    dissect(model, "look", dataset, quantile=0.07, cache=cache)
    assert passes


def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    forward = model.forward

    def watched(images: Tensor) -> Tensor:
        seen.append(len(images))
        logits: Tensor = forward(images)
        return logits

    monkeypatch.setattr(model, "forward", watched)
    return seen


def test_the_model_is_unchanged_even_after_an_exception(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    model = drawn((32, 32))
    with untouched(model):
        dissect(model, "4", dataset)
    (dataset / "images" / "19.png").write_bytes(b"broken")
    with untouched(model), pytest.raises(ValueError, match=r"19\.png"):
        dissect(model, "4", dataset)


def test_progress_rises_to_one(tmp_path: Path) -> None:
    message: list[float] = []
    dissect(drawn((32, 32)), "4", planted(tmp_path / "set"), progress=message.append)
    assert message == sorted(message)
    assert message[-1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantile": 0}, "quantile must be a fraction .* got 0"),
        ({"min_iou": 2}, "min_iou must be between 0 and 1, .* got 2"),
        ({"denominator": "unions"}, "denominator must be one of .* got 'unions'"),
        ({"alignment": "resized"}, "alignment must .*'resized' .did you mean 'resize'"),
        ({"batch_size": 0}, "batch_size must .* got 0"),
        ({"layer": "lok"}, "layer must .* got 'lok' .did you mean 'look'"),
    ],
)
def test_invalid_arguments_are_errors_that_name_them(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    dataset = twelve_images(tmp_path / "set")
    arguments = {"layer": "look", **change}
    with pytest.raises(ValueError, match=message):
        dissect(seeing(), dataset=dataset, **arguments)


def test_dissections_and_concept_sets_print_as_a_few_lines(tmp_path: Path) -> None:
    dataset = planted(tmp_path)
    dissection = dissect_layers(seeing(), ["look"], dataset, quantile=0.07)["look"]
    concepts = ConceptSet.open(dataset)
    for result in (dissection, concepts, concepts.annotation(0)):
        text = repr(result)
        assert "tensor(" not in text
        assert len(text.splitlines()) <= 3, text
    assert repr(dissection).startswith("Dissection of 'look': ")
