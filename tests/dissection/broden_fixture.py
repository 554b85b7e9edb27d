"""A concept set of twelve pictures, small enough to count every site by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

# Every example writes over the files of the one before.
LAW = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Pictures are 16 x 16 and masks 8 x 8, that is 64 sites. All twelve pictures are the same: red is 255 in the left
# half and 0 elsewhere; green is set in the top half, blue in the top left quarter. A unit that passes red on is
# therefore active at LEFT in every picture, and its IoU with a concept can be counted.
LEFT, TOP, QUARTER, LOWER = (np.zeros((8, 8), bool) for _ in range(4))
LEFT[:, :4] = True  # 32 sites
TOP[:4] = True  # 32 sites, 16 of them in LEFT
QUARTER[:4, :4] = True  # 16 sites, where LEFT and TOP meet
LOWER[4:, :4] = True  # 16 sites, the rest of LEFT
ALL = np.ones((8, 8), bool)  # 64 sites

# In category order, which is that of the columns: part of index.csv's header is `object, ..., material, ..., texture`.
CATEGORIES = ("object", "material", "texture")

# Number to name and label.csv's category field. Wood is labeled in two categories. Lamp is 300 = 44 + 256 * 1, so that
# bytes that overflow make it a door.
LABELS = {
    300: ("lamp", "object(4)"),
    1: ("wood", "material(2);object(1)"),
    2: ("sky", "object(5)"),
    3: ("cloth", "material(2)"),
    44: ("door", "object"),
    7: ("striped", "texture(2)"),
}

# (name, category) of each concept, by number and then in the order of CATEGORIES.
CONCEPTS = (
    ("wood", "object"),
    ("wood", "material"),
    ("sky", "object"),
    ("cloth", "material"),
    ("striped", "texture"),
    ("door", "object"),
    ("lamp", "object"),
)

# What lies where in each picture.
#   sky: LEFT, LEFT, TOP, QUARTER + LOWER = LEFT, ALL      -> 5 pictures, 32 + 32 + 32 + 32 + 64 = 192 sites
#   lamp: right half, LEFT, QUARTER, TOP                   -> 4 pictures, 32 + 32 + 16 + 32 = 112 sites
# IoU of red (12 x 32 = 384 active sites) with sky over all pictures: both hold 32 + 32 + 16 + 32 + 32 = 144 sites,
# so it is 144 / (384 + 192 - 144) = 1/3; over the 9 pictures where object is annotated 144 / (288 + 192 - 144) = 3/7.
CONTENTS: tuple[Mapping[tuple[str, str], NDArray[np.bool_]], ...] = (
    {("sky", "object"): LEFT},
    {("sky", "object"): LEFT, ("lamp", "object"): ~LEFT},
    {("sky", "object"): TOP, ("wood", "material"): QUARTER},
    {("door", "object"): TOP, ("lamp", "object"): LEFT},  # two planes; both labels lie at QUARTER
    {("sky", "object"): LEFT},  # two planes with a part each
    {("striped", "texture"): ALL},  # a label of the whole image and nothing else
    {},  # nothing annotated
    {("wood", "object"): LEFT, ("wood", "material"): TOP},
    {("cloth", "material"): TOP},  # from a mask of 4 x 4
    {("sky", "object"): ALL, ("lamp", "object"): QUARTER},  # the whole image and a plane in one cell
    {("cloth", "material"): LEFT, ("lamp", "object"): TOP},  # gray masks of 8 and of 16 bits
    {("striped", "texture"): ALL},  # object is annotated, and there is none
)

# Columns stand in an unusual order and with space around them; an item is a number or a mask's path.
INDEX = """\
sw, object ,image,split, material,ih,texture,iw,sh
8,00_object.png,00.png,train,,16,,16,8
8,01_object.png,01.png,val,,16,,16,8
8,02_object.png,02.png,train,02_material.png,16,,16,8
8,03_object_0.png;03_object_1.png,03.png,val,,16,,16,8
8,04_object_0.png; 04_object_1.png,04.png,train,,16,,16,8
8,,05.png,val,,16,7,16,8
8,,06.png,train,,16,,16,8
8,07_object.png,07.png,val,07_material.png,16,,16,8
8,,08.png,train,08_material.png,16,,16,8
8,2;09_object.png,09.png,val,,16,,16,8
8,10_object.png,10.png,train,10_material.png,16,,16,8
8,more/11_object.png,more/11.png,val,,16,7,16,8
"""


def twelve_images(folder: Path) -> Path:
    """Write the concept set that the constants of this file describe; `folder` is made."""
    images = folder / "images"
    (images / "more").mkdir(parents=True)
    (folder / "index.csv").write_text(INDEX, "utf-8")
    lines = [f"{number},{name},{category},1,1,\n" for number, (name, category) in LABELS.items()]
    header = "number,name,category,frequency,coverage,syns\n"
    (folder / "label.csv").write_text(header + "".join(lines), "utf-8")
    (folder / "category.csv").write_text(
        "name,first,last,count,frequency\nobject,1,300,4,9\nmaterial,1,3,2,4\ntexture,7,7,1,2\n", "utf-8"
    )
    picture = np.stack([LEFT, TOP, QUARTER], axis=2).repeat(2, 0).repeat(2, 1).astype(np.uint8) * 255
    for number in range(12):
        Image.fromarray(picture).save(images / ("more" if number == 11 else "") / f"{number:02d}.png")
    paint(images / "00_object.png", 2 * LEFT)
    paint(images / "01_object.png", np.where(LEFT, 2, 300))
    paint(images / "02_object.png", 2 * TOP)
    paint(images / "02_material.png", 1 * QUARTER)
    paint(images / "03_object_0.png", 44 * TOP)
    paint(images / "03_object_1.png", 300 * LEFT)
    paint(images / "04_object_0.png", 2 * QUARTER)
    paint(images / "04_object_1.png", 2 * LOWER)
    paint(images / "07_object.png", 1 * LEFT)
    paint(images / "07_material.png", 1 * TOP)
    paint(images / "08_material.png", 3 * TOP[::2, ::2])
    paint(images / "09_object.png", 300 * QUARTER)
    Image.fromarray((3 * LEFT).astype(np.uint8)).save(images / "10_material.png")
    Image.fromarray((300 * TOP).astype(np.uint16)).save(images / "10_object.png")
    paint(images / "more" / "11_object.png", 0 * TOP)
    return folder


def paint(path: Path, labels: NDArray[np.integer]) -> Path:
    """Write label numbers (H, W) as a mask: red is the lower byte, green the upper."""
    colors = np.zeros((*labels.shape, 3), np.uint8)
    colors[..., 0] = labels & 255
    colors[..., 1] = labels >> 8
    Image.fromarray(colors).save(path)
    return path


def gray(values: NDArray[np.integer]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def deep(values: NDArray[np.integer]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint16))


def palette(values: NDArray[np.integer]) -> Image.Image:
    image = gray(values).convert("P")  # gray levels become the indices of a gray palette
    image.putpalette(np.random.default_rng(0).permutation(256).repeat(3).astype(np.uint8).tobytes())
    image.frombytes(values.astype(np.uint8).tobytes())
    return image


def class_maps(count: int = 4, sides: tuple[int, int] = (12, 18)) -> list[NDArray[np.int64]]:
    """Class numbers 0 to 2 and 255 in blocks of 6 x 6."""
    generator = np.random.default_rng(1)
    blocks = generator.choice([0, 1, 2, 255], (count, sides[0] // 6, sides[1] // 6))
    return list(blocks.repeat(6, 1).repeat(6, 2))


def label_maps(largest: int = 65_535) -> st.SearchStrategy[NDArray[np.int64]]:
    def draw(height: int, width: int, few: int, seed: int) -> NDArray[np.int64]:
        generator = np.random.default_rng(seed)
        return generator.choice(generator.integers(0, largest + 1, few), (height, width))

    return st.builds(draw, st.integers(1, 9), st.integers(1, 9), st.integers(1, 80), st.integers(0, 2**32))
