"""Probes: what one patch, or a brushed place, of one color would do to the decision."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import torch
from torch import Tensor

from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError, finite, floats
from weakspot.explorer.worker import Worker
from weakspot.logits import margin, runner_up

LARGEST = 64  # pixels a side of a probed patch
GRID = 28  # patches a side of the heat map
AT_ONCE = 7  # patches of the heat map that a probe can undo


def probe(bench: Bench, request: Request) -> Message:
    """The decision with one edit, by `LocalEdits`."""
    number = request.whole("image", 0, 10**6, 0)
    exhibit = bench.exhibit(number)
    color = request.color("color", int(exhibit.pixels.shape[1])).to(exhibit.pixels.device)
    mask = request.mask("mask", exhibit.size)
    (top, left, tall, wide) = box = _box(exhibit, request) if mask is None else _box_of(mask)
    patch = exhibit.pixels[:, :, top : top + tall, left : left + wide]
    inside = torch.ones_like(patch[:, :1], dtype=torch.bool)
    if mask is not None:
        inside = mask[:, :, top : top + tall, left : left + wide].to(patch.device)
    # One rectangle is edited, in which only the pixels of the mask change.
    edited = torch.where(inside, color.to(patch), patch)
    place = torch.tensor([top]), torch.tensor([left])
    with torch.no_grad():
        logits = bench.edits(number).logits(*place, edited)[0]
    clean = exhibit.logits[0]
    answer = bench.judged(exhibit, logits)
    return {
        **answer,
        "change": finite(bench.margin(exhibit, logits) - bench.margin(exhibit, clean)),
        "changed": int(logits.argmax()) != int(clean.argmax()),
        "box": list(box),
    }


def _box(exhibit: Exhibit, request: Request) -> tuple[int, int, int, int]:
    """Top, left, height and width of a patch around a pixel, inside the image."""
    height, width = exhibit.size
    y, x = request.whole("y", 0, height - 1), request.whole("x", 0, width - 1)
    size = request.whole("size", 1, LARGEST, 1)
    tall, wide = min(size, height), min(size, width)
    top, left = (
        min(max(at - side // 2, 0), length - side)
        for at, side, length in ((y, tall, height), (x, wide, width))
    )
    return top, left, tall, wide


def _box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of the smallest box around a mask."""
    rows, columns = mask[0, 0].any(1).nonzero()[:, 0], mask[0, 0].any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])
    return top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left


def heat_map(
    bench: Bench, request: Request, send: Callable[[Message], None], worker: Worker
) -> Generator[None]:
    """The margin under one edit at every place of a grid, row by row; a step of the generator is a part of a row.

    Raises:
        RequestError: if the request is not valid, at the first step.
    """
    number = request.whole("image", 0, 10**6, 0)
    exhibit = bench.exhibit(number)
    height, width = exhibit.size
    size = request.whole("size", 1, LARGEST, 1)
    if size > min(height, width):
        raise RequestError(f"size must be at most the image's {height} x {width} pixels, got {size}")
    grid = request.whole("grid", 2, 64, GRID)
    color = request.color("color", int(exhibit.pixels.shape[1])).to(exhibit.pixels)
    rows, columns = (_places(length, size, grid) for length in (height, width))
    clean = bench.margin(exhibit, exhibit.logits[0])
    lefts = columns - size // 2
    patches = color.expand(len(columns), -1, size, size)
    for number_of_row, row in enumerate((rows - size // 2).tolist()):
        parts = []
        for some in lefts.split(AT_ONCE):
            part = partial(bench.edits(number).logits, torch.full_like(some, row), some, patches[: len(some)])
            parts.append((yield from worker.unless_probed(part)))
            yield
        logits = torch.cat(parts)
        labels = exhibit.label_tensor.expand(len(logits))
        send(
            {
                "event": "rows",
                "row": number_of_row,
                "margins": floats(margin(logits, labels)[None]),
                "classes": floats(logits.argmax(1)[None].float()),
                "rows": len(rows),
                "columns": len(columns),
                "centers": {"y": rows.tolist(), "x": columns.tolist()},
                "clean": finite(clean),
                "competing": bench.named(int(runner_up(exhibit.logits, exhibit.label_tensor)[1])),
            }
        )
    send({"event": "done"})


def _places(length: int, size: int, grid: int) -> Tensor:
    """Centers of at most `grid` patches, evenly from one border to the other."""
    last = length - size
    count = min(grid, last + 1)
    tops = torch.linspace(0, last, count).round().long() if count > 1 else torch.tensor([last // 2])
    return tops + size // 2
