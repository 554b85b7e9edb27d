"""Donors: the other images of a run whose regions serve as controls for an image's own.

A region that is made from an image (its class activation, its background) often lies in the middle, where most attacks
do most. A copy shifted elsewhere has the same area but not the same habit; the region of another image has both.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.audit.plan.image_list import entries
from weakspot.audit.work.shard_images import Opened, open_entries

if TYPE_CHECKING:
    import pyarrow as pa

    from weakspot.classifier import Classifier


TRIED = 50  # other images at most, for one image and region
AREA = 0.1  # by how much of the own area a control's may differ: donors are chosen, their regions left as they are
MEMORY = 64 * 2**20  # bytes of regions that are remembered

Make = Callable[[Opened], Tensor | None]


class Donors:
    """Draws other images of a run for each image, and remembers their regions.

    The draw follows from the seed, the content of the image and the list of images, so that it does not depend on
    shards, batches, or workers.

    Args:
        listing: of all images of the run.
        classifier: at whose input size images are opened.
        seed: of the draws.
    """

    def __init__(self, listing: pa.Table, classifier: Classifier, seed: int) -> None:
        self.listing, self.classifier, self.seed = listing, classifier, seed
        self.remembered: OrderedDict[tuple[str, int], tuple[str, NDArray[np.uint8]] | None] = OrderedDict()
        self.bytes = 0

    def regions(
        self, text: str, make: Make, content: str, own: Tensor, count: int
    ) -> tuple[list[Tensor], list[str]]:
        """The regions of the first `count` donors of one image, fewer if there are not as many.

        Images that cannot be read, of which the region cannot be made, that are the image itself, or whose region's
        area is not within a tenth of the own one are passed over.

        Args:
            text: of the region.
            make: the region (1, 1, H, W) of one opened image, or None.
            content: digest of the image.
            own: bool (1, H, W), its own region.
            count: how many.

        Returns:
            The regions, and the names of donors whose files are missing: once they are back, others may be drawn.
        """
        area = int(own.sum())
        found: list[Tensor] = []
        missing: list[str] = []
        for index in self._order(content):
            if len(found) == count:
                break
            known = self._region(text, make, index, missing)
            if known is None or known[0] == content:
                continue
            mask = np.unpackbits(known[1], count=own.numel()).reshape(tuple(own.shape)).astype(bool)
            if abs(int(mask.sum()) - area) <= AREA * area:
                found.append(torch.from_numpy(mask).to(own.device))
        return found, missing

    def _order(self, content: str) -> Iterator[int]:
        digest = hashlib.blake2b(content.encode(), digest_size=16, key=str(self.seed).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest))
        return iter(rng.permutation(len(self.listing))[:TRIED].tolist())

    def _region(
        self, text: str, make: Make, index: int, missing: list[str]
    ) -> tuple[str, NDArray[np.uint8]] | None:
        """Digest of an image and its region, packed."""
        key = (text, index)
        if key in self.remembered:
            self.remembered.move_to_end(key)
            return self.remembered[key]
        # One image at a time: its region must not depend, in the last bit, on what it is computed with.
        opened = open_entries(entries(self.listing, index, 1), self.classifier)
        if opened.missing:
            missing.append(opened.missing[0][0])
            return None
        mask = make(opened) if opened.entries else None
        known = None if mask is None else (opened.contents[0], np.packbits(mask.cpu().numpy()))
        self.remembered[key] = known
        self.bytes += 0 if known is None else known[1].nbytes
        while self.bytes > MEMORY:
            _, oldest = self.remembered.popitem(last=False)
            self.bytes -= 0 if oldest is None else oldest[1].nbytes
        return known
