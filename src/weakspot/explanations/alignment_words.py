"""What `ssim_alignment` found, in sentences: the finding, then other images, then each control."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from weakspot.statistics import LEAST_RUN

if TYPE_CHECKING:
    from weakspot.explanations.alignment import SsimAlignment

MEANINGS = {
    "ssim_windowed": "Mean structural similarity of the two images over sliding windows (11 x 11, Gaussian); 1 means "
    "that they look the same. An SSIM budget bounds another quantity, which records call ssim_budget_spent.",
    "ssim_windowed_min": "Structural similarity in the window where it is lowest, where the change is most visible.",
    "ssim_pointing": "Pointing game: 1 if the most visibly changed site lies where the label's class activation "
    "exceeds half its maximum.",
    "ssim_concentration": "How many times denser the visible change is where the label's class activation exceeds half "
    "its maximum than in the whole image; 1 is no concentration.",
    "ssim_spearman": "Rank correlation of the visible change and the label's class activation over all sites.",
}
CONTROLS = {
    "variance_gradient": "Local variance x gradient energy, which any attack bounded in SSIM follows to first order,",
    "pgd": "The change of an L-infinity PGD attack of equal mean SSIM",
    "random_weights": "With the class activation of the network with permuted weights, the same change",
}
SHORT = {
    "other images": "other images' class activations",
    "variance_gradient": "local variance x gradient energy",
    "pgd": "PGD of equal SSIM",
    "random_weights": "the network with permuted weights",
}
OF_CONTROL = {
    "ssim_pointing": "The pointing game for {}.",
    "ssim_concentration": "The same density for {}.",
    "ssim_spearman": "The same rank correlation for {}.",
}


def meanings(columns: list[str]) -> dict[str, str]:
    """Column to one sentence, of those of `SsimAlignment.scores` that stand for themselves."""
    every = dict(MEANINGS)
    for control in CONTROLS:
        for name, text in OF_CONTROL.items():
            every[f"{name}_{control}"] = text.format(SHORT[control])
        every[f"ssim_concentration_over_{control}"] = (
            f"Density of the visible change less that for {SHORT[control]}; alignment beyond it is above 0 and above "
            "the value with other images' class activations."
        )
    return {name: every[name] for name in columns if name in every}


def describe(found: SsimAlignment) -> tuple[str, ...]:
    """The sentences of `SsimAlignment.sentences`."""
    left_out = tuple(
        f"{_images(count)} {'is' if count == 1 else 'are'} left out: {reason}."
        for reason, count in Counter(found.why_not).most_common()
        if reason
    )
    if not found.runs:
        return ("The images were not compared with each other.", *left_out)
    own = found.runs["other images"]
    if not own.images:
        return ("No image can be compared.", *left_out)
    return (_finding(found), *_beside(found), *left_out)


def _finding(found: SsimAlignment) -> str:
    own = found.runs["other images"]
    if own.images < LEAST_RUN:
        return (
            f"At least {LEAST_RUN} images are needed to say whether the visible change lies where the network looks; "
            f"{own.images} can be compared."
        )
    if found.aligned_overall:
        return (
            f"The visible change lies where the network looks, on the mean over {own.images} images, and beyond "
            f"{_listed([SHORT[name] for name in found.runs])}."
        )
    short_of = [SHORT[name] for name in found.runs if name not in found.exceeded]
    return (
        f"It is not shown that the visible change lies where the network looks ({own.images} images): it does not "
        f"clearly exceed {_listed(short_of, 'or')}."
    )


def _beside(found: SsimAlignment) -> list[str]:
    """One sentence for other images and one for each control."""
    from weakspot.report.words import p_value

    own = found.runs["other images"]
    tested = own.images >= LEAST_RUN
    beside = [
        f"The change is {own.value:.2f} times as dense where the class activation exceeds half its maximum as in the "
        f"whole image, and {own.null:.2f} times where other images' class activations do"
        + (f" ({p_value(own.p)})." if tested else ".")
    ]
    for name in found.controls:
        test = found.runs[name]
        if not test.images:
            beside.append(f"{CONTROLS[name]} could not be compared.")
            continue
        beside.append(
            f"{CONTROLS[name]} is {found.control_level(name):.2f} times as dense there; the attack's change exceeds it "
            f"by {test.value:+.2f}, and by {test.null:+.2f} with other images' class activations"
            + (f" ({p_value(test.p)})." if test.images >= LEAST_RUN else ".")
        )
    known = found.scores["ssim_concentration_p"].notna().sum()
    if known:
        beside.append(
            f"In {int(found.aligned.sum())} of {known} images the same is shown for the image by itself."
        )
    return beside


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _listed(parts: list[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
