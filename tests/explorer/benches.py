"""Benches that tests of the explorer share: small networks, images, masks, and what a page would send."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn

from weakspot.classifier import Classifier
from weakspot.explorer.bench import Bench
from weakspot.explorer.desk import Desk
from weakspot.explorer.messages import Message

SIZE = (24, 20)


def network(channels: int = 3, classes: int = 4) -> Classifier:
    """A small convolutional classifier with random weights that separates random images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        ).eval()
        # The borders between classes lie near the images, so that attacks have something to find.
        with torch.no_grad():
            layers[-1].bias -= layers(photographs(8, channels)).mean(0)
    return Classifier.wrap(layers, input_size=SIZE, class_names=[f"class of {n}" for n in range(classes)])


def photographs(count: int = 2, channels: int = 3) -> Tensor:
    """Images (N, C, 24, 20)."""
    return torch.rand(count, channels, *SIZE, generator=torch.Generator().manual_seed(1))


def filled_bench(count: int = 2, channels: int = 3, classes: int = 4) -> Bench:
    """A bench with images of a small network."""
    bench = Bench(network(channels, classes))
    bench.add(photographs(count, channels), [f"picture {number}" for number in range(count)])
    return bench


def square(top: int = 2, left: int = 3, side: int = 6, size: tuple[int, int] = SIZE) -> Tensor:
    """Bool (1, 1, H, W)."""
    mask = torch.zeros(1, 1, *size, dtype=torch.bool)
    mask[..., top : top + side, left : left + side] = True
    return mask


def png(mask: Tensor, mode: str = "1") -> str:
    """A mask as a page may send it."""
    buffer = io.BytesIO()
    Image.fromarray(mask[0, 0].numpy()).convert(mode).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def picture_of(text: object) -> Image.Image:
    """A picture that the server sent."""
    assert isinstance(text, str)
    return Image.open(io.BytesIO(base64.b64decode(text)))


class Events:
    """What a subscription has sent."""

    def __init__(self, desk: Desk, name: str, body: Message) -> None:
        self.every: list[Message] = []
        self._ended = threading.Event()
        self.task = desk.subscribe(name, body, self._take)

    def _take(self, event: Message) -> None:
        self.every.append(event)
        if event["event"] in {"done", "error"}:
            self._ended.set()

    def last(self, timeout: float = 60) -> Message:
        """The last event, once there is one."""
        assert self._ended.wait(timeout), self.every[-1:]
        return self.every[-1]

    def named(self, kind: str) -> list[Message]:
        """The events of a kind."""
        return [event for event in self.every if event["event"] == kind]


def wait_for(condition: Callable[[], bool], timeout: float = 60) -> None:
    """Wait until something is so; fail if it does not become so."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)
