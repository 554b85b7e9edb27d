"""Demo textures: a concept set of colors and textures that is drawn, not collected, so that it needs no data."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weakspot._checks import check_count, check_seed
from weakspot.dissection.broden_files import (
    Entry,
    draft_folder,
    half,
    label_fractions,
    nearest,
    write_labels,
    write_tables,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Generator = np.random.Generator

# The eleven basic color terms of Berlin and Kay (1969), each with a color that has no other name.
COLORS: Mapping[str, tuple[int, int, int]] = {
    "black": (18, 18, 20),
    "white": (242, 242, 238),
    "red": (204, 28, 34),
    "green": (36, 148, 58),
    "yellow": (246, 222, 38),
    "blue": (32, 78, 204),
    "brown": (112, 66, 30),
    "purple": (122, 42, 156),
    "pink": (246, 158, 192),
    "orange": (246, 132, 20),
    "gray": (132, 132, 134),
}
DISTINCT = 0.45  # least distance in RGB of two colors in one texture; a smaller one is hardly visible
JITTER = 0.03  # by which colors of one term differ
FADING = 0.12  # largest fraction of the first color in the second: contrast varies and color terms stay true
PERIODS = (0.05, 0.12)  # of a texture, as fractions of the image's side
PLAIN = 0.15  # fraction of the regions without a texture
LARGEST_SIZE = 4096
FINER = 2  # pictures are drawn this many times larger and averaged, for edges as a camera sees them


def striped(u: Floats, v: Floats, generator: Generator) -> Bools:  # noqa: ARG001 - all textures have one signature
    """Parallel bands."""
    return u % 1 < generator.uniform(0.35, 0.65)


def dotted(u: Floats, v: Floats, generator: Generator) -> Bools:
    """Disks, every other row shifted by half a step."""
    across = (u + 0.5 * (np.floor(v) % 2)) % 1 - 0.5
    return np.asarray(np.hypot(across, v % 1 - 0.5) < generator.uniform(0.26, 0.38))


def checkered(u: Floats, v: Floats, generator: Generator) -> Bools:  # noqa: ARG001
    """Squares of a chessboard."""
    return np.asarray((np.floor(u * 1.4) + np.floor(v * 1.4)) % 2 == 0)


def grid(u: Floats, v: Floats, generator: Generator) -> Bools:
    """Thin crossing lines."""
    width = generator.uniform(0.16, 0.26)
    return (u % 1 < width) | (v % 1 < width)


def ringed(u: Floats, v: Floats, generator: Generator) -> Bools:
    """Rings around one center."""
    return np.hypot(u, v) % 1 < generator.uniform(0.4, 0.6)


def zigzagged(u: Floats, v: Floats, generator: Generator) -> Bools:
    """Zigzag bands."""
    bends = np.abs(u * 0.6 % 1 - 0.5) * generator.uniform(2.2, 3.2)
    return (v + bends) % 1 < generator.uniform(0.4, 0.6)


def speckled(u: Floats, v: Floats, generator: Generator) -> Bools:
    """Small grains in random places."""
    grains = generator.random((64, 64)) < generator.uniform(0.25, 0.45)
    return grains[(np.floor(u * 5) % 64).astype(np.int64), (np.floor(v * 5) % 64).astype(np.int64)]


def blotchy(u: Floats, v: Floats, generator: Generator) -> Bools:
    """Round patches in random places: where a sum of waves in random directions is high."""
    angles, phases = generator.uniform(0, 2 * np.pi, (2, 14))
    rates = generator.uniform(0.3, 0.75, 14) * 2 * np.pi
    waves = np.cos(
        (np.outer(np.cos(angles), u) + np.outer(np.sin(angles), v)) * rates[:, None] + phases[:, None]
    )
    return np.asarray(waves.sum(0) > generator.uniform(-0.5, 1.5))


Texture = Callable[[Floats, Floats, Generator], Bools]
# Whether the second color is at (u, v), coordinates in periods along and across the texture.
TEXTURES: tuple[Texture, ...] = (striped, dotted, checkered, grid, ringed, zigzagged, speckled, blotchy)


def demo_concepts(out: Path | str, *, count: int = 96, size: int = 224, seed: int = 0) -> Path:
    """Draw a concept set of colors and textures, which needs no data and no network connection.

    Each picture consists of regions. A region is plain or has a texture of two colors at a random scale and
    orientation, with shading and grain. The category "color" has the eleven basic color terms of Berlin and Kay (1969,
    Basic Color Terms), "texture" has `TEXTURES`; masks give both for each site.

    Args:
        out: the folder to create, which `ConceptSet.open` reads.
        count: number of pictures; a larger number does not change the first ones.
        size: height and width of the pictures, 16 to 4096.
        seed: integer of at least 0.

    Returns:
        The path `out`.

    Raises:
        ValueError: if an argument is invalid, or `out` is not empty.
    """
    check_seed(seed)
    check_count("seed", seed, least=0)
    check_count("count", count)
    check_count("size", size, least=16)
    if size > LARGEST_SIZE:
        raise ValueError(f"size must be at most {LARGEST_SIZE}, got {size}")
    out = Path(out).absolute()
    colors = dict(enumerate(COLORS, 1))
    textures = dict(enumerate((texture.__name__ for texture in TEXTURES), len(colors) + 1))
    shape = half((size, size))
    entries = []
    with draft_folder(out) as draft:
        for index in range(count):
            # A generator for each picture, so that none depends on the others or on their number.
            picture, color, texture = draw(size, np.random.default_rng([seed, index]))
            name = f"{index:05d}"
            planes = {
                "color": nearest(color, shape),
                # Textures are numbered after the colors; "no texture" stays 0.
                "texture": nearest(np.where(texture > 0, texture + len(colors), 0), shape),
            }
            for category, labels in planes.items():
                write_labels(draft / "images" / f"{name}_{category}.png", labels)
            Image.fromarray(picture).save(draft / "images" / f"{name}.png")
            fractions = label_fractions(planes["color"]) | label_fractions(planes["texture"])
            cells = {category: f"{name}_{category}.png" for category in planes}
            entries.append(Entry(f"{name}.png", (size, size), shape, cells, fractions))
        write_tables(draft, {"color": colors, "texture": textures}, entries)
    return out


def draw(size: int, generator: Generator) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """A picture (size, size, 3), and at `FINER` times its size the numbers of color and texture, from 1.

    Texture 0 means no texture.
    """
    side = size * FINER
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    # Every random number comes from one generator in a fixed order: a changed order changes all pictures.
    regions = _regions(rows, columns, generator)
    prototypes = np.array(list(COLORS.values())) / 255
    distances = np.linalg.norm(prototypes[:, None] - prototypes, axis=2)
    paint = np.empty((side, side, 3))
    color, texture = np.empty((2, side, side), np.int64)
    for region in range(regions.max() + 1):
        inside = regions == region
        y, x = rows[inside], columns[inside]
        first = int(generator.integers(len(COLORS)))
        second = int(generator.choice((distances[first] > DISTINCT).nonzero()[0]))
        chosen = 0 if generator.random() < PLAIN else int(generator.integers(len(TEXTURES))) + 1
        on = np.zeros(len(y), bool)
        if chosen and len(y):
            on = TEXTURES[chosen - 1](*_coordinates(y, x, generator), generator)
        own = prototypes[[first, second]] + generator.uniform(-JITTER, JITTER, (2, 3))
        # The second color fades toward the first.
        own[1] += generator.uniform(0, FADING) * (own[0] - own[1])
        # Shading: a random brightness with a random linear slope.
        tilt = generator.uniform(-0.25, 0.25, 2)
        light = generator.uniform(0.92, 1.04) + (y - 0.5) * tilt[0] + (x - 0.5) * tilt[1]
        paint[inside] = own[on.astype(np.int64)] * light[:, None]
        color[inside] = np.where(on, second, first) + 1
        texture[inside] = chosen
    # Average FINER x FINER blocks, then add grain of a random strength.
    picture = paint.reshape(size, FINER, size, FINER, 3).mean((1, 3))
    picture += generator.normal(0, generator.uniform(0.005, 0.025), picture.shape)
    return np.rint(picture.clip(0, 1) * 255).astype(np.uint8), color, texture


def _coordinates(y: Floats, x: Floats, generator: Generator) -> tuple[Floats, Floats]:
    """Positions in a region in periods of a texture: scaled, shifted to near its middle and rotated."""
    # The logarithm of the period is uniform, so fine and coarse textures are equally frequent.
    angle, period = generator.uniform(0, np.pi), np.exp(generator.uniform(*np.log(PERIODS)))
    down, right = (
        (side - side.mean() + generator.uniform(-0.5, 0.5) * side.std()) / period for side in (y, x)
    )
    return right * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - right * np.sin(angle)


def _regions(rows: Floats, columns: Floats, generator: Generator) -> NDArray[np.int64]:
    """The region of each pixel: that of the nearest of a few points, or one of several ellipses on a background."""
    count = int(generator.integers(3, 7))
    middles = generator.uniform(0.1, 0.9, (count, 2))
    if generator.random() < 0.5:
        away = [np.hypot(rows - y, columns - x) for y, x in middles]
        return np.asarray(np.argmin(away, axis=0))
    regions = np.zeros(rows.shape, np.int64)
    # One ellipse less than points, because the background, 0, is a region too.
    for number, (y, x) in enumerate(middles[:-1], 1):
        angle, (long, short) = generator.uniform(0, np.pi), generator.uniform(0.16, 0.34, 2)
        along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        regions[(along / long) ** 2 + (across / short) ** 2 < 1] = number
    return regions
