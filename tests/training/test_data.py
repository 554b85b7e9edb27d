"""Data in every form gives equal weights; items that do not fit are named; masks move with their images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.training.tiny import fresh, halves, quick_train, weights
from weakspot.classifier import as_classifier
from weakspot.datasets import from_tensors, read_labeled
from weakspot.training import data as training_data
from weakspot.training.data import Augmentation, as_labeled, find_backgrounds


class Lazy(Dataset[tuple[Tensor, int]]):
    """Makes each item when it is asked for, and counts how often."""

    def __init__(self, count: int = 60, changes: dict[int, Any] | None = None) -> None:
        self.images, self.labels = halves(count)
        self.changes, self.reads = changes or {}, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if index in self.changes:
            change = self.changes[index]
            return change() if callable(change) else change
        return self.images[index], int(self.labels[index])


def test_the_same_data_in_any_form_gives_equal_weights() -> None:
    images, labels = halves(60)
    lazy, longer = Lazy(60), Lazy(80)
    longer.images[:60] = images
    forms: dict[str, Any] = {
        "LabeledImages": from_tensors(images, labels),
        "TensorDataset": TensorDataset(images, labels),
        "Dataset": lazy,
        "Subset": Subset(longer, range(60)),
        "DataLoader": DataLoader(lazy, batch_size=7),
        "shuffling DataLoader": DataLoader(lazy, batch_size=7, shuffle=True),
        "DataLoader that drops the last batch": DataLoader(lazy, batch_size=7, drop_last=True),
        "DataLoader of tensors": DataLoader(TensorDataset(images, labels), shuffle=True),
    }
    options: dict[str, Any] = {"recipe": "localized", "steps": 1, "held_out": 6, "workers": 0}
    expected = weights(quick_train(fresh(), (images, labels), **options))
    before = torch.get_rng_state()
    for name, form in forms.items():
        assert torch.equal(weights(quick_train(fresh(), form, **options)), expected), name
    assert torch.equal(torch.get_rng_state(), before)


def test_items_are_read_by_any_number_of_workers_and_not_held() -> None:
    lazy = Lazy()
    data = as_labeled(lazy, as_classifier(fresh()))
    assert not data.held
    assert lazy.reads == 1 + 2 * 8 + 60  # the first item, the comparison, and one pass for the labels
    assert torch.equal(data.labels, lazy.labels)
    assert torch.equal(data.images(torch.tensor([5, 3])), lazy.images[[5, 3]])
    assert lazy.reads == 77 + 2
    one, two = (
        quick_train(fresh(), lazy, workers=workers, held_out=0, epochs=1, steps=1) for workers in (0, 2)
    )
    assert torch.equal(weights(one), weights(two))


def broken() -> Any:
    raise OSError("truncated file")


IMAGE = torch.zeros(1, 16, 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_cannot_be_read_is_named_from_any_process(workers: int) -> None:
    with pytest.raises(ValueError, match=r"^data\[17\] cannot be read: OSError: truncated file$"):
        quick_train(fresh(), Lazy(changes={17: broken}), workers=workers)


@pytest.mark.parametrize(
    ("index", "item", "message"),
    [
        (9, {"image": IMAGE, "label": 0}, r"data\[9\] must be \(image, label\), got dict of 2"),
        (0, (IMAGE,), r"data\[0\] must be \(image, label\), got tuple of 1"),
        (9, (np.zeros((16, 12)), 0), r"data\[9\] must hold an image tensor .* got ndarray \(convert"),
        (9, (IMAGE[0], 0), r"data\[9\] must hold an image tensor \(C, H, W\), got shape \(16, 12\)"),
        (9, (IMAGE + 255, 0), r"data\[9\] must hold floats in \[0, 1\], got 255 to 255"),
        (9, (IMAGE.int(), 0), r"data\[9\] must hold floats in \[0, 1\] or bytes, got torch.int32"),
        (9, (IMAGE.repeat(3, 1, 1), 0), r"data\[9\] must hold an image like data\[0\], .* got \(3, 16, 12\)"),
        (9, (IMAGE.byte(), 0), r"data\[9\] must hold an image like data\[0\], .* torch.uint8"),
        (9, (IMAGE, 0.5), r"data\[9\] must hold an integer label, got 0.5"),
        (9, (IMAGE, "cat"), r"data\[9\] must hold an integer label, got 'cat'"),
        (
            3,
            lambda: (torch.rand(1, 16, 12), 0),
            r"data\[3\] must be the same each time .* TrainConfig.augment",
        ),
    ],
)
def test_items_that_do_not_fit_are_named(index: int, item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        as_labeled(Lazy(changes={index: item}), as_classifier(fresh()))
    assert "\n" not in str(caught.value)


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(())


def test_data_of_another_form_is_refused() -> None:
    images, labels = halves(40)
    lazy, ordered = Lazy(40), SequentialSampler(range(40))
    cases: list[tuple[Any, str]] = [
        (images, "data must be .* got Tensor"),
        ({"images": images}, "data must be .* got dict"),
        (Stream(), "data must be .* with a length.* got Stream"),
        (DataLoader(Stream()), "got Stream"),
        (Lazy(0), "data must hold at least one item"),
        (DataLoader(lazy, sampler=SubsetRandomSampler(range(9))), "SubsetRandomSampler .*Subset"),
        (DataLoader(lazy, sampler=WeightedRandomSampler([1.0] * 40, 40)), "WeightedRandomSampler"),
        (DataLoader(lazy, batch_sampler=type("Own", (BatchSampler,), {})(ordered, 4, False)), "with a Own"),
        (DataLoader(lazy, collate_fn=lambda items: items), "default collate_fn"),
        ((images, labels[:5]), "labels"),
        ((images * 3, labels), "images"),
        ((images[:, 0], labels), "images"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            as_labeled(data, as_classifier(fresh()))


@pytest.mark.parametrize("workers", [0, 2])
def test_picture_files_are_decoded_alike_by_any_number_of_workers_and_damage_is_named(
    workers: int, tmp_path: Path
) -> None:
    images, _ = halves(40)
    for number, image in enumerate(images):
        folder = tmp_path / "photos" / ("one" if number % 2 else "two")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / f"{number:02}.png")
    data = read_labeled(tmp_path / "photos", size=(16, 12), channels=1)
    options: dict[str, Any] = {"held_out": 0, "epochs": 1, "steps": 1}
    trained = quick_train(fresh(), data, workers=workers, **options)
    assert torch.equal(weights(trained), weights(quick_train(fresh(), data, workers=1, **options)))

    def damage(row: dict[str, float]) -> None:
        (tmp_path / "photos/one/03.png").write_bytes(b"no picture")

    with pytest.raises(ValueError, match=r"one/03.png cannot be read: "):
        quick_train(fresh(), data, on_epoch=damage, workers=workers, held_out=0, epochs=3)


def test_masks_are_cropped_and_flipped_with_their_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 3, 16, 24, generator=generator) + 0.1
    masks = images[:, :1] > 0.6
    rows = torch.randperm(50, generator=generator)[:20]
    augmentation = Augmentation("crop,flip", 50, (16, 24), 0, 3)
    moved = augmentation.apply(rows, images[rows])
    followed = augmentation.apply(rows, masks[rows].byte(), fill=1).bool()
    outside = moved[:, :1] == 0
    assert torch.equal(followed, (moved[:, :1] > 0.6) | outside)
    assert 0.02 < float(outside.float().mean()) < 0.2
    # By brute force: each image is shifted and mirrored by its own numbers, which depend on no other image.
    for number, row in enumerate(rows.tolist()):
        down, right = augmentation.shifts[row].tolist()
        padded = F.pad(images[row], (3, 3, 2, 2))
        expected = padded[:, 2 + down : 18 + down, 3 + right : 27 + right]
        expected = expected.flip(2) if augmentation.flips[row] else expected
        assert torch.equal(moved[number], expected)
    assert torch.equal(augmentation.apply(rows[3:4], images[rows[3:4]]), moved[3:4])
    assert len({tuple(shift) for shift in augmentation.shifts.tolist()}) > 15
    assert not torch.equal(augmentation.shifts, Augmentation("crop,flip", 50, (16, 24), 0, 4).shifts)


def test_backgrounds_resume_after_a_crash_and_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data, "CHUNK", 8)
    images = from_tensors(*halves(50))
    whole = find_backgrounds(images)
    first: list[float] = []

    def crash(done: float) -> None:
        first.append(done)
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_backgrounds(images, cache=tmp_path, progress=crash)
    (part,) = tmp_path.iterdir()
    with part.open("ab") as file:
        file.write(b"torn")
    second: list[float] = []
    resumed = find_backgrounds(images, cache=tmp_path, progress=second.append)
    assert second[0] == pytest.approx(first[-1] + 8 / 50), "the finished chunks are not found again"
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    rows = torch.tensor([49, 0, 17])
    for stored in (resumed, find_backgrounds(images, cache=tmp_path, progress=crash)):
        assert torch.equal(stored.masks(rows), whole.masks(rows))


def test_an_augmentation_of_nothing_returns_its_input() -> None:
    images, _ = halves(4)
    assert Augmentation("none", 4, (16, 12), 0, 0).apply(torch.arange(4), images) is images
