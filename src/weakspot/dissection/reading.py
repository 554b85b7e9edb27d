"""Reading: a concept set batch by batch, images as the network takes them and masks cut likewise."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from weakspot.dissection.broden import Annotation, ConceptSet
from weakspot.images import open_pictures


def image_batches(
    concepts: ConceptSet, size: tuple[int, int], channels: int, batch: int, *, annotated: bool
) -> Iterator[tuple[Tensor, list[Annotation]]]:
    """Images (n, C, H, W) in order, and with them their annotations at half the images' size.

    The next batch is read while the one before is worked on.

    Args:
        concepts: the data set.
        size: height and width that images are cropped and resized to.
        channels: 1 or 3.
        batch: images at once.
        annotated: whether annotations are wanted; else the lists are empty.

    Raises:
        ValueError: when an image cannot be read, naming it.
    """
    starts = range(0, len(concepts), batch)

    def read(start: int) -> tuple[Tensor, list[Annotation]]:
        rows = range(start, min(start + batch, len(concepts)))
        images = torch.stack([picture(concepts, row, size, channels) for row in rows])
        grid = (max(1, size[0] // 2), max(1, size[1] // 2))
        return images, [_cut(concepts.annotation(row), grid) for row in rows] if annotated else []

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, starts[0])
        for following in [*starts[1:], None]:
            ready = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            yield ready


def picture(concepts: ConceptSet, row: int, size: tuple[int, int], channels: int) -> Tensor:
    """One image (C, H, W), cropped and resized as the network takes it."""
    path = concepts.image(row)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the image that {concepts.folder / 'index.csv'} names is not there")
    (picture,) = open_pictures(path, size=size, channels=channels)
    if picture.pixels is None:
        raise ValueError(f"{path}: {picture.remark.removesuffix('; skipped')}")
    return picture.pixels


def _cut(annotation: Annotation, size: tuple[int, int]) -> Annotation:
    """The annotation with its masks cropped at their centre to the shape of `size`, and nearest sites of that size."""
    places = []
    sides = annotation.masks.shape[1:]
    scale = min(side / wanted for side, wanted in zip(sides, size, strict=True))
    for side, wanted in zip(sides, size, strict=True):
        centres = (side - wanted * scale) / 2 + (torch.arange(wanted) + 0.5) * scale
        places.append(centres.floor().long().clamp(0, side - 1))
    return replace(annotation, masks=annotation.masks[:, places[0][:, None], places[1]])
