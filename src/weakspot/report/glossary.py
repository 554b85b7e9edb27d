"""The glossary of the explanation page: its terms, and links to them from any text of the page."""

import re

from markupsafe import Markup, escape

# Term: definition. The words that link to a term are those of `WORDS`.
TERMS = {
    "adversarial image": (
        "An image that an attack changed a little so that the network classifies it differently."
    ),
    "L-infinity": (
        "A size of a change: the largest change of any channel of any pixel. 4/255 is four of 255 levels of "
        "brightness. L2 is the Euclidean length of the whole change."
    ),
    "PGD": (
        "Projected gradient descent, an attack: repeated steps along the network's gradient, each kept within "
        "the allowed size (Madry et al. 2018)."
    ),
    "logit": ("The network's raw output for a class, before outputs become confidences that sum to 100%."),
    "margin": (
        "The logit of the label minus the largest other logit, or minus that of the competing class where one "
        "is named. Above 0 the image is classified as its label. Also called its lead."
    ),
    "class activation": (
        "A class activation map (CAM) shows where the network gathers evidence for a class. Both images are "
        "explained for both classes on one scale. Evidence against a class is drawn as zero."
    ),
    "region of importance": (
        "The 20% of the image with the most evidence for the label in the clean image; smaller if fewer sites "
        "matter. The part that matters most."
    ),
    "region of attack": (
        "The 20% of the image where the change lowers the label's margin most; smaller if fewer sites matter. "
        "The two regions follow the idea of Chattopadhyay et al. 2020 (arXiv 2011.10794), re-specified from "
        "its abstract; how they are computed, and every parameter, is ours."
    ),
    "effect": (
        "What the change takes from the label's margin, place by place (integrated gradients); it sums to the "
        "whole loss. An attack bounded in L-infinity has nearly the same size everywhere, so its difference "
        "image shows its sign, not where it matters."
    ),
    "promotion": (
        "Raising the logit of the competing class. Suppression lowers that of the label. A change is "
        "dominated by one of them if that effect is more than twice the other (Xu et al. 2019, arXiv "
        "1904.02057)."
    ),
    "SSIM": ("Structural similarity: how alike two images look, 1 for identical ones (Wang et al. 2004)."),
    "changed cells": (
        "The image is divided into square cells, about eight along its shorter side. The change is removed from some "
        "of them, or put into the clean image in some of them alone."
    ),
    "units": ("The channels of a layer of the network."),
    "8 bits": (
        "Image files store 256 levels. An attack counts if its image still fools the network after rounding."
    ),
    "other images": (
        "The attack is compared with the importance maps of at least 19 other images of the same source."
    ),
    "p": (
        "How often a relation at least as strong would appear by chance alone. Every p belongs to one image: "
        "of twenty images without any relation, one is expected below .05."
    ),
    "q": ("p corrected for the number of images (Benjamini and Hochberg)."),
    "shifted within this image": (
        "The same attack shifted against the image by every possible amount, wrapping around at the borders; "
        "its p is the fraction of shifts that agree at least as well. Subjects are near the middle of "
        "photographs, and so are attacks: a small p from shifts may reflect only that."
    ),
}
WORDS = {
    "L-infinity": "L-infinity", "PGD": "PGD", "logit": "logit", "margin": "margin", "lead": "margin",
    "class activation map": "class activation", "class activation": "class activation",
    "region of importance": "region of importance", "matters most": "region of importance",
    "region of attack": "region of attack", "of the effect": "effect", "promotion": "promotion",
    "promotion-dominated": "promotion", "suppression-dominated": "promotion", "suppression": "promotion",
    "SSIM": "SSIM", "changed cells": "changed cells", "units": "units", "8 bits": "8 bits",
    "adversarial image": "adversarial image",
}  # fmt: skip
# Longer words first: a regular expression takes the first alternative that fits.
_PATTERN = re.compile(
    r"(?<![\w-])(" + "|".join(sorted(map(re.escape, WORDS), key=len, reverse=True)) + r")(?![\w-])"
)


def anchor(name: str) -> str:
    """The identifier of a term or a score in the page.

    >>> anchor("region of attack")
    'about-region-of-attack'
    """
    return "about-" + re.sub(r"\W+", "-", name).strip("-").lower()


def linked(text: str) -> Markup:
    """The text, escaped, with a link from the first mention of each term to its definition.

    >>> print(linked("its <margin>, and the margin again"))
    its &lt;<a class="term" href="#about-margin">margin</a>&gt;, and the margin again
    """
    parts, done, met = [], 0, set()
    for match in _PATTERN.finditer(text):
        term = WORDS[match[0]]
        if term in met:
            continue
        met.add(term)
        parts += [
            escape(text[done : match.start()]),
            Markup('<a class="term" href="#{}">{}</a>').format(anchor(term), match[0]),
        ]
        done = match.end()
    return Markup("").join([*parts, escape(text[done:])])
