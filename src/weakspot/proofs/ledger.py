"""What is known of each pixel so far: its status, bounds, refuting color, and the boxes that prove it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from weakspot.proofs.certificate import PROVEN, REFUTED, UNKNOWN, ColorBoxes


@dataclass(eq=False)
class Ledger:
    """What is known of the pixels of N images; sites are numbers of pixels over all images, in reading order.

    Attributes:
        images: (N, C, H, W) float32.
        labels: (N,).
        region: bool (N, 1, H, W).
        low: (N, C, H, W) float64, the lowest allowed value of each channel.
        high: (N, C, H, W) float64, the highest.
        status: (N * H * W,) int8, as in `PixelCertificate`; so are the following.
        lower_bound: (N * H * W,) float64.
        color: (N * H * W, C).
        predicted: (N * H * W,).
        reason: (N * H * W,) int16: each image may have a reason of its own.
        reasons: in words.
        boxes: of the proven pixels.
    """

    images: Tensor
    labels: Tensor
    region: Tensor
    low: Tensor
    high: Tensor
    status: Tensor = field(init=False)
    lower_bound: Tensor = field(init=False)
    color: Tensor = field(init=False)
    predicted: Tensor = field(init=False)
    reason: Tensor = field(init=False)
    reasons: list[str] = field(default_factory=list)
    boxes: list[ColorBoxes] = field(default_factory=list)

    def __post_init__(self) -> None:
        sites = self.region.numel()
        self.status = torch.full((sites,), UNKNOWN, dtype=torch.int8)
        self.lower_bound = torch.full((sites,), -torch.inf, dtype=torch.float64)
        # (N * H * W, C): the channels of each site, in reading order.
        self.color = self.images.permute(0, 2, 3, 1).reshape(sites, -1).clone()
        self.predicted = torch.full((sites,), -1)
        self.reason = torch.full((sites,), -1, dtype=torch.int16)

    @property
    def pixels_per_image(self) -> int:
        return self.images.shape[2] * self.images.shape[3]

    def open_sites(self, image: int | None = None) -> Tensor:
        """Sites of the region, of one image or of all, that are neither proven nor refuted."""
        sites = ((self.status == UNKNOWN) & self.region.flatten()).nonzero()[:, 0]
        return sites if image is None else sites[sites // self.pixels_per_image == image]

    def unexplained(self, image: int) -> Tensor:
        """Open sites of an image without a reason."""
        sites = self.open_sites(image)
        return sites[self.reason[sites] < 0]

    def locate(self, sites: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of sites."""
        width = self.images.shape[3]
        inside = sites % self.pixels_per_image
        return sites // self.pixels_per_image, inside // width, inside % width

    def sites_of(self, pixels: Tensor) -> Tensor:
        """Sites of pixels (M, 3), each an image, a row and a column."""
        return pixels @ torch.tensor([self.pixels_per_image, self.images.shape[3], 1])

    def box(self, sites: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest allowed color (M, C) of sites."""
        owners, rows, columns = self.locate(sites)
        return self.low[owners, :, rows, columns], self.high[owners, :, rows, columns]

    def refute(self, sites: Tensor, colors: Tensor, predicted: Tensor) -> None:
        """Note a color (M, C) of each site that changes the decision."""
        self.status[sites] = REFUTED
        self.color[sites], self.predicted[sites] = colors.to(self.color), predicted
        self.reason[sites] = -1

    def prove(self, boxes: ColorBoxes) -> None:
        """Note boxes that cover all allowed colors of the pixels that they name, in all of which nothing flips."""
        sites = self.sites_of(boxes.pixels)
        self.boxes.append(boxes)
        self.status[sites] = PROVEN
        self.reason[sites] = -1
        # The worst box bounds a pixel; an earlier bound of all its colors at once holds as well, and the larger counts.
        lowest = torch.full_like(self.lower_bound, torch.inf).scatter_reduce(0, sites, boxes.bound, "amin")
        self.lower_bound[sites] = torch.maximum(lowest, self.lower_bound)[sites]

    def give_up(self, sites: Tensor, reason: str) -> None:
        """Note why sites stay unknown."""
        if not len(sites):
            return
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.reason[sites] = self.reasons.index(reason)
