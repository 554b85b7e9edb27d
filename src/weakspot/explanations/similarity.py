"""The similarity analysis: where the adversarial image looks different from the clean one."""

from __future__ import annotations

from torch import nn

from weakspot.explanations.analysis import Analysis, Picture
from weakspot.pairs import Pairs
from weakspot.similarity import ssim_map


def analyse(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:  # noqa: ARG001 - the contract's signature
    """SSIM maps and their means."""
    import pandas as pd

    maps = ssim_map(pairs.clean, pairs.adversarial)
    return Analysis(
        scores=pd.DataFrame({"ssim": maps.mean((1, 2, 3)).cpu().numpy()}),
        maps={"ssim": 1 - maps},
        meanings={"ssim": "Mean structural similarity of the two images; 1 means that they look the same."},
        pictures={
            "ssim": Picture(
                "Visible change (1 - SSIM)",
                meaning="Where the two images look different to the eye: 0 is no visible change.",
            )
        },
    )
