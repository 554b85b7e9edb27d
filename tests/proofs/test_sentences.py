"""The sentences on certificates: every form, and that none claims more than the certificate holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from weakspot import Classifier, certify_patches, certify_pixels
from weakspot.proofs import AllowedColors, PatchCertificate, PixelCertificate
from weakspot.proofs.sentences import patch_sentence, pixel_sentence, pixels_summary

NAMES = Classifier.wrap(nn.Linear(1, 3), class_names=("cat", "dog", "horse")).class_name


def certificate(
    status: list[list[int]], *, colors: AllowedColors, reasons: tuple[str, ...] = ()
) -> PixelCertificate:
    """A certificate of one image with this status; unknown pixels have the reasons in turn."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(len(status) * len(status[0]), 3)).eval()
    images = torch.full((1, 1, len(status), len(status[0])), 0.5)
    made = certify_pixels(network, images, network(images).argmax(1), colors="8bit", seconds=1e-9)
    values = torch.tensor([status], dtype=torch.int8)
    reason = torch.full_like(values, -1)
    unknown = values == 0
    reason[unknown] = (torch.arange(int(unknown.sum())) % max(1, len(reasons))).to(torch.int8)
    return replace(
        made, status=values, colors=colors, reasons=reasons, reason=reason, labels=torch.tensor([0])
    )


FULL, NEAR = AllowedColors(), AllowedColors(8 / 255, eight_bit=True)


@pytest.mark.parametrize(
    ("status", "colors", "reasons", "sentence"),
    [
        ([[1, 1, 1, 1]], FULL, (),
         "At all 4 pixels, no color turns 'cat' into another class (proven, float32 as run)."),
        ([[1]], FULL, (), "At 1 pixel, no color turns 'cat' into another class (proven, float32 as run)."),
        (
            [[1, 1], [-1, 0]], FULL, ("the time was up",),
            "At 2 of 4 pixels, no color turns 'cat' into another class (proven, float32 as run); at 1, one does; "  # noqa: ISC004
            "1 is unknown, because the time was up.",
        ),
        (
            [[1, -1], [-1, -1]], NEAR, (),
            "At 1 of 4 pixels, no 8-bit color within 8/255 of the pixel's own turns 'cat' into another class "  # noqa: ISC004
            "(proven, float32 as run); at 3, one does.",
        ),
        (
            [[-1, -1]], NEAR, (),
            "No pixel is proven (float32 as run); at 2 pixels, an 8-bit color within 8/255 of the pixel's own turns 'cat' "  # noqa: ISC004, E501
            "into another class.",
        ),
        (
            [[-1, -1]], FULL, (),
            "No pixel is proven (float32 as run); at 2 pixels, a color turns 'cat' into another class.",
        ),
        (
            [[0, 0, 0]], FULL, ("a", "b"),
            "No pixel is proven (float32 as run); 3 are unknown: 2 because a, 1 because b.",
        ),
    ],
)  # fmt: skip
def test_sentences_on_pixels(
    status: list[list[int]], colors: AllowedColors, reasons: tuple[str, ...], sentence: str
) -> None:
    made = certificate(status, colors=colors, reasons=reasons)
    assert pixel_sentence(made, 0, 0, NAMES) == sentence


def test_nothing_is_said_of_pixels_outside_the_region_or_of_a_misclassified_image() -> None:
    made = certificate([[1, -1], [0, 1]], colors=FULL, reasons=("a",))
    region = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    region[0, 0, 0, 0] = True
    inside = replace(made, region=region)
    assert pixel_sentence(inside, 0, 0, NAMES).startswith("At 1 pixel of the region, no color turns 'cat'")
    assert pixels_summary(inside, [True]) == (
        "Of 1 pixel of the region in 1 image, each alone in any color: 1 proven (float32 as run), "
        "0 refuted, 0 unknown; a color that changes the class was found in 0 images."
    )
    assert pixel_sentence(replace(made, region=region & False), 0, 0) == "The region holds no pixel."
    wrong = pixel_sentence(made, 0, 1, NAMES)
    assert (
        wrong == "The image is classified as 'dog', not as 'cat', to begin with; there is nothing to prove."
    )
    assert "proven" not in pixels_summary(made, [False])


def test_what_is_unknown_or_was_not_asked_is_not_denied() -> None:
    """No color was found, of those that are allowed: others may turn the image."""
    made = certificate([[0, 0]], colors=NEAR, reasons=("the time was up",))
    assert pixels_summary(made, [True]) == (
        "Of 2 pixels in 1 image, each alone in any 8-bit color within 8/255 of the pixel's own: 0 "
        "proven (float32 as run), 0 refuted, 2 unknown; a color that changes the class was found in 0 images."
    )


def test_the_statement_is_named_as_it_was_proven() -> None:
    made = replace(certificate([[1]], colors=FULL), statement="exact arithmetic")
    assert "(proven, exact arithmetic)" in pixel_sentence(made, 0, 0)
    assert "1 proven (exact arithmetic)" in pixels_summary(made, [True])


def patches(margin: float, predicted: int, pair: list[int]) -> PatchCertificate:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    images: Tensor = torch.rand(1, 1, 8, 8)
    made = certify_patches(network, images, torch.tensor([0]), patch=2, masks=3)
    return replace(
        made,
        certified=torch.tensor([margin > 0.01]),
        margin=torch.tensor([margin]),
        pair=torch.tensor([pair]),
        predicted=torch.tensor([predicted]),
    )


def test_sentences_on_patches() -> None:
    sure = patch_sentence(patches(0.2, 0, [1, 2]), 0, NAMES)
    assert sure == (
        "Behind double masking, no patch of up to 2 x 2 pixels (6.25% of the image) turns 'cat' into another class."
    )
    assert patch_sentence(patches(-0.2, 0, [1, 1]), 0, NAMES) == (
        "Not certified: with rows 0 to 3 and columns 3 to 6 hidden, 'cat' loses to another class."
    )
    near = patch_sentence(patches(1e-5, 0, [0, 8]), 0, NAMES)
    assert near == (
        "Not certified: with rows 0 to 3 and columns 0 to 3 and with rows 4 to 7 and columns 4 to 7 hidden, 'cat' is "
        "too near to another class."
    )
    assert patch_sentence(patches(-0.2, 2, [0, 0]), 0, NAMES) == (
        "Not certified: behind double masking, the image is classified as 'horse', not as 'cat', without any patch."
    )


def test_classes_that_share_a_name_are_told_apart() -> None:
    name = Classifier.wrap(nn.Linear(1, 3), class_names=("crane", "dog", "crane")).class_name
    wrong = pixel_sentence(certificate([[1]], colors=FULL), 0, 2, name)
    assert wrong.startswith(
        "The image is classified as 'crane (class 2)', not as 'crane (class 0)', to begin"
    )
    wrong = patch_sentence(patches(-0.2, 2, [0, 0]), 0, name)
    assert "classified as 'crane (class 2)', not as 'crane (class 0)', without any patch" in wrong
