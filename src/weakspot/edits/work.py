"""How much work windows save, by counting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from weakspot.edits.engine import Engine
from weakspot.edits.recording import Recording


def work_saved(recording: Recording, image: Tensor) -> float:
    """How many times the multiplications of one edited pixel, in the middle of the image (1, C, H, W), a pass takes.

    Convolutions and matrix products are counted; infinite where there are none by windows.
    """
    engine = Engine(recording, image, full_batch=1)
    top, left = (torch.tensor([size // 2], device=image.device) for size in image.shape[2:])
    with FlopCounterMode(display=False) as by_windows:
        engine.edited(torch.zeros_like(top), top, left, image[:, :, :1, :1])
    with FlopCounterMode(display=False) as whole:
        engine.replayed(image)
    return float(whole.get_total_flops()) / float(max(1e-9, by_windows.get_total_flops()))
