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
    "random_weights": "Where the class activation of the network with permuted weights exceeds half its maximum, the "
    "same change",
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


def meanings(columns: list[str], found: SsimAlignment) -> dict[str, str]:
    """Column to what it means, of those that stand for themselves, and what its test over all images found."""
    every = dict(MEANINGS)
    for control in CONTROLS:
        for name, text in OF_CONTROL.items():
            every[f"{name}_{control}"] = text.format(SHORT[control])
        every[f"ssim_concentration_over_{control}"] = (
            f"Density of the visible change less that for {SHORT[control]}; alignment beyond it is above 0 and above "
            "the value with other images' class activations."
        )
    for name, sentence in beside(found).items():
        column = "ssim_concentration" if name == "other images" else f"ssim_concentration_over_{name}"
        every[column] += f" {sentence}"
    return {name: every[name] for name in columns if name in every}


def describe(found: SsimAlignment) -> tuple[str, ...]:
    """The sentences of `SsimAlignment.sentences`."""
    left_out = tuple(
        f"{_images(count)} {'is' if count == 1 else 'are'} left out: {reason}."
        for reason, count in Counter(found.why_not).most_common()
        if reason
    )
    return (_finding(found), *beside(found).values(), *_by_themselves(found), *left_out)


def _finding(found: SsimAlignment) -> str:
    if not found.runs:
        return "The images were not compared with each other."
    own = found.runs["other images"]
    if not own.images:
        return "No image can be compared."
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


def beside(found: SsimAlignment) -> dict[str, str]:
    """One sentence for other images and one for each control; none if no image can be compared."""
    from weakspot.report.words import p_value

    if not found.runs or not found.runs["other images"].images:
        return {}
    sentences = {}
    for name, test in found.runs.items():
        doubt = f" ({p_value(test.p)})." if test.images >= LEAST_RUN else "."
        over = f"Over {_images(test.images)}"
        if name == "other images":
            sentences[name] = (
                f"{over} the change is {test.value:.2f} times as dense where the class activation exceeds half its "
                f"maximum as in the whole image, and {test.null:.2f} times where other images' class activations "
                f"do{doubt}"
            )
        elif not test.images:
            sentences[name] = f"{CONTROLS[name]} could not be compared."
        else:
            sentences[name] = (
                f"{CONTROLS[name]} is {found.control_level(name):.2f} times as dense there ({_images(test.images)}); "
                f"the attack's change less this is {test.value:+.2f}, and {test.null:+.2f} with other images' class "
                f"activations{doubt}"
            )
    return sentences


def _by_themselves(found: SsimAlignment) -> list[str]:
    known = found.scores["ssim_concentration_p"].notna().sum() if found.runs else 0
    if not known:
        return []
    return [f"In {int(found.aligned.sum())} of {known} images the same is shown for the image by itself."]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _listed(parts: list[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
