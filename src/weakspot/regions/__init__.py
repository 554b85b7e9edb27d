"""Regions: where an attack may act. Boolean masks (N, 1, H, W), combined by `&`, `|` and `~`, and their controls."""

from weakspot.regions.activation import cam, important_superpixels, support
from weakspot.regions.masks import border, from_file, matched, superpixels, top
from weakspot.regions.segmentation import background
from weakspot.regions.spec import RegionSpec, read_region

__all__ = [
    "RegionSpec",
    "background",
    "border",
    "cam",
    "from_file",
    "important_superpixels",
    "matched",
    "read_region",
    "superpixels",
    "support",
    "top",
]
