"""Which pixels of the clean image can take no color that changes its class, whatever the attack of the pair did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot.classifier import evaluating, predict
from weakspot.explanations.analysis import Analysis, Picture
from weakspot.pairs import Pairs
from weakspot.proofs import PixelCertificate, certify_pixels
from weakspot.statistics.number_format import percent

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 64 * 64  # pixels: in larger images, proving every pixel takes hours
FRACTIONS = ("proven_fraction", "refuted_fraction", "unknown_fraction")
_MISSING = f"Missing if the clean image is misclassified, and for images of more than {LARGEST:,} pixels."
MEANINGS = {
    "proven_fraction": "Fraction of the pixels of the clean image of which no color, of one pixel alone, changes the "
    f"class; proven for float32 as run. {_MISSING}",
    "refuted_fraction": f"Fraction of the pixels of which a color that changes the class was found. {_MISSING}",
    "unknown_fraction": f"Fraction of the pixels that are neither proven nor refuted. {_MISSING}",
}
CATEGORIES = ("not asked about", "proven", "unknown", "refuted")


def analyze_certificate(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:  # noqa: ARG001
    """The certificate of every pixel of each clean image, over all colors, by `certify_pixels`.

    It takes minutes an image and does not depend on the attack. It runs only if it is named: `ON_REQUEST`.
    """
    import pandas as pd

    clean, labels = pairs.clean, pairs.labels
    scores = {name: torch.full((len(pairs),), torch.nan, dtype=torch.float64) for name in FRACTIONS}
    drawn = torch.zeros_like(clean[:, :1], dtype=torch.long)
    if clean[0, 0].numel() <= LARGEST:
        with evaluating(model) as classifier:
            correct = (predict(classifier, clean).argmax(1) == labels).nonzero()[:, 0]
            if len(correct):
                certificate = certify_pixels(classifier, clean[correct], labels[correct])
                for name in FRACTIONS:
                    scores[name][correct.cpu()] = getattr(certificate, name).cpu()
                drawn[correct] = _categories(certificate).to(drawn)
    return Analysis(
        scores=pd.DataFrame({name: values.numpy() for name, values in scores.items()}),
        maps={"certificate": drawn},
        meanings=MEANINGS,
        pictures={
            "certificate": Picture(
                "Pixels of which no color changes the class",
                kind="category",
                categories=CATEGORIES,
                meaning="Each pixel is changed alone. Proven: no color of it takes {label} away. Refuted: a color was "
                "found that does. Unknown: neither.",
            )
        },
    )


def _categories(certificate: PixelCertificate) -> Tensor:
    """(N, 1, H, W) numbers of `CATEGORIES`."""
    # A status is 1 if the pixel is proven, 0 if unknown and -1 if refuted.
    numbers = torch.where(certificate.status == 1, 1, torch.where(certificate.status == 0, 2, 3))
    return torch.where(certificate.region, numbers[:, None].to(certificate.region.device), 0)


def certificate_finding(row: pd.Series) -> str:
    """The sentence on the pixels of one image, from its row of scores; empty if they were not certified."""
    proven, refuted, unknown = (float(row.get(name, torch.nan)) for name in FRACTIONS)
    # Also true for NaN.
    if not proven >= 0:
        return ""
    sentence = (
        f"Changed alone, {percent(proven)} of the pixels have no color that turns '{row['label']}' into another class "
        "(proven, float32 as run)"
    )
    sentence += f"; {percent(refuted)} have one" if refuted else ""
    return sentence + (f"; {percent(unknown)} are unknown." if unknown else ".")
