"""The similarity analysis: where the adversarial image looks different, and whether the network looks there."""

from __future__ import annotations

from torch import Tensor, nn

from weakspot.explanations.alignment import ssim_alignment
from weakspot.explanations.alignment_words import meanings
from weakspot.explanations.analysis import Analysis, Picture
from weakspot.pairs import Pairs


def analyse(
    model: nn.Module, pairs: Pairs, *, seed: int = 0, reference: Tensor | None = None, compare: bool = True
) -> Analysis:
    """SSIM maps, their means and minima, and `ssim_alignment` as the report shows it."""
    import pandas as pd

    found = ssim_alignment(model, pairs, reference=reference, compare=compare, seed=seed)
    similarity = (1 - found.change).flatten(1)
    windowed = {"ssim_windowed": similarity.mean(1), "ssim_windowed_min": similarity.amin(1)}
    plain = pd.DataFrame({name: values.cpu().numpy() for name, values in windowed.items()})
    scores = pd.concat([plain, found.scores], axis=1)
    meaning = "Where the two images look different to the eye: 0 is no visible change."
    return Analysis(
        scores=scores,
        maps={"ssim": found.change},
        meanings=meanings([str(name) for name in scores], found),
        pictures={
            "ssim": Picture(
                "Visible change (1 - SSIM)",
                meaning=f"{meaning} {found.sentences[0]}" if compare else meaning,
            )
        },
    )
