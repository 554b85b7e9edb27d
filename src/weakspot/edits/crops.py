"""A classifier as a function of one rectangle of an image: only what the rectangle reaches is computed again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from weakspot.classifier import Classifier
from weakspot.edits.engine import Engine, edited_images, has_gradients, prepare
from weakspot.edits.windows import as_seen, gathered


@dataclass(frozen=True, eq=False)
class Crops:
    """A classifier as a function of one rectangle of each image, around which nothing changes.

    Attributes:
        classifier: of whole images.
        images: (N, C, H, W) the whole images.
        engine: computes only what the rectangles reach; None if the network cannot be recorded.
        owners: (M,) the image of each rectangle.
        tops: (M,) its first row.
        lefts: (M,) its first column.
    """

    classifier: Classifier
    images: Tensor
    engine: Engine | None
    owners: Tensor
    tops: Tensor
    lefts: Tensor

    def __len__(self) -> int:
        return len(self.owners)

    def select(self, chosen: Tensor) -> Crops:
        """Some of the rectangles, by number or by a bool mask (M,)."""
        return replace(self, owners=self.owners[chosen], tops=self.tops[chosen], lefts=self.lefts[chosen])

    def logits(self, patches: Tensor, rows: Tensor) -> Tensor:
        """(m, K) logits with patches (m, C, h, w) in the rectangles with these numbers (m,)."""
        places = self.owners[rows], self.tops[rows], self.lefts[rows]
        if self.engine is not None:
            return self.engine.edited(*places, patches)
        logits: Tensor = self.classifier(edited_images(self.images, *places, patches))
        return logits

    def whole(self, patches: Tensor) -> Tensor:
        """(M, C, H, W) the images with these patches (M, C, h, w)."""
        return edited_images(self.images, self.owners, self.tops, self.lefts, patches)

    def cut(self, maps: Tensor, size: tuple[int, int], owners: Tensor) -> Tensor:
        """(M, c, h, w) the rectangles, of this height and width, of the owners' maps (N, c, H, W)."""
        sites = maps.permute(0, 2, 3, 1).contiguous()
        return as_seen(gathered(sites, owners, self.tops, self.lefts, size), "maps").contiguous()


def bounding_boxes(masks: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Tops (M,), lefts (M,) and the common height and width of rectangles that hold the masks bool (M, H, W)."""
    starts, sizes = [], []
    # Which rows each mask touches, then which columns.
    for lines in (masks.any(2), masks.any(1)):
        length = lines.shape[1]
        # Of equal values argmax takes the first: the first line touched, and in the flipped ones the last.
        first = lines.float().argmax(1)
        last = length - 1 - lines.flip(1).float().argmax(1)
        # Of a mask that touches nothing, first and last would span every line.
        size = int((last - first).where(lines.any(1), 0).max()) + 1
        # A rectangle that is larger than its mask may have to begin earlier to end inside the image.
        starts.append(first.clamp(max=length - size))
        sizes.append(size)
    return starts[0], starts[1], (sizes[0], sizes[1])


def differentiable_engine(classifier: Classifier, images: Tensor) -> Engine | None:
    """The engine of these images, or None if the network cannot be recorded with its gradients."""
    prepared = prepare(classifier, images[:1])
    if prepared.recording is None:
        return None
    engine = Engine(prepared.recording, images, full_batch=128)
    return engine if has_gradients(engine, classifier, images[:1]) else None
