"""How an activation represents a map of the image: which axes are height, width and units, or which tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ASPECT_TOLERANCE = 0.2  # how far the aspect ratio of a map may be from that of the image
LARGEST_PREFIX = 8  # class, distillation and register tokens before the patches


@dataclass(frozen=True)
class Layout:
    """How an activation represents a map of the image.

    Attributes:
        kind: "channels_first" (N, C, h, w), "channels_last" (N, h, w, C) or "tokens" (N, prefix + h w, C).
        height: of the map, in cells.
        width: of the map, in cells.
        prefix: tokens before the first patch.
    """

    kind: str
    height: int
    width: int
    prefix: int = 0

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the map."""
        return self.height, self.width

    def maps(self, activation: Tensor) -> Tensor:
        """The activation as (N, C, h, w)."""
        if self.kind == "channels_last":
            return activation.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            patches = activation[:, self.prefix :].transpose(1, 2)
            return patches.reshape(*patches.shape[:2], self.height, self.width)
        return activation

    @staticmethod
    def of(activation: Tensor, image: Tensor) -> Layout | None:
        """The layout whose cells have the image's aspect ratio, or None if there is none."""
        aspect = image.shape[-2] / image.shape[-1]
        if activation.ndim == 4:
            _, first, second, third = activation.shape
            if second * third == 1:
                return None
            # Before the aspect ratios, because a number of channels can have a better one by chance.
            if _tiles(second, third, image):
                return Layout("channels_first", second, third)
            orders = {"channels_first": (second, third), "channels_last": (first, second)}
            fitting = {kind: cells for kind, cells in orders.items() if _has_aspect(*cells, aspect)}
            if fitting:
                kind = min(fitting, key=lambda kind: abs(fitting[kind][0] / fitting[kind][1] / aspect - 1))
                return Layout(kind, *fitting[kind])
        if activation.ndim == 3:
            for prefix in range(LARGEST_PREFIX + 1):
                patches = activation.shape[1] - prefix
                height = round((max(patches, 0) * aspect) ** 0.5)
                if height and patches % height == 0 and _tiles(height, patches // height, image):
                    return Layout("tokens", height, patches // height, prefix)
        return None


def unit_axis(activation: Tensor, images: Tensor) -> int:
    """The axis of an activation that numbers the units; the second if it has no map."""
    layout = Layout.of(activation, images)
    return activation.ndim - 1 if layout is not None and layout.kind != "channels_first" else 1


def _has_aspect(height: int, width: int, aspect: float) -> bool:
    # A grid of a few cells cannot match an aspect ratio closely: one cell more or less is always accepted.
    exact = height * width > 1 and abs(height / width / aspect - 1) <= ASPECT_TOLERANCE
    rounded = height * width > 1 and min(abs(height - width * aspect), abs(width - height / aspect)) < 1
    return exact or rounded


def _tiles(height: int, width: int, image: Tensor) -> bool:
    """Whether patches of one size, the last ones dropped or padded, divide the image into this grid."""
    if height * width <= 1:
        return False
    sides = ((image.shape[-2], height), (image.shape[-1], width))
    # One patch side p fits both axes: floor(side / p) = cells if the rest is cut off, ceil if it is padded.
    cut = max(side / (cells + 1) for side, cells in sides) < min(side / cells for side, cells in sides)
    filled = max(side / cells for side, cells in sides) < min(
        side / max(cells - 1, 1e-9) for side, cells in sides
    )
    return cut or filled
