"""Thumbnails of a run's images: clean, adversarial and importance, as data URLs with a caption."""

import io
from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from weakspot.audit.findings.weak_places import ESTIMATE, WeakPlaces, strength
from weakspot.audit.page.elements import Row, Thumbnail, heading
from weakspot.audit.store.run import Run
from weakspot.audit.store.stored_maps import StoredMap
from weakspot.report.rendering import color_table, data_url
from weakspot.statistics.number_format import number, percent

MAPS = ("clean", "adversarial", "importance")
MAX_SIDE = 128  # pixels of the longer side
EXACT = 64  # pixels up to which a picture is stored without loss and drawn with square pixels
OUTLINE = (213, 94, 0)
OPACITY = 0.6  # of the color over the photograph


def thumbnails(run: Run, images: pd.DataFrame, *, by_size: bool) -> list[Thumbnail]:
    """Thumbnails of the rows of `Extremes.easiest` or `Extremes.hardest`."""
    stored = run.maps
    maps: dict[str, StoredMap] = {name: stored[name] for name in MAPS if name in set(stored)}
    labels = [attack.label for attack in run.plan.attacks]
    result = []
    for row in images.to_dict("records"):
        attack, region = labels.index(row["attack"]), run.plan.regions.index(row["region"])
        pictures, small = _pictures(maps, int(row["index"]), attack, region)
        result.append(Thumbnail(str(row["image"]), _caption(row, by_size=by_size), pictures, small))
    return result


def square_thumbnails(run: Run, places: WeakPlaces, count: int) -> list[Thumbnail]:
    """The images with the smallest squares, each square outlined, beside the estimate for each cell."""
    stored, result = run.maps, []
    if not {"clean", ESTIMATE} <= set(stored):
        return []
    for row in places.squares[places.squares["side"].notna()].head(count).to_dict("records"):
        image, side = int(row["index"]), int(row["side"])
        clean = pixels_of(stored["clean"][image])
        drawn = strength(stored[ESTIMATE][image, *places.cell].astype(np.float32))
        outlined = _outlined(clean, int(row["left"]), int(row["top"]), side)
        pictures = [("the square, outlined", outlined)]
        if drawn.max() > 0:
            pictures.append(("estimate: brighter needs less", encoded(_overlaid(clean, drawn), clean)))
        caption = f"{side} x {side} pixels, {percent(row['fraction'])} of the image"
        result.append(Thumbnail(str(row["image"]), caption, pictures, max(clean.shape[:2]) <= EXACT))
    return result


def _outlined(clean: NDArray[np.uint8], left: int, top: int, side: int) -> str:
    """The picture with a square outlined, enlarged so that the line covers no pixel of a small one."""
    scale = max(1, MAX_SIDE // max(clean.shape[:2]))
    picture = Image.fromarray(clean.repeat(scale, 0).repeat(scale, 1))
    box = (scale * left - 1, scale * top - 1, scale * (left + side), scale * (top + side))
    ImageDraw.Draw(picture).rectangle(box, outline=OUTLINE, width=max(2, max(picture.size) // 100))
    return encoded(np.asarray(picture), np.asarray(picture))


def _pictures(
    maps: Mapping[str, StoredMap], image: int, attack: int, region: int
) -> tuple[list[tuple[str, str]], bool]:
    """(title, data URL) of the stored pictures of an image, and whether its pixels are drawn as squares."""
    if not {"clean", "adversarial"} <= set(maps):
        return [], False
    clean = pixels_of(maps["clean"][image])
    pictures = [
        ("clean", encoded(clean, clean)),
        ("adversarial", encoded(pixels_of(maps["adversarial"][image, attack, region]), clean)),
    ]
    if "importance" in maps:
        values = np.nan_to_num(maps["importance"][image, attack, region], nan=0, posinf=0, neginf=0)
        if values.max(initial=0) > 0:
            pictures.append(("importance", encoded(_overlaid(clean, values), clean)))
        else:
            pictures.append(("no evidence for the label, so no importance is drawn", ""))
    return pictures, max(clean.shape[:2]) <= EXACT


def pixels_of(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(C, H, W) of 8 bits as (H, W, 3); other channel counts than three are drawn as their gray mean."""
    if len(levels) == 3:
        return np.ascontiguousarray(levels.transpose(1, 2, 0))
    return np.repeat(np.rint(levels.mean(0))[..., None], 3, axis=2).astype(np.uint8)


def _overlaid(pixels: NDArray[np.uint8], importance: NDArray[np.floating]) -> NDArray[np.uint8]:
    """A map (h, w) with a value above zero in color, from zero to its largest value, over the picture in gray."""
    gray = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"), dtype=np.float32)
    values = importance.clip(min=0)
    levels = np.rint(values * (255 / float(values.max()))).astype(np.uint8)
    colors = Image.fromarray(color_table("magnitude")[levels])
    # Nearest neighbor: smoothing would invent detail that the map does not have.
    colors = colors.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
    mixed = (1 - OPACITY) * gray + OPACITY * np.asarray(colors, dtype=np.float32)
    return np.rint(mixed).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8], clean: NDArray[np.uint8]) -> str:
    """A data URL: lossless if the image is small, else a reduced JPEG."""
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(clean.shape[:2]) <= EXACT:
        picture.save(buffer, "PNG", optimize=True)
        return data_url("image/png", buffer.getvalue())
    if max(picture.size) > MAX_SIDE:
        # As sharp as the eye can tell at this size, in half the time of Lanczos.
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.HAMMING)
    picture.save(buffer, "JPEG", quality=80)
    return data_url("image/jpeg", buffer.getvalue())


def _caption(row: Row, *, by_size: bool) -> str:
    label = _class_name(row, "label_name")
    cell = heading(row["attack"], row["region"])
    margin = f"margin {number(row['margin_adversarial'])}"
    if not row["fooled"]:
        rounded = " after rounding to 8 bits" if row["success"] else ""
        return f"{label} withstood {cell}{rounded}; {margin}"
    if not row["success"]:
        return f"{label} fooled by {cell} after rounding to 8 bits; {margin}"
    measured = f"L2 {number(row['value'])}" if by_size else margin
    return f"{label} → {_class_name(row, 'adversarial_class_name')} under {cell}; {measured}"


def _class_name(row: Mapping[Hashable, object], key: str) -> str:
    name = row[key]
    return name if isinstance(name, str) else "no name"
