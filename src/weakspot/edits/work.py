"""How much work windows save, by counting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from weakspot.edits.engine import Engine
from weakspot.edits.merging import FUSED, without_growth
from weakspot.edits.recording import Recording


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
