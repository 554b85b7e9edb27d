"""Regions as text, as users write them on the command line and in plans."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from weakspot._checks import check_batch, described, unknown_choice
from weakspot.regions.activation import cam, important_superpixels, support
from weakspot.regions.masks import border, from_file, matched
from weakspot.regions.segmentation import background

DEFAULT_WIDTH = 8  # of a border, in pixels
DEFAULT_COUNT = 100  # of superpixels
_MATCHED = "matched:"
_DONATED = re.compile(r"other:(.+)#([1-9]\d*)")


@dataclass(frozen=True)
class RegionKind:
    """A kind of region that a text can name.

    Attributes:
        make: (term, argument) -> bool (N, 1, H, W), where `term` holds the images and everything else a region is made
            from, and `argument` is what follows the colon in NAME:ARGUMENT.
        summary: which part of the image it is.
        argument: what help calls the argument; empty if the kind takes none.
        depends_on_fraction: whether its area is the given fraction of the image.
        depends_on_image: whether it is computed from the image.
    """

    make: Callable[[_Maker, str], Tensor]
    summary: str
    argument: str = ""
    depends_on_fraction: bool = False
    depends_on_image: bool = False


# The names that --region and plans take; their help and `weakspot attack --list` are written from this table.
REGIONS = {
    "none": RegionKind(lambda term, _: torch.ones_like(term.images[:, :1], dtype=torch.bool), "anywhere"),
    "cam": RegionKind(
        lambda term, _: cam(term.model, term.images, term.labels, fraction=term.fraction),
        "the --fraction of the image with the most evidence for the label",
        depends_on_fraction=True,
        depends_on_image=True,
    ),
    "superpixels": RegionKind(
        lambda term, count: term.superpixels(count),
        f"whole superpixels with the most evidence for the label, up to the --fraction of the image; about "
        f"{DEFAULT_COUNT} pieces, or superpixels:COUNT",
        argument="COUNT",
        depends_on_fraction=True,
        depends_on_image=True,
    ),
    "background": RegionKind(
        lambda term, _: background(term.images, model=term.model, classes=term.labels),
        "outside the object (a threshold on gray images, GrabCut on color)",
        depends_on_image=True,
    ),
    "border": RegionKind(
        lambda term, width: term.border(width),
        f"a frame of {DEFAULT_WIDTH} pixels, or border:WIDTH",
        argument="WIDTH",
    ),
    "support": RegionKind(
        lambda term, _: term.support(),
        "most evidence for the label or the target, each the --fraction of the image; needs --target",
        depends_on_fraction=True,
        depends_on_image=True,
    ),
}


def region_forms() -> list[str]:
    """How each kind is written, as in border:WIDTH."""
    return [f"{name}:{kind.argument}" if kind.argument else name for name, kind in REGIONS.items()]


@dataclass(frozen=True)
class RegionSpec:
    """A region as text, and the region that it is a control for.

    Attributes:
        text: as `read_region` takes it; `str(spec)` returns it.
        control_of: the region that this one is compared with, or None if it is no control.
        donor: for a control that is the same kind of region made on another image: the number of that image among
            those drawn for each image, from 1. None for controls that are shifted within the image.

    >>> control = RegionSpec.parse("matched:(cam&border:4)")
    >>> str(control.control_of), control.is_control, control.control_of.is_control
    ('cam&border:4', True, False)
    >>> str(RegionSpec.parse("cam").shifted()), str(RegionSpec.parse("~cam").of_other_image(2))
    ('matched:cam', 'other:(~cam)#2')
    """

    text: str
    control_of: RegionSpec | None = None
    donor: int | None = None

    @classmethod
    def parse(cls, text: str) -> RegionSpec:
        """Parse the text; whether its names and files exist is checked when the region is made."""
        text = text.strip()
        if _is_file(text):
            return cls(text)
        donated = _DONATED.fullmatch(text)
        if donated is not None:
            return cls(text, cls.parse(_without_parentheses(donated[1])), int(donated[2]))
        inner = text.removeprefix(_MATCHED)
        # "matched:cam & border" intersects a control with a border: only a control as a whole is a control.
        if inner != text and (_without_parentheses(inner) != inner or not {"&", "|"} & set(inner)):
            return cls(text, cls.parse(_without_parentheses(inner)))
        return cls(text)

    def __str__(self) -> str:
        return self.text

    @property
    def is_control(self) -> bool:
        """Whether the region exists only to be compared with another."""
        return self.control_of is not None

    @property
    def depends_on_fraction(self) -> bool:
        """Whether the region contains one whose area is a given fraction of the image, such as "cam"."""
        return any(kind.depends_on_fraction for kind in _kinds(self.text))

    @property
    def depends_on_image(self) -> bool:
        """Whether the region contains one that is computed from the image: not only borders and files."""
        return any(kind.depends_on_image for kind in _kinds(self.text))

    def shifted(self) -> RegionSpec:
        """The control of equal area within the same image, made by `regions.matched`."""
        return RegionSpec(f"{_MATCHED}{_enclosed(self.text)}", self)

    def of_other_image(self, number: int) -> RegionSpec:
        """The control that is this region as made on another image: the first, second, ... drawn for each image."""
        return RegionSpec(f"other:{_enclosed(self.text)}#{number}", self, number)


def read_region(
    region: str | RegionSpec,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    fraction: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """Make the region that a text names, on these images.

    A name takes precedence over a file of the same name; ./NAME reaches the file.

    Args:
        region: a name of `REGIONS`, such as "none" (anywhere), "cam" or "border:WIDTH", or the path of a mask
            picture; "~cam" for everything else, "matched:cam" for a control of equal area. Terms are joined by "&",
            which binds more tightly, and "|"; "matched:(cam&background)" is a control of the whole expression.
        model: the classifier whose class activation "cam", "superpixels", "support" and "background" use.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) classes that "cam", "superpixels" and "support" are for.
        targets: (N,) the second class of "support".
        fraction: fraction of the image in "cam" and "support", and at most in "superpixels", 0 to 1.
        seed: of "matched:".

    Returns:
        Bool (N, 1, H, W).

    Raises:
        ValueError: if the text cannot be parsed or a term does not fit.
        FileNotFoundError: if a mask picture does not exist.
    """
    spec = RegionSpec.parse(region) if isinstance(region, str) else region
    if not isinstance(spec, RegionSpec):
        raise ValueError(f"region must be the text of a region, such as cam, got {described(spec)}")
    check_batch(images)
    return _Maker(spec.text, model, images, labels, targets, fraction, seed).make(spec)


@dataclass(frozen=True)
class _Maker:
    """What every term of a region's text is made from; `text` is the whole, for messages."""

    text: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    fraction: float
    seed: int

    def make(self, spec: RegionSpec) -> Tensor:
        """The region of a spec, which may be a part of the text."""
        # Regions of other images are made by audits, which have these images.
        if spec.control_of is not None and spec.donor is None:
            return matched(self.make(spec.control_of), seed=self.seed, images=self.images)
        if _is_file(spec.text):
            return self.from_file(spec.text)
        union = torch.zeros_like(self.images[:, :1], dtype=torch.bool)
        # & binds more tightly than |.
        for alternative in spec.text.split("|"):
            intersection = torch.ones_like(union)
            for term in alternative.split("&"):
                intersection &= self.term(term)
            union |= intersection
        return union

    def term(self, text: str) -> Tensor:
        word = text.strip().lstrip("~ ")
        negations = text[: len(text) - len(text.lstrip(" ~"))].count("~")
        if word.startswith(_MATCHED):
            region = self.make(RegionSpec(word, RegionSpec.parse(word.removeprefix(_MATCHED))))
        else:
            region = self.named(word)
        return ~region if negations % 2 else region

    def named(self, word: str) -> Tensor:
        kind = _kind(word)
        if kind is not None:
            return kind.make(self, word.partition(":")[2])
        exists = os.path.exists(word)  # noqa: PTH110 - Path.exists raises on long names
        name, colon, _ = word.partition(":")
        if colon and name in REGIONS and not exists:
            remedy = (
                "the fraction sets its area" if REGIONS[name].depends_on_fraction else "nothing follows it"
            )
            raise ValueError(f"region must be {name}, got {self.text!r} ({remedy})")
        # A word with a suffix is meant as a file; if there is none, reading it says so.
        if not (exists or Path(word).suffix):
            forms = ", ".join(form for form in region_forms() if ":" in form)
            remedy = f"or {forms}, a mask picture, or these with ~, &, | and matched:"
            raise ValueError(unknown_choice("region", self.text, REGIONS, remedy=remedy))
        return self.from_file(word)

    def border(self, width: str) -> Tensor:
        return border(
            self.images, width=self.number(width, "border:WIDTH with a width in pixels", DEFAULT_WIDTH)
        )

    def superpixels(self, count: str) -> Tensor:
        number = self.number(count, "superpixels:COUNT with a number of pieces", DEFAULT_COUNT)
        return important_superpixels(
            self.model, self.images, self.labels, fraction=self.fraction, count=number
        )

    def number(self, text: str, form: str, default: int) -> int:
        """The number after the colon of a term, or the default if there is none."""
        if text and not (text.isascii() and text.isdigit() and len(text) < 6):
            raise ValueError(f"region must be {form}, got {self.text!r}")
        return int(text or default)

    def support(self) -> Tensor:
        if self.targets is None:
            raise ValueError("region must not be support without a class to reach (give a target)")
        return support(self.model, self.images, self.labels, self.targets, fraction=self.fraction)

    def from_file(self, path: str) -> Tensor:
        return from_file(path, self.images).expand(len(self.images), -1, -1, -1)


def _is_file(text: str) -> bool:
    return text not in REGIONS and os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises on long names


def _kind(word: str) -> RegionKind | None:
    """The kind that a word names, as NAME or, if the kind takes an argument, NAME:ARGUMENT."""
    name, colon, _ = word.partition(":")
    kind = REGIONS.get(name)
    return kind if kind is not None and (kind.argument or not colon) else None


def _kinds(text: str) -> list[RegionKind]:
    """The kinds of region in a region's text; none if the text is the path of a file."""
    if _is_file(text):
        return []
    # The prefixes of controls and the number of a donor are not names of kinds.
    words = re.findall(r"[^&|~() ]+", re.sub(r"\b(matched|other):|#\d+$", " ", text))
    return [kind for kind in map(_kind, words) if kind is not None]


def _enclosed(text: str) -> str:
    return f"({text})" if {"&", "|", "~"} & set(text) else text


def _without_parentheses(text: str) -> str:
    """The text without a pair of parentheses around all of it."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            # The first parenthesis is closed here.
            return text[1:-1] if text.startswith("(") and at == len(text) - 1 else text
    return text
