"""Certificates in sentences. Each names what was proven, of which colors or patches, and of which classifier."""

from collections.abc import Callable, Sequence

from weakspot.proofs.allowed_colors import AllowedColors
from weakspot.proofs.certificate import PROVEN, REFUTED, UNKNOWN, PixelCertificate
from weakspot.proofs.two_masks import PatchCertificate
from weakspot.statistics.number_format import counted

Name = Callable[[int], str]  # of a class, by its number, as `Classifier.class_name`


def color_words(colors: AllowedColors) -> str:
    """One of the allowed colors: "color", "8-bit color within 8/255 of the pixel's own"."""
    return str(colors).replace("colors", "color", 1)


def pixel_sentence(
    certificate: PixelCertificate, image: int, before: int, name: Name = "class {}".format
) -> str:
    """What is known of the pixels of one image.

    Args:
        certificate: of pixels.
        image: its number.
        before: class of the image without a change.
        name: of a class.
    """
    one, label = certificate, int(certificate.labels[image])
    if before != label:
        return (
            f"The image is classified as '{name(before)}', not as '{name(label)}', to begin "
            "with; there is nothing to prove."
        )
    inside = one.region[image, 0]
    total = int(inside.sum())
    if not total:
        return "The region holds no pixel."
    proven, refuted, unknown = (
        int(((one.status[image] == status) & inside).sum()) for status in (PROVEN, REFUTED, UNKNOWN)
    )
    turns, color = f"turns '{name(label)}' into another class", color_words(one.colors)
    where = "all " if proven == total > 1 else "" if proven == total else f"{proven:,} of "
    part = "" if bool(inside.all()) else " of the region"
    parts = [f"At {where}{counted(total, 'pixel')}{part}, no {color} {turns} (proven, {one.statement})"]
    if not proven:
        parts = [f"No pixel{part} is proven ({one.statement})"]
    if refuted:
        one_of_them = "one does" if proven else f"{_article(color)} {color} {turns}"
        parts.append(f"at {f'{refuted:,}' if proven else counted(refuted, 'pixel')}, {one_of_them}")
    if unknown:
        parts.append(_unknown(one, image, unknown))
    return "; ".join(parts) + "."


def _article(color: str) -> str:
    return "an" if color.startswith("8") else "a"


def _unknown(one: PixelCertificate, image: int, unknown: int) -> str:
    """How many pixels are unknown for each reason, most frequent first."""
    inside = one.region[image, 0]
    counts = [
        (int(((one.reason[image] == number) & inside).sum()), reason)
        for number, reason in enumerate(one.reasons)
    ]
    counts = sorted((count, reason) for count, reason in counts if count)[::-1]
    parts = [f"{count:,} because {reason}" for count, reason in counts]
    if len(parts) == 1:
        return f"{unknown:,} {'is' if unknown == 1 else 'are'} unknown, because {counts[0][1]}"
    return f"{unknown:,} {'is' if unknown == 1 else 'are'} unknown: {', '.join(parts)}"


def pixels_summary(certificate: PixelCertificate, correct: Sequence[bool]) -> str:
    """One sentence on all images.

    Args:
        certificate: of pixels.
        correct: of each image, whether it is classified as its label without a change.
    """
    rows = [row for row, right in enumerate(correct) if right]
    if not rows:
        return "No image is classified as its label; there is nothing to prove."
    inside = certificate.region[rows, 0]
    total = int(inside.sum())
    proven, refuted, unknown = (
        int(((certificate.status[rows] == status) & inside).sum()) for status in (PROVEN, REFUTED, UNKNOWN)
    )
    weak = int(((certificate.status[rows] == REFUTED) & inside).flatten(1).any(1).sum())
    noun = "image" if all(correct) else "correctly classified image"
    part = "" if bool(inside.all()) else " of the region"
    return (
        f"Of {counted(total, 'pixel')}{part} in {counted(len(rows), noun)}, each alone in any "
        f"{color_words(certificate.colors)}: {proven:,} proven ({certificate.statement}), {refuted:,} refuted, "
        f"{unknown:,} unknown; a color that changes the class was found in {counted(weak)}."
    )


def patch_sentence(certificate: PatchCertificate, image: int, name: Name = "class {}".format) -> str:
    """Whether one image is certified against patches, and what prevents it.

    Args:
        certificate: against patches.
        image: its number.
        name: of a class.
    """
    one, label = certificate, int(certificate.labels[image])
    words = f"'{name(label)}'"
    if bool(one.certified[image]):
        return f"Behind double masking, no patch of up to {one.masks.words} turns {words} into another class."
    predicted = int(one.predicted[image])
    if predicted != label:
        return (
            f"Not certified: behind double masking, the image is classified as '{name(predicted)}', not as "
            f"{words}, without any patch."
        )
    tops, lefts = one.masks.places(one.images.device)
    height, width = one.masks.mask
    places = [
        f"rows {int(tops[number])} to {int(tops[number]) + height - 1} and columns {int(lefts[number])} to "
        f"{int(lefts[number]) + width - 1}"
        for number in dict.fromkeys(one.pair[image].tolist())
    ]
    how = "loses to another class" if float(one.margin[image]) < 0 else "is too near to another class"
    return f"Not certified: with {' and with '.join(places)} hidden, {words} {how}."
