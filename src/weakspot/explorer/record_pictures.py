"""Pictures of records: small ones for the page, and the image itself for the bench."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot._io.urls import is_url
from weakspot.audit.execution.opened_images import open_entries
from weakspot.audit.page.thumbnails import encoded, pixels_of
from weakspot.audit.plan.image_list import entries
from weakspot.audit.store.digests import DamagedError
from weakspot.audit.store.maps import CLEAN, MAPS
from weakspot.audit.store.records import LISTING
from weakspot.audit.store.run import Run
from weakspot.audit.store.stored_maps import ChunkFiles, StoredMap, StoredMaps
from weakspot.classifier import Classifier

ADVERSARIAL, CHANGE = "adversarial", "change"
KINDS = (CLEAN, ADVERSARIAL, CHANGE)
REMEMBERED = 2000  # small pictures, about 5 kB each
NOTHING = 255  # in uint8, where nothing is stored
NO_PICTURES = "the run holds no pictures (the audit ran with --no-maps)"
Key = int | tuple[int, ...]  # of an image, or of image, attack and region
BLANK = "no picture is stored, or all of its pixels are white"


@dataclass(frozen=True)
class Place:
    """Where the pictures of a record lie in the maps of its run: the numbers of image, attack and region."""

    image: int
    attack: int
    region: int


@dataclass(frozen=True, eq=False)
class OpenedRecord:
    """A record as the bench takes it.

    Attributes:
        name: of the image.
        image: float (C, H, W) in [0, 1].
        label: class under which it was attacked, or None.
        attack: name of the attack.
        budget: text such as linf:4/255, or None.
        settings: of the attack.
        region: its text in the plan.
        adversarial: float (C, H, W), rounded to 8 bits; None if it is not stored.
        remark: a sentence if the image is not exactly the one that was attacked; otherwise empty.
    """

    name: str
    image: Tensor
    label: int | None
    attack: str
    budget: str | None
    settings: Mapping[str, object]
    region: str
    adversarial: Tensor | None
    remark: str


class RecordPictures:
    """Pictures stored in the maps of a run, read one image at a time.

    Chunks end in a checksum, which every reading compares. The digests of whole shards are compared only where an image
    goes to the bench: fifty small pictures can come from fifty shards of many megabytes.

    Args:
        run: whose maps they are.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        path = f"{run.name.rstrip('/')}/{MAPS}" if is_url(run.name) else run.folder / MAPS
        self._stored = StoredMaps(path)
        self._maps: dict[str, StoredMap] | None = None
        self._files: dict[str, ChunkFiles | None] = {}
        self._drawn = lru_cache(REMEMBERED)(self._draw)
        self._lock = threading.Lock()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of pictures that `small` has."""
        found = self._opened()
        return KINDS if {CLEAN, ADVERSARIAL} <= set(found) else (CLEAN,) if CLEAN in found else ()

    def small(self, kind: str, place: Place) -> str:
        """A picture as a data URL; the change is drawn around mid-gray, its largest value at either end.

        Raises:
            ValueError: if there is none.
            DamagedError: if it differs from what was written.
        """
        # All attacks and regions of an image have its clean picture in common.
        return self._drawn(kind, Place(place.image, 0, 0) if kind == CLEAN else place)

    def _draw(self, kind: str, place: Place) -> str:
        sources = (CLEAN, ADVERSARIAL) if kind == CHANGE else (kind,)
        levels = [self._levels(source, place) for source in sources]
        pixels = pixels_of(_magnified(*levels) if kind == CHANGE else levels[0])
        return encoded(pixels, pixels)

    def stored(self, kind: str, place: Place) -> Tensor | None:
        """The picture (C, H, W) as floats, its shard compared with its digest; None if there is none."""
        maps = self.run.maps
        if kind not in set(maps):
            return None
        levels = maps[kind][_key(kind, place)]
        return None if (levels == NOTHING).all() else torch.from_numpy(levels).float() / 255

    def original(self, place: Place, content: str, classifier: Classifier) -> Tensor | None:
        """The image (C, H, W) as the audit read it from its file; None if that is gone or has changed since."""
        import pyarrow.parquet as pq

        path = self.run.folder / LISTING
        if not path.is_file():
            return None
        opened = open_entries(entries(pq.read_table(path), place.image, 1), classifier)
        return opened.images[0] if list(opened.contents) == [content] else None

    def _levels(self, kind: str, place: Place) -> NDArray[np.uint8]:
        maps = self._opened()
        if kind not in maps:
            raise ValueError(NO_PICTURES)
        levels = self._read(maps[kind], kind, place)
        if (levels == NOTHING).all():
            raise ValueError(BLANK)
        return levels

    def _read(self, stored: StoredMap, kind: str, place: Place) -> NDArray[np.uint8]:
        with self._lock:
            if kind not in self._files:
                self._files[kind] = ChunkFiles.of(self._stored.path, stored.array)
            files = self._files[kind]
        if files is None:
            levels: NDArray[np.uint8] = stored[_key(kind, place)]
            return levels
        # A chunk holds one image with all attacks and regions.
        whole = files.read(place.image)
        return whole if kind == CLEAN else whole[place.attack, place.region]

    def _opened(self) -> dict[str, StoredMap]:
        with self._lock:
            if self._maps is None:
                names = (
                    set(self._stored) if is_url(self.run.name) or Path(self._stored.path).is_dir() else set()
                )
                try:
                    self._maps = {name: self._stored[name] for name in (CLEAN, ADVERSARIAL) if name in names}
                except (OSError, ValueError, KeyError) as error:
                    raise DamagedError(
                        f"{self.run.name} is damaged: its maps cannot be opened ({error})"
                    ) from error
            return self._maps


def _magnified(clean: NDArray[np.uint8], changed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # Signed, because differences of unsigned bytes would wrap around.
    change = changed.astype(np.int16) - clean
    largest = max(1, int(np.abs(change).max(initial=0)))
    return np.rint(127.5 + 127.5 * change / largest).astype(np.uint8)


def _key(kind: str, place: Place) -> Key:
    return place.image if kind == CLEAN else (place.image, place.attack, place.region)
