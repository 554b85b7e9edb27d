"""Regions: where. Boolean masks (N, 1, H, W), combined with `&`, `|` and `~`, and controls of equal area."""

from weakspot.regions.activation import cam, support
from weakspot.regions.backgrounds import background
from weakspot.regions.controls import matched
from weakspot.regions.files import from_file
from weakspot.regions.frames import border
from weakspot.regions.reading import read_region
from weakspot.regions.segments import superpixels
from weakspot.regions.shares import top

__all__ = [
    "background",
    "border",
    "cam",
    "from_file",
    "matched",
    "read_region",
    "superpixels",
    "support",
    "top",
]
