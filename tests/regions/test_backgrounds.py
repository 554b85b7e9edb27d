"""Backgrounds: twins, planted objects, and a warning where the foreground is implausible."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from tests.networks import PoolingNetwork, untouched
from tests.regions.strategies import LAW, generators_untouched, pictures
from weakspot import ImageWarning, read_images, regions, sample_images
from weakspot.classifier import as_classifier, predict


def planted(
    size: tuple[int, int], center: tuple[float, float], radius: float, channels: int
) -> tuple[Tensor, Tensor]:
    """A disc (1, 1, H, W) of its own color and grain on a textured ground, and the image (1, C, H, W)."""
    height, width = size
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    disc = (rows - center[0] * height) ** 2 + (columns - center[1] * width) ** 2 < (radius * height) ** 2
    grain = 0.08 * torch.randn(channels, height, width, generator=torch.Generator().manual_seed(0))
    waves = 0.1 * torch.sin(rows / 2.0) * torch.cos(columns / 3.0)
    ground = torch.tensor([0.25, 0.45, 0.3])[:channels, None, None] + waves
    object_ = torch.tensor([0.85, 0.3, 0.2])[:channels, None, None] - waves
    return disc[None, None], (torch.where(disc, object_, ground) + grain).clamp(0, 1)[None]


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum())


def ink(*sites: tuple[int, int]) -> Tensor:
    image = torch.zeros(1, 1, 10, 10)
    for row, column in sites:
        image[0, 0, row, column] = 1
    return image


def outside_inner_rectangle(height: int, width: int) -> Tensor:
    outside = torch.ones(1, height, width, dtype=torch.bool)
    outside[:, height // 8 : height - height // 8, width // 8 : width - width // 8] = False
    return outside


@LAW
@given(pictures(channels=1))
def test_the_threshold_leaves_out_each_bright_pixel_and_its_neighbors(images: Tensor) -> None:
    found = regions.background(images, method="threshold")
    count, _, height, width = images.shape
    twin = torch.ones(count, 1, height, width, dtype=torch.bool)
    for number, row, column in (images[:, 0] > 0.1).nonzero().tolist():
        twin[number, 0, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = False
    assert torch.equal(found, twin)
    brighter = (images * 1.5).clamp(max=1)
    assert not bool((regions.background(brighter, method="threshold") & ~found).any())
    for flip in ((2,), (3,)):
        assert torch.equal(regions.background(images.flip(flip), method="threshold"), found.flip(flip))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "center", "radius"),
    [((32, 32), (0.5, 0.5), 0.3), ((32, 48), (0.45, 0.3), 0.28), ((128, 96), (0.4, 0.55), 0.22)],
)
def test_grabcut_finds_a_planted_disc(
    size: tuple[int, int], center: tuple[float, float], radius: float, channels: int
) -> None:
    disc, image = planted(size, center, radius, channels)
    assert overlap(~regions.background(image, method="grabcut"), disc) > 0.95
    assert overlap(~regions.background(image.flip(3), method="grabcut"), disc.flip(3)) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "zoom", "rectangle"),
    [((32, 32), 4, (16, 16, 96, 96)), ((63, 80), 4, (40, 32, 240, 188)), ((64, 96), 1, (12, 8, 72, 48))],
)
def test_grabcut_is_five_rounds_from_the_inner_rectangle_on_small_images_enlarged_four_times(
    size: tuple[int, int], zoom: int, rectangle: tuple[int, int, int, int]
) -> None:
    import cv2

    images = sample_images(size)[0][:2]
    twins = []
    for image in images:
        pixels = cv2.resize(
            (image * 255).round().byte().permute(1, 2, 0).numpy(), (size[1] * zoom, size[0] * zoom)
        )
        mask, models = np.zeros(pixels.shape[:2], np.uint8), np.zeros((2, 1, 65))
        cv2.setRNGSeed(0)
        cv2.grabCut(pixels, mask, rectangle, models[0], models[1], 5, cv2.GC_INIT_WITH_RECT)
        twin = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        twins.append(torch.from_numpy(twin % 2 == 0)[None])
    assert torch.equal(regions.background(images, method="grabcut"), torch.stack(twins))


@pytest.mark.parametrize("method", ["auto", "threshold", "grabcut", "cam"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_background_depends_on_its_image_alone_and_touches_nothing(method: str, channels: int) -> None:
    if method == "threshold" and channels == 3:
        return
    import cv2

    discs = [planted((24, 40), (0.5, 0.3 + 0.1 * number), 0.25, channels)[1] for number in range(3)]
    images = torch.cat(discs)
    images = torch.where(images > 0.6, images, 0.0) if channels == 1 else images
    if method != "auto":  # noise has no foreground
        generator = torch.Generator().manual_seed(0)
        images = torch.cat([images, torch.rand(1, channels, 24, 40, generator=generator)])
    images.requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PoolingNetwork(channels).eval()
    classes = torch.tensor([0, 3, 1, 2])[: len(images)]
    with generators_untouched(), untouched(model, images, classes):
        found = regions.background(images, method=method, model=model, classes=classes)
    assert found.dtype == torch.bool
    assert found.shape == (len(images), 1, 24, 40)
    cv2.setRNGSeed(1234)
    parts = [
        regions.background(images[n : n + 1], method=method, model=model, classes=classes[n : n + 1])
        for n in range(len(images))
    ]
    assert torch.equal(found, torch.cat(parts))
    n_backward = regions.background(images.flip(0), method=method, model=model, classes=classes.flip(0))
    assert torch.equal(found.flip(0), n_backward)


def test_grabcut_sees_gray_as_the_same_gray_in_three_channels() -> None:
    _, image = planted((30, 40), (0.5, 0.5), 0.25, 1)
    color = image.expand(-1, 3, -1, -1)
    assert torch.equal(
        regions.background(image, method="grabcut"), regions.background(color, method="grabcut")
    )


@LAW
@given(pictures(side=6, shortest=3))
def test_grabcut_answers_for_the_smallest_images_and_keeps_to_its_rectangle(images: Tensor) -> None:
    found = regions.background(images, method="grabcut")
    assert bool(found[regions.border(images, width=1)].all())


def test_auto_is_the_threshold_for_gray_and_grabcut_for_color() -> None:
    gray, color = ink((2, 2), (2, 6), (6, 3)), planted((32, 32), (0.5, 0.5), 0.3, 3)[1]
    assert torch.equal(regions.background(gray), regions.background(gray, method="threshold"))
    assert torch.equal(regions.background(color), regions.background(color, method="grabcut"))


def test_a_tenth_of_the_image_is_a_foreground_and_less_is_none() -> None:
    tenth, less = ink((0, 0), (5, 9)), ink((5, 5))  # 4 + 6 and 9 pixels of 100
    assert int((~regions.background(tenth)).sum()) == 10
    with pytest.warns(
        ImageWarning, match="the threshold found a foreground under 10% or over 80% of the image"
    ):
        regions.background(less)


def test_four_fifths_of_the_image_are_a_foreground_and_more_is_none() -> None:
    most = torch.ones(1, 1, 10, 10)
    most[..., 7:] = 0
    assert int((~regions.background(most)).sum()) == 80
    most[0, 0, 0, 8] = 1
    with pytest.warns(ImageWarning, match="in image 0; there"):
        regions.background(most)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("channels", "size"), [(1, (24, 16)), (3, (32, 32)), (3, (80, 64))])
def test_an_image_without_an_object_falls_back_to_the_rectangle_and_is_named(
    channels: int, size: tuple[int, int], value: float
) -> None:
    bad = torch.full((1, channels, *size), value)
    _, good = planted(size, (0.5, 0.5), 0.3, channels)
    good = torch.where(good > 0.6, good, 0.0) if channels == 1 else good
    with pytest.warns(ImageWarning, match="in images 1, 3; there the background is all outside") as caught:
        found = regions.background(torch.cat([good, bad, good, bad]))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(found[1], outside_inner_rectangle(*size))
    assert torch.equal(found[3], found[1])
    assert torch.equal(found[[0, 2]], regions.background(torch.cat([good, good])))


@pytest.mark.parametrize("size", [(3, 3), (5, 28), (31, 20), (13, 225)])
def test_the_rectangle_is_centered_and_three_quarters_of_any_side(size: tuple[int, int]) -> None:
    with pytest.warns(ImageWarning, match="all outside the inner rectangle"):
        inside = ~regions.background(torch.zeros(1, 1, *size))[0, 0]
    assert torch.equal(inside, inside.flip(0, 1))
    for side, along in zip(size, (inside.any(1), inside.any(0)), strict=True):
        assert abs(int(along.sum()) - 0.75 * side) <= 1.25
        assert not bool(along[0])


def test_many_bad_images_are_counted_not_listed() -> None:
    with pytest.warns(ImageWarning, match="images 0, 1, 2, 3, 4, 5, 6, 7 and 12 more; there"):
        regions.background(torch.zeros(20, 1, 9, 9))


@pytest.mark.parametrize("method", ["threshold", "grabcut"])
def test_a_method_that_was_asked_for_does_not_fall_back(method: str) -> None:
    assert bool(regions.background(torch.zeros(2, 1, 16, 16), method=method).all())


@pytest.mark.parametrize("given_classes", [True, False])
def test_with_a_model_the_class_activation_takes_over_for_the_bad_images_only(
    pooling: tuple[nn.Module, Tensor], given_classes: bool
) -> None:
    model, noise = pooling
    _, good = planted((20, 20), (0.5, 0.5), 0.3, 3)
    bad = noise[:1] * 0 + torch.linspace(0.4, 0.401, 20)  # one color in 8 bits, yet a map that varies
    images = torch.cat([bad, good, bad.flip(2, 3)])
    classes = torch.tensor([2, 0, 1]) if given_classes else None
    explained = predict(as_classifier(model), images).argmax(1) if classes is None else classes
    with untouched(model, images), pytest.warns(ImageWarning, match="images 0, 2; .* all but the 30%"):
        found = regions.background(images, model=model, classes=classes)
    evidence = ~regions.cam(model, images, explained, fraction=0.3)
    assert torch.equal(found[[0, 2]], evidence[[0, 2]])
    assert torch.equal(found[1:2], regions.background(good, method="grabcut"))


def test_cam_is_the_complement_of_the_top_share_of_the_class(any_model: tuple[nn.Module, Tensor]) -> None:
    model, images = any_model
    classes = torch.tensor([1, 0, 1])
    with untouched(model, images, classes):
        found = regions.background(images, method="cam", model=model, classes=classes)
        of_predictions = regions.background(images, method="cam", model=model)
    predicted = predict(as_classifier(model), images).argmax(1)
    assert torch.equal(found, ~regions.cam(model, images, classes, fraction=0.3))
    assert torch.equal(of_predictions, ~regions.cam(model, images, predicted, fraction=0.3))


def test_arguments_without_a_background_are_refused() -> None:
    color = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"method must .* got 'grabcat' \(did you mean 'grabcut'\?"):
        regions.background(color, method="grabcat")
    with pytest.raises(ValueError, match="model must be a classifier for method 'cam', got None"):
        regions.background(color, method="cam")
    with pytest.raises(ValueError, match=r"images must have 1 channels for method 'threshold', got 3$"):
        regions.background(color, method="threshold")
    with pytest.raises(ValueError, match="images must have 1 or 3 channels for method 'auto', got 4"):
        regions.background(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"images must be at least 3 x 3 pixels .*, got 2 x 8"):
        regions.background(color[:, :, :2])
    with pytest.raises(ValueError, match=r"classes must .* got \(1,\)"):
        regions.background(color, classes=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"images must .* got \(3, 8, 8\)"):
        regions.background(color[0])
    with pytest.warns(ImageWarning, match="are clipped to"):
        regions.background(ink((3, 3), (6, 6)) * 3)


@pytest.mark.data
def test_grabcut_finds_real_horses_better_than_its_rectangle_does(data: Path) -> None:
    found, guessed = [], []
    for path in sorted((data / "weizmann_horse/images").iterdir())[::32][:10]:
        image, _ = read_images(path)
        figure = read_images(data / "weizmann_horse/masks" / f"{path.stem}.png", channels=1)[0] > 0.5
        found.append(overlap(~regions.background(image, method="grabcut"), figure))
        guessed.append(overlap(~outside_inner_rectangle(*image.shape[2:])[None], figure))
    assert len(found) == 10
    assert np.mean(found) > np.mean(guessed) + 0.2
    assert np.mean(np.greater(found, guessed)) > 0.8


@pytest.mark.data
def test_the_background_of_a_real_digit_holds_no_ink(data: Path) -> None:
    raw = gzip.decompress((data / "mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    images = torch.from_numpy(
        np.frombuffer(raw, np.uint8, 1000 * 784, 16).reshape(-1, 1, 28, 28) / np.float32(255)
    )
    found = regions.background(images, method="threshold")
    assert not bool((found & (images > 0.1)).any())
    fraction = found.flatten(1).float().mean(1)
    assert float(fraction.min()) > 0.3
    assert float(fraction.max()) < 0.95
