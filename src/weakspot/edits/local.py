"""LocalEdits: exact logits of an image under many small edits, by whichever way is faster.

How much work windows save, by counting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from weakspot._checks import check_batch_size, check_range
from weakspot.classifier import Classifier, check_images, check_logits, default_batch, evaluating, predict
from weakspot.edits.activations import FUSED, without_growth
from weakspot.edits.engine import Engine, Prepared, edited_images, evenly, prepare
from weakspot.edits.recording import CannotRecordError, Recording
from weakspot.fusion import fused

LARGEST_CHUNK = 256
RANKS = 6  # of nearness to the border, down and along, at most
Progress = Callable[[float], None]


@dataclass
class _Seconds:
    """What each way took for one edit, where it was tried."""

    of: dict[bool, float] = field(default_factory=dict)
    warm: set[bool] = field(default_factory=set)


class Edits:
    """Logits of several images under edits that are each confined to one window.

    Recomputing windows costs less than whole images for most networks and small edits, and more for some: where
    there are many edits, both ways do a share of them, once for each size of window, and the faster does the rest.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        windows: None to choose by measuring; True or False to have one way only, for tests and benchmarks.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: Tensor,
        prepared: Prepared | None = None,
        *,
        batch_size: int | None = None,
        windows: bool | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.classifier, self.images, self.windows = classifier, images, windows
        self.prepared = prepare(classifier, images[:1]) if prepared is None else prepared
        usual, largest = default_batch(images), batch_size or 2**30
        self._whole_batch = min(usual, largest)
        at_once, whole = (
            (24 * usual, LARGEST_CHUNK // 2) if images.device.type == "cpu" else (16 * usual, 4 * usual)
        )
        self._chunk = min(at_once, LARGEST_CHUNK, largest)
        self._seconds: dict[tuple[int, int], _Seconds] = {}
        self._engine = None
        if self.prepared.recording is not None:
            self._engine = Engine(
                self.prepared.recording, images, full_batch=min(whole, LARGEST_CHUNK // 2, largest)
            )

    def logits(
        self,
        owners: Tensor,
        tops: Tensor,
        lefts: Tensor,
        patches: Tensor,
        progress: Progress | None = None,
    ) -> Tensor:
        """(M, K) logits with patches (M, C, h, w) at (tops, lefts) of the images numbered `owners`, each (M,)."""
        found: list[Tensor] = []
        done, count = 0, len(owners)
        order = self._in_order_of_reach(tops, lefts, patches)
        while done < count:
            by_windows = self._next_way(patches, count - done)
            rows = order[done : done + evenly(count - done, self._chunk if by_windows else self._whole_batch)]
            begun = _now(patches)
            found.append(self._part(by_windows, owners[rows], tops[rows], lefts[rows], patches[rows]))
            self._note(by_windows, patches, len(rows), _now(patches) - begun)
            done += len(rows)
            if progress is not None:
                progress(done / count)
        logits = torch.cat(found)[order.argsort()]
        check_logits(logits, self.classifier, self.images)
        return logits

    def _in_order_of_reach(self, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
        """(M,) edits as near to a border as each other together: their windows are cut off alike."""
        ranks: list[Tensor] = []
        number = round(min(RANKS, max(1.0, math.sqrt(len(tops) / self._chunk))))
        for starts, length, size in (
            (tops, patches.shape[2], self.images.shape[2]),
            (lefts, patches.shape[3], self.images.shape[3]),
        ):
            depth = torch.minimum(starts, size - length - starts)
            ranks.append(depth * 2 * number // size)
        return (ranks[0] * number + ranks[1]).argsort(stable=True)

    def clean_logits(self) -> Tensor:
        """(N, K) of the unedited images."""
        if self._engine is not None:
            return self._engine.logits
        with fused(self.classifier, self.images[:1]):
            return predict(self.classifier, self.images, self._whole_batch)

    def _part(self, by_windows: bool, owners: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
        if by_windows and self._engine is not None:
            try:
                logits = self._engine.edited(owners, tops, lefts, patches)
                if len(logits) == len(owners):
                    return logits
            except (
                RuntimeError,
                LookupError,
                TypeError,
                ValueError,
                AttributeError,
                CannotRecordError,
            ) as error:
                if "out of memory" in str(error):
                    raise
            self._engine = None  # it cannot do what its trial did not try
        with fused(self.classifier, self.images[:1]), torch.no_grad():
            whole: Tensor = self.classifier(edited_images(self.images, owners, tops, lefts, patches))
        return whole

    def _next_way(self, patches: Tensor, left: int) -> bool:
        """Whether the next chunk goes by windows. Each way is warmed up, then timed, before one is kept to."""
        if self._engine is None or self.windows is not None:
            return self._engine is not None and self.windows is not False
        known = self._seconds.setdefault(_shape(patches), _Seconds())
        if len(known.of) == 2:
            return known.of[True] <= known.of[False]
        if True not in known.of:
            return True
        return left <= 4 * self._chunk  # too few edits for another trial to pay

    def _note(self, by_windows: bool, patches: Tensor, count: int, seconds: float) -> None:
        known = self._seconds.setdefault(_shape(patches), _Seconds())
        if by_windows in known.warm and by_windows not in known.of:
            known.of[by_windows] = seconds / count
        known.warm.add(by_windows)


def _shape(patches: Tensor) -> tuple[int, int]:
    return patches.shape[2], patches.shape[3]


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


class LocalEdits:
    """Exact logits of an image under many edits, each confined to one window.

    The network is recorded once as a list of tensor functions; for each, only the window that an edit reaches is
    computed again, from the maps of the unedited image, until the window is most of the map. Networks that cannot be
    recorded, or have hooks, take the edited images whole; `reason` then says why. What a recording holds of the
    network is as it was when it was made.

    Attributes:
        reason: why edits go through the whole network, or empty.

    Args:
        model: a classifier, or any network that takes images in [0, 1].
        image: (C, H, W) or (1, C, H, W) in [0, 1].
        batch_size: edits at once, at most; changes no result.

    Raises:
        ValueError: when the image is not one such image.

    >>> from torch import nn
    >>> toy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2)).eval()
    >>> edits = LocalEdits(toy, torch.rand(3, 8, 8))
    >>> edits.logits(torch.tensor([0, 7]), torch.tensor([3, 7]), torch.ones(2, 3, 1, 1)).shape
    torch.Size([2, 2])
    """

    def __init__(self, model: nn.Module, image: Tensor, *, batch_size: int | None = None) -> None:
        if isinstance(image, Tensor) and image.ndim == 3:
            image = image[None]
        if isinstance(image, Tensor) and image.ndim == 4 and len(image) != 1:
            raise ValueError(
                f"image is a batch of {len(image)}; accepted is one image, (C, H, W) or (1, C, H, W)"
            )
        self._model = model
        with evaluating(model) as classifier:
            self._edits = Edits(
                classifier, check_images(image, classifier, name="image"), batch_size=batch_size
            )
        self.reason = self._edits.prepared.reason

    def logits(
        self, tops: Tensor, lefts: Tensor, patches: Tensor, *, progress: Progress | None = None
    ) -> Tensor:
        """Paste each patch at its place, alone, and classify.

        Args:
            tops: (M,) whole numbers, the row of each patch's first pixel.
            lefts: (M,) column likewise.
            patches: (M, C, h, w) in [0, 1].
            progress: called with the share done.

        Returns:
            (M, K) logits, equal to those of the whole network to 1e-4 of their range.

        Raises:
            ValueError: when a patch does not lie inside the image, or shapes do not fit.

        Warns:
            ImageWarning: where patches leave [0, 1]; they are cut to it.
        """
        image = self._edits.images
        tops, lefts, patches = _checked(tops, lefts, patches, image)
        with evaluating(self._model):
            owners = torch.zeros_like(tops)
            if not len(tops):
                owners, tops, lefts = (torch.zeros(1, dtype=torch.long, device=image.device),) * 3
                return self._edits.logits(owners, tops, lefts, image[:, :, :1, :1])[:0]
            return self._edits.logits(owners, tops, lefts, patches, progress)


def _checked(tops: Tensor, lefts: Tensor, patches: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, channels, height, width = image.shape
    if not isinstance(patches, Tensor) or patches.ndim != 4 or patches.shape[1] != channels:
        shape = tuple(patches.shape) if isinstance(patches, Tensor) else type(patches).__name__
        raise ValueError(f"patches is {shape}; accepted is a float tensor (M, {channels}, h, w)")
    if not patches.is_floating_point() or not bool(patches.isfinite().all()):
        raise ValueError("patches are not all finite floats; accepted are numbers in [0, 1]")
    count, _, tall, wide = patches.shape
    if not 1 <= tall <= height or not 1 <= wide <= width:
        raise ValueError(
            f"patches are {tall} x {wide}; accepted is 1 x 1 to {height} x {width}, the size of the image"
        )
    for name, places, last in (("tops", tops, height - tall), ("lefts", lefts, width - wide)):
        whole = isinstance(places, Tensor) and not places.is_floating_point() and places.dtype != torch.bool
        if not whole or places.shape != (count,):
            what = (
                f"{tuple(places.shape)} {places.dtype}"
                if isinstance(places, Tensor)
                else type(places).__name__
            )
            raise ValueError(
                f"{name} is {what}; accepted is an integer tensor ({count},), one for each patch"
            )
        if count and not (int(places.min()) >= 0 and int(places.max()) <= last):
            wrong = int(((places < 0) | (places > last)).nonzero()[0])
            raise ValueError(
                f"{name}[{wrong}] is {int(places[wrong])}; patches of {tall} x {wide} fit at 0 to {last}"
            )
    if count:
        check_range(patches, name="patches")
    device = image.device
    patches = patches.detach().to(device, image.dtype, copy=True).clamp_(0, 1)
    return tops.to(device, torch.long), lefts.to(device, torch.long), patches


def work_saved(recording: Recording, image: Tensor) -> float:
    """How many times the multiplications of one edited pixel, in the middle of the image (1, C, H, W), a pass takes.

    Convolutions and matrix products are counted; infinite where there are none by windows.
    """
    engine = Engine(without_growth(recording), image, full_batch=1)
    top, left = (torch.tensor([size // 2], device=image.device) for size in image.shape[2:])
    fused = {} if FUSED is None else {FUSED: _of_fused}
    with FlopCounterMode(display=False, custom_mapping=fused) as by_windows:
        engine.edited(torch.zeros_like(top), top, left, image[:, :, :1, :1])
    with FlopCounterMode(display=False, custom_mapping=fused) as whole:
        engine.replayed(image)
    return float(whole.get_total_flops()) / float(max(1e-9, by_windows.get_total_flops()))


def _of_fused(maps: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    return conv_flop_count(maps, weight, out_shape, transposed=False)
