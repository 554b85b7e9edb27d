"""The bench: images, their pairs and the answers to what a page asks about them."""

import itertools
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import check_classes
from weakspot.classifier import Classifier, check_images, evaluating, predict
from weakspot.edits import LocalEdits
from weakspot.explorer.messages import (
    UPLOAD_BYTES,
    Message,
    Request,
    RequestError,
    decoded,
    finite,
    open_picture,
    picture_text,
    thumbnail_text,
)
from weakspot.images import fitted
from weakspot.logits import margin
from weakspot.pairs import AttackResult

TOP = 5  # classes that are named
RECORDED = 3  # images whose recording for probes is kept
IMAGES = 500  # on the bench at most, uploaded ones included


@dataclass(frozen=True)
class Origin:
    """How the model and the images came to the bench, so that commands and Python can be written for them.

    Attributes:
        model: the options of the command line that name the model; None for a model from Python.
        load: the Python expression that loads the model; None for a model from Python.
        samples: whether the images are the sample photographs.
        labels: what the user gave as --labels.
    """

    model: Sequence[str] | None = None
    load: str | None = None
    samples: bool = False
    labels: str | None = None


@dataclass(eq=False)
class Exhibit:
    """One image on the bench.

    Attributes:
        name: for people.
        pixels: (1, C, H, W) in [0, 1], on the model's device.
        label: the class that it stands for.
        logits: (1, K) of the image as it is.
        path: as the user typed it; None for images from Python, samples and uploads.
        uploaded: whether a page sent it.
        masks: (1, 1, H, W) bool, the region of the last attack, and its control if there is one.
        pair: of the last attack.
        attacks: how many there were, which is the number of the pair.
        control: the same attack at the place of equal area.
        pair_logits: (1, K), or (2, K) with a control, of the adversarial images.
        how: the attack in words.
        sentence: what came out.
    """

    name: str
    pixels: Tensor
    label: int
    logits: Tensor
    path: str | None = None
    uploaded: bool = False
    masks: tuple[Tensor, ...] = ()
    pair: AttackResult | None = None
    attacks: int = 0
    control: AttackResult | None = None
    pair_logits: Tensor | None = None
    how: str = ""
    sentence: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.pixels.shape[2]), int(self.pixels.shape[3])

    @property
    def label_tensor(self) -> Tensor:
        """(1,)."""
        return torch.tensor([self.label], device=self.pixels.device)

    def attacked(self) -> AttackResult:
        """The pair of the last attack.

        Raises:
            RequestError: if there is none.
        """
        if self.pair is None:
            raise RequestError("there is no perturbation yet (attack the image first)")
        return self.pair


@dataclass(eq=False)
class Bench:
    """What a session holds.

    Attributes:
        classifier: whose decisions are looked at.
        origin: how it and the images came here.
        exhibits: the images.
        concepts: (layer, unit) to the concept that a dissection found, for networks that were dissected.
        state: a number that grows with every change.
        brushed: the mask on the page, bool (1, 1, H, W); None where none is brushed.
    """

    classifier: Classifier
    origin: Origin = field(default_factory=Origin)
    exhibits: list[Exhibit] = field(default_factory=list)
    concepts: Mapping[tuple[str, int], str] = field(default_factory=dict)
    state: int = 0
    brushed: Tensor | None = None
    _edits: OrderedDict[int, LocalEdits] = field(default_factory=OrderedDict)
    _names: set[str] = field(default_factory=set)

    def add(
        self,
        pixels: Tensor,
        names: Sequence[str],
        labels: Tensor | None = None,
        *,
        paths: Sequence[str] | None = None,
        uploaded: bool = False,
    ) -> int:
        """Put images (N, C, H, W) on the bench; returns the number of the first one.

        Args:
            pixels: in [0, 1].
            names: for people.
            labels: (N,) classes; by default the model's predictions.
            paths: as the user typed them.
            uploaded: whether a page sent them.

        Raises:
            ValueError: if they are no images, or the labels do not fit.
        """
        first = len(self.exhibits)
        if first + len(names) > IMAGES:
            raise RequestError(f"the bench holds at most {IMAGES} images (name fewer, or audit them)")
        with evaluating(self.classifier) as classifier:
            images = check_images(pixels, classifier)
            logits = predict(classifier, images)
        if labels is not None:
            check_classes(labels, len(images), logits.shape[1])
        classes = logits.argmax(1) if labels is None else labels
        for row, name in enumerate(names):
            path = None if paths is None else paths[row]
            self.exhibits.append(
                Exhibit(
                    self._unique(name),
                    images[row : row + 1],
                    int(classes[row]),
                    logits[row : row + 1],
                    path,
                    uploaded,
                )
            )
        self.state += 1
        return first

    def exhibit(self, number: int) -> Exhibit:
        """The image of this number.

        Raises:
            RequestError: if there is none.
        """
        if not self.exhibits:
            raise RequestError("there is no image on the bench yet (drop one)")
        if not 0 <= number < len(self.exhibits):
            raise RequestError(f"image must be between 0 and {len(self.exhibits) - 1}, got {number}")
        return self.exhibits[number]

    def attacked(self, request: Request) -> Exhibit:
        """The image of a request about its pair; the request may say by its number which pair it means.

        Raises:
            RequestError: if there is no such image, no pair of it, or another one by now.
        """
        exhibit = self.exhibit(request.whole("image", 0, 10**6, 0))
        exhibit.attacked()
        if request.has("pair") and request.whole("pair", 0, 2**53) != exhibit.attacks:
            raise RequestError("another page has attacked this picture since (attack it again)")
        return exhibit

    @property
    def class_count(self) -> int:
        """Classes that the model tells apart; without an image, as many as have names."""
        return int(self.exhibits[0].logits.shape[1]) if self.exhibits else len(self.classifier.class_names)

    @property
    def recorded(self) -> frozenset[int]:
        """The images for which probes are ready."""
        return frozenset(self._edits)

    def edits(self, number: int) -> LocalEdits:
        """The engine of small edits of an image; that of the last few images is kept."""
        if number not in self._edits:
            self._edits[number] = LocalEdits(self.classifier, self.exhibit(number).pixels)
            if len(self._edits) > RECORDED:
                self._edits.popitem(last=False)
        self._edits.move_to_end(number)
        return self._edits[number]

    def logits(self, images: Tensor) -> Tensor:
        """(N, K) of images, as the model gives them."""
        with evaluating(self.classifier) as classifier:
            return predict(classifier, images)

    def named(self, index: int) -> Message:
        """A class."""
        return {"index": index, "name": self.classifier.class_name(index)}

    def guesses(self, logits: Tensor, count: int = TOP) -> list[Message]:
        """The classes with the largest logits (K,), with their probabilities."""
        probabilities = logits.double().softmax(0)
        order = logits.argsort(descending=True, stable=True)[:count]
        return [
            {
                **self.named(index),
                "probability": finite(float(probabilities[index])),
                "logit": finite(float(logits[index])),
            }
            for index in order.tolist()
        ]

    def judged(self, exhibit: Exhibit, logits: Tensor) -> Message:
        """What the model says with logits (K,), and by which margin the label wins."""
        return {
            "top": self.guesses(logits),
            "predicted": self.guesses(logits, 1)[0],
            "label": self.named(exhibit.label),
            "margin": finite(self.margin(exhibit, logits)),
        }

    def margin(self, exhibit: Exhibit, logits: Tensor) -> float:
        """The label's logit less the largest other one; below zero where the image is misclassified."""
        return float(margin(logits[None], exhibit.label_tensor.to(logits.device)))

    def listed(self, number: int) -> Message:
        """An image in the list of images."""
        exhibit = self.exhibit(number)
        return {
            "index": number,
            "name": exhibit.name,
            "thumbnail": thumbnail_text(exhibit.pixels[0]),
        }

    def shown(self, number: int) -> Message:
        """An image, and what the model says about it."""
        exhibit = self.exhibit(number)
        return {
            "png": picture_text(exhibit.pixels[0]),
            "name": exhibit.name,
            "height": exhibit.size[0],
            "width": exhibit.size[1],
            "channels": int(exhibit.pixels.shape[1]),
            **self.judged(exhibit, exhibit.logits[0]),
        }

    def _unique(self, name: str) -> str:
        candidates = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        chosen = next(candidate for candidate in candidates if candidate not in self._names)
        self._names.add(chosen)
        return chosen


def upload(bench: Bench, request: Request) -> Message:
    """Put a picture that a page sends on the bench, cropped and resized to what the model takes."""
    # The name is that of a file in the commands that the page offers to copy.
    name = re.sub(r"[^\w .()+-]", "_", request.text("name", "picture.png")).strip() or "picture.png"
    opened = decoded(open_picture(request.content("file", UPLOAD_BYTES), "file"), "file")
    channels, size = bench.classifier.channels, bench.classifier.input_size
    if channels not in {1, 3}:
        raise RequestError(f"the model takes images of {channels} channels, which no picture has")
    try:
        image = np.array(fitted(opened, size, channels), dtype=np.float32) / 255
    except Exception:  # noqa: BLE001 - Pillow raises nearly anything on odd pictures
        raise RequestError("file must be a picture that can be converted to colors") from None
    pixels = torch.from_numpy(image)
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
    index = bench.add(pixels[None], [name], uploaded=True)
    return {"image": index, "name": bench.exhibit(index).name}
