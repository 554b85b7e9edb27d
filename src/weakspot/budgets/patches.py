"""Images cut into patches, and the moments that structural similarity compares."""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, doi 10.1109/TIP.2003.819861, for images in [0, 1]
TINY = 1e-20


class Patches:
    """Images (N, C, H, W) as patches (N, C, rows, patch, columns, patch), zeros beyond the border, and their moments.

    Attributes:
        valid: 1 where there are pixels, broadcasting over patches.
        count: pixels in each patch.
        steady: (count - 1) c2.
        whole: whether no patch is cut at the border.
        has_single: whether the patch in the corner has only one pixel.
    """

    def __init__(self, images: Tensor, patch: int) -> None:
        self.patch = patch
        self.height, self.width = images.shape[2:]
        self.rows, self.columns = -(-self.height // patch), -(-self.width // patch)
        self.whole = not (self.height % patch or self.width % patch)
        self.has_single = self.height % patch == self.width % patch == 1
        self.valid = self.split(torch.ones_like(images[:1, :1]))
        self.count = self.total(self.valid)
        self.steady = (self.count - 1) * C2
        self.images = images

    @cached_property
    def mean(self) -> Tensor:
        return self.total(self.split(self.images)) / self.count

    @cached_property
    def centered(self) -> Tensor:
        return self.within(self.split(self.images) - self.mean)

    @cached_property
    def energy(self) -> Tensor:
        return self.total(self.centered.square())

    def split(self, images: Tensor) -> Tensor:
        below, beside = self.rows * self.patch - self.height, self.columns * self.patch - self.width
        if below or beside:
            images = F.pad(images, (0, beside, 0, below))
        return images.reshape(*images.shape[:2], self.rows, self.patch, self.columns, self.patch)

    def join(self, patches: Tensor) -> Tensor:
        whole = patches.reshape(*patches.shape[:2], self.rows * self.patch, self.columns * self.patch)
        return whole[:, :, : self.height, : self.width]

    def total(self, patches: Tensor) -> Tensor:
        """Sum over the pixels of each patch."""
        # Axes 3 and 5 are the rows and columns within a patch.
        return patches.sum(5, keepdim=True).sum(3, keepdim=True)

    def within(self, patches: Tensor) -> Tensor:
        """The same with zeros beyond the border."""
        return patches if self.whole else patches * self.valid

    def parts(self, changed: Tensor) -> tuple[Tensor, Tensor]:
        """The change of each patch's mean, and of its centered part."""
        mean = self.total(changed) / self.count
        return mean, self.within(changed - mean)

    def denominators(self, mean: Tensor, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Those of d1^2 and d2^2, for these changes of mean and centered part."""
        energy = self.total((self.centered + centered).square())
        return self.mean.square() + (self.mean + mean).square() + C1, self.energy + energy + self.steady

    def distances(self, changed: Tensor) -> tuple[Tensor, Tensor]:
        """d1^2 and d2^2 of every patch and channel."""
        mean, centered = self.parts(changed)
        level, structure = self.denominators(mean, centered)
        # Of a patch of one pixel both parts of d2^2 are zero; it then counts as zero.
        return mean.square() / level, self.total(centered.square()) / structure.clamp(min=TINY)

    def in_box(self, perturbation: Tensor, region: Tensor | None) -> Tensor:
        """The perturbation cut to the box and to the region."""
        inside = (self.images + perturbation).clamp_(0, 1).sub_(self.images)
        return inside if region is None else torch.where(region, inside, 0)

    def slope(self, gradient: Tensor) -> Tensor:
        """The gradient as patches, divided by its largest entry so that no square underflows."""
        largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        return self.split(gradient / largest)


def by_patch(patches: Tensor) -> Tensor:
    """(N, C, rows, columns, patch, patch), a view of (N, C, rows, patch, columns, patch)."""
    return patches.permute(0, 1, 2, 4, 3, 5)
