"""Uploads: a picture that a page sends, put on the bench like a file that was named on the command line."""

from __future__ import annotations

import re

import numpy as np
import torch

from weakspot.explorer.bench import Bench
from weakspot.explorer.messages import (
    UPLOAD_BYTES,
    Message,
    Request,
    RequestError,
    decoded,
    open_picture,
)
from weakspot.images import fitted


def upload(bench: Bench, request: Request) -> Message:
    """Put a picture on the bench, cropped and resized to what the model takes."""
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
