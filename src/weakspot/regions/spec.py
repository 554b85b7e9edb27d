"""Regions as text, as people write them on a command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from weakspot._checks import unknown_choice
from weakspot.regions.activation import cam, support
from weakspot.regions.controls import matched
from weakspot.regions.masks import border, from_file
from weakspot.regions.segmentation import background

BORDER = 8  # pixels where no width is said
NAMES = ("none", "cam", "background", "border", "support")
FORMS = (
    "none, cam, background, border:WIDTH, support (of label and target), the path of a mask picture (white),"
    " or these with ~ (not), & (and), | (or) and matched: (a control of equal area) before a name or (all of it)"
)


def depends_on_fraction(text: str) -> bool:
    """Whether the region of that text is, or is made of, a share of the image: "cam" or "support".

    >>> depends_on_keep("border:4 & ~matched:cam"), depends_on_keep("border:4"), depends_on_keep("cam.png")
    (True, False, False)
    """
    return not {"cam", "support"}.isdisjoint(_words(text))


def depends_on_image(text: str) -> bool:
    """Whether the region of that text is, or is made of, one that the image decides: not a border or a file.

    >>> depends_on_image("border:4 & ~cam"), depends_on_image("border:4"), depends_on_image("background")
    (True, False, True)
    """
    return not {"cam", "support", "background"}.isdisjoint(_words(text))


def _words(text: str) -> list[str]:
    """The names in a region's text; none if it is a file."""
    if text not in NAMES and os.path.isfile(text):  # noqa: PTH113 - Path.is_file raises on long names
        return []
    return re.findall(r"[^&|~() ]+", text.replace("matched:", " "))


def read_region(
    text: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    fraction: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """The region that `text` names on these images.

    These names come before files of the same name, which ./NAME reaches.

    Args:
        text: "none" (anywhere), "cam", "background", "border:WIDTH", "support" or a mask picture's path; "~cam" for
            all but that, "matched:cam" for a control of equal area, and several joined by "&" and, after these, "|";
            "matched:(cam&background)" for a control of what several make.
        model: whose class activation counts.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) classes that "cam" and "support" are for.
        targets: (N,) the other class of "support".
        fraction: share of the image in "cam" and "support".
        seed: of "matched:".

    Returns:
        Bool (N, 1, H, W).

    Raises:
        ValueError: when it is no such text, or a term does not fit.
        FileNotFoundError: when a mask picture is not there.
    """

    def whole(_: str) -> Tensor:
        return torch.ones_like(images[:, :1], dtype=torch.bool)

    def framed(width: str) -> Tensor:
        if width and not (width.isascii() and width.isdigit() and len(width) < 6):
            raise ValueError(f"region is {text!r}; accepted after border: is a width in pixels")
        return border(images, width=int(width or BORDER))

    def supported(_: str) -> Tensor:
        if targets is None:
            raise ValueError("region is 'support', which needs a class to reach: give a target")
        return support(model, images, labels, targets, fraction=fraction)

    makers: dict[str, Callable[[str], Tensor]] = {
        "none": whole,
        "cam": lambda _: cam(model, images, labels, fraction=fraction),
        "background": lambda _: background(images, model=model, classes=labels),
        "border": framed,
        "support": supported,
    }

    def term(word: str) -> Tensor:
        bare = word.strip().lstrip("~ ")
        if word[: len(word) - len(word.lstrip(" ~"))].count("~") % 2:
            return ~term(bare)
        word = bare
        if word.startswith("matched:"):
            return matched(term(word.removeprefix("matched:")), seed=seed, images=images)
        name, _, argument = word.partition(":")
        if name in makers and (not argument or name == "border"):
            return makers[name](argument)
        if not (os.path.exists(word) or Path(word).suffix):  # noqa: PTH110 - Path.exists raises on long names
            raise ValueError(unknown_choice("region", word, NAMES, remedy=f"forms: {FORMS}"))
        return from_file(word, images).expand(len(images), -1, -1, -1)

    if text not in NAMES and os.path.isfile(text):  # noqa: PTH113 - likewise
        return from_file(text, images).expand(len(images), -1, -1, -1)
    if text.startswith("matched:(") and text.endswith(")"):
        inner = text.removeprefix("matched:(").removesuffix(")")
        whole_of_it = read_region(inner, model, images, labels, targets=targets, fraction=fraction, seed=seed)
        return matched(whole_of_it, seed=seed, images=images)
    every = torch.zeros_like(images[:, :1], dtype=torch.bool)
    for union in text.split("|"):
        both = whole("")
        for word in union.split("&"):
            both &= term(word)
        every |= both
    return every
