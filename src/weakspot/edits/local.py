"""LocalEdits: exact logits of an image under many small edits, by windows or whole images, whichever is less work."""

import math
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from weakspot._checks import check_range, checked_batch_size
from weakspot._progress import Progress
from weakspot._state import DispatchMode
from weakspot.classifier import Classifier, check_images, check_logits, default_batch, evaluating, predict
from weakspot.edits.engine import Engine, Prepared, edited_images, evenly, prepare
from weakspot.edits.steps import Arguments, CannotRecordError, Keywords, Recording, without_growth
from weakspot.fusion import fused

LARGEST_CHUNK = 256
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
WORTH = 1.3  # least ratio of multiplications; that of time is larger (`benchmarks/edits.py`)
FAILURES = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, CannotRecordError)
RANKS = 6  # classes of distance to the border, down and along, at most


class Edits:
    """Logits of several images under edits that are each confined to one window.

    Recomputing windows costs less than whole images for most networks and small edits, and more for some, above all
    for networks of tokens. The way with fewer multiplications is taken, so that results do not depend on how busy a
    machine is.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        windows: None to choose by `work_saved`; True or False for one way only, in tests and benchmarks.
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
        batch_size = checked_batch_size(batch_size)
        self.classifier, self.images, self.windows = classifier, images, windows
        self.prepared = prepare(classifier, images[:1]) if prepared is None else prepared
        # Windows are small: more of them go at once than whole images, but not so many that they leave the cache.
        usual, largest = default_batch(images), batch_size or 2**30
        self._whole_batch = min(usual, largest)
        at_once, whole = (
            (24 * usual, LARGEST_CHUNK // 2) if images.device.type == "cpu" else (16 * usual, 4 * usual)
        )
        self._chunk = min(at_once, LARGEST_CHUNK, largest)
        self._full_batch = min(whole, LARGEST_CHUNK // 2, largest)
        self._recording = self.prepared.recording

    @cached_property
    def _engine(self) -> Engine:
        if self._recording is None:
            raise CannotRecordError(self.prepared.reason)
        return Engine(self._recording, self.images, full_batch=self._full_batch)

    def logits(
        self,
        owners: Tensor,
        tops: Tensor,
        lefts: Tensor,
        patches: Tensor,
        progress: Progress | None = None,
    ) -> Tensor:
        """(M, K) logits with patches (M, C, h, w) at (tops, lefts) of the images numbered `owners`, each (M,)."""
        parts: list[Tensor] = []
        done, count = 0, len(owners)
        order = self._by_distance_to_border(tops, lefts, patches)
        by_windows = self._by_windows((patches.shape[2], patches.shape[3]))
        for rows in order.split(evenly(count, self._chunk if by_windows else self._whole_batch)):
            parts.append(self._part(by_windows, owners[rows], tops[rows], lefts[rows], patches[rows]))
            done += len(rows)
            if progress is not None:
                progress(done / count)
        # Back into the order of the edits: the argsort of a permutation is its inverse.
        logits = torch.cat(parts)[order.argsort()]
        check_logits(logits, self.classifier, self.images)
        return logits

    def _by_distance_to_border(self, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
        """(M,) the order in which edits at similar distances to the border go together: their windows are cut alike."""
        ranks: list[Tensor] = []
        # Over both axes, about as many classes as there are chunks.
        number = round(min(RANKS, max(1.0, math.sqrt(len(tops) / self._chunk))))
        for starts, length, size in (
            (tops, patches.shape[2], self.images.shape[2]),
            (lefts, patches.shape[3], self.images.shape[3]),
        ):
            depth = torch.minimum(starts, size - length - starts)
            # No edit is deeper than half of the side, so that ranks are below `number`.
            ranks.append(depth * 2 * number // size)
        return (ranks[0] * number + ranks[1]).argsort(stable=True)

    def clean_logits(self) -> Tensor:
        """(N, K) of the unedited images."""
        if "_engine" in vars(self):
            return self._engine.logits
        with fused(self.classifier, self.images[:1]):
            return predict(self.classifier, self.images, self._whole_batch)

    def whole(self, images: Tensor) -> Tensor:
        """(M, K) logits of other images (M, C, H, W), by the recording if there is one."""
        if self._recording is not None and self.windows is not False:
            logits = torch.cat([self._engine.replayed(part) for part in images.split(self._whole_batch)])
            check_logits(logits, self.classifier, images)
            return logits
        with fused(self.classifier, self.images[:1]):
            return predict(self.classifier, images, self._whole_batch)

    def _part(self, by_windows: bool, owners: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
        if by_windows and self._recording is not None:
            try:
                logits = self._engine.edited(owners, tops, lefts, patches)
                if len(logits) == len(owners):
                    return logits
            except FAILURES as error:
                # Lack of memory says nothing about the recording.
                if "out of memory" in str(error):
                    raise
            self._recording = None  # these edits do what the recording's trial did not
        with fused(self.classifier, self.images[:1]), torch.no_grad():
            # Not more at once than whole images usually go, if the chunk was meant for windows.
            chunks = torch.arange(len(owners), device=owners.device).split(self._whole_batch)
            return torch.cat(
                [
                    self.classifier(
                        edited_images(self.images, owners[rows], tops[rows], lefts[rows], patches[rows])
                    )
                    for rows in chunks
                ]
            )

    def _by_windows(self, size: tuple[int, int]) -> bool:
        if self._recording is None or self.windows is not None:
            return self._recording is not None and self.windows is not False
        try:
            return work_saved(self._recording, self.images[:1], size) >= WORTH
        except FAILURES as error:
            if "out of memory" in str(error):
                raise
            return False


class LocalEdits:
    """Exact logits of an image under many edits, each confined to one window.

    The network is recorded once as a list of tensor functions. For each of them only the window that an edit reaches is
    computed again, from the maps of the unedited image, until the window is most of the map. Networks that cannot be
    recorded, or have hooks, take the edited images whole; `reason` then says why. A recording holds the network's
    weights as they were when it was made.

    Attributes:
        reason: why edits go through the whole network, or an empty text.

    Args:
        model: a classifier, or any network that takes images in [0, 1].
        image: (C, H, W) or (1, C, H, W) in [0, 1].
        batch_size: edits at once, at most; it changes no result.

    Raises:
        ValueError: if the image is not one such image.

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
            raise ValueError(f"image must be one image, (C, H, W) or (1, C, H, W), got {len(image)} images")
        self._model = model
        with evaluating(model) as classifier:
            self._edits = Edits(
                classifier, check_images(image, classifier, name="image"), batch_size=batch_size
            )
        self.reason = self._edits.prepared.reason

    def __repr__(self) -> str:
        way = f"whole images: {self.reason}" if self.reason else "windows"
        return f"LocalEdits(image {tuple(self._edits.images.shape[1:])}, by {way})"

    def logits(
        self, tops: Tensor, lefts: Tensor, patches: Tensor, *, progress: Progress | None = None
    ) -> Tensor:
        """Classify the image with each patch, alone, pasted at its place.

        Args:
            tops: (M,) integers, the row of each patch's first pixel.
            lefts: (M,) integers, the column of each patch's first pixel.
            patches: (M, C, h, w) in [0, 1].
            progress: called with the fraction done.

        Returns:
            (M, K) logits, equal to those of the whole network to 1e-4 of their range.

        Raises:
            ValueError: if a patch does not lie inside the image, or shapes do not fit.

        Warns:
            ImageWarning: if patches leave [0, 1]; they are clipped to it.
        """
        image = self._edits.images
        tops, lefts, patches = _checked(tops, lefts, patches, image)
        with evaluating(self._model):
            owners = torch.zeros_like(tops)
            if not len(tops):
                # One edit that changes nothing tells the number of classes.
                owners, tops, lefts = (torch.zeros(1, dtype=torch.long, device=image.device),) * 3
                return self._edits.logits(owners, tops, lefts, image[:, :, :1, :1])[:0]
            return self._edits.logits(owners, tops, lefts, patches, progress)


def _checked(tops: Tensor, lefts: Tensor, patches: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, channels, height, width = image.shape
    if not isinstance(patches, Tensor) or patches.ndim != 4 or patches.shape[1] != channels:
        got = tuple(patches.shape) if isinstance(patches, Tensor) else type(patches).__name__
        raise ValueError(f"patches must be a float tensor (M, {channels}, h, w), got {got}")
    if not patches.is_floating_point() or not bool(patches.isfinite().all()):
        raise ValueError(f"patches must be finite floats in [0, 1], got {patches.dtype}, NaN or infinity")
    count, _, tall, wide = patches.shape
    if not 1 <= tall <= height or not 1 <= wide <= width:
        raise ValueError(
            f"patches must be between 1 x 1 and {height} x {width}, the image, got {tall} x {wide}"
        )
    for name, places, last in (("tops", tops, height - tall), ("lefts", lefts, width - wide)):
        _check_places(places, count, last, name=name)
    if count:
        check_range(patches, name="patches")
    device = image.device
    # A copy, because clipping in place would change the user's tensor.
    patches = patches.detach().to(device, image.dtype, copy=True).clamp_(0, 1)
    return tops.to(device, torch.long), lefts.to(device, torch.long), patches


def _check_places(places: Tensor, count: int, last: int, *, name: str) -> None:
    if not isinstance(places, Tensor) or places.shape != (count,) or places.dtype not in INTEGERS:
        got = f"{tuple(places.shape)} {places.dtype}" if isinstance(places, Tensor) else type(places).__name__
        raise ValueError(f"{name} must be an integer tensor ({count},), one for each patch, got {got}")
    outside = (places < 0) | (places > last)
    if bool(outside.any()):
        raise ValueError(
            f"{name} must be between 0 and {last} for these patches, got {int(places[outside][0])}"
        )


def work_saved(recording: Recording, image: Tensor, size: tuple[int, int] = (1, 1)) -> float:
    """How many times more multiplications a whole pass takes than one edit in the middle of the image.

    It is counted once for each recording and size.

    Args:
        recording: of the network.
        image: (1, C, H, W).
        size: height and width of the edit.

    Returns:
        The ratio for convolutions and matrix products; infinite if windows take none.
    """
    if size not in recording.work_saved:
        engine = Engine(without_growth(recording), image, full_batch=1)
        top, left = (
            torch.tensor([(whole - part) // 2], device=image.device)
            for whole, part in zip(image.shape[2:], size, strict=True)
        )
        by_windows, whole = _Multiplications(), _Multiplications()
        with by_windows:
            engine.edited(torch.zeros_like(top), top, left, image[:, :, : size[0], : size[1]])
        with whole:
            engine.replayed(image)
        recording.work_saved[size] = whole.count / by_windows.count if by_windows.count else math.inf
    return recording.work_saved[size]


class _Multiplications(DispatchMode):
    """Counts those of convolutions and matrix products in this thread (FlopCounterMode sets hooks of all threads)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.count += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result
