"""Files of `weakspot certify` beside the certificate: a picture of each image, and pairs that refute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weakspot.cli.app import one_line
from weakspot.cli.output import shorten_name

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.proofs import PixelCertificate

FILES = ("certificate.json", "maps", "scores.csv", "pairs.safetensors")


def picture_names(images: Sequence[str]) -> list[str]:
    """The file name of the picture of each image.

    >>> picture_names(["photos/cat.jpg", "dog.png"])
    ['0001 cat.png', '0002 dog.png']
    """
    return [f"{number:04} {Path(one_line(name)).stem}.png" for number, name in enumerate(images, start=1)]


def remove_earlier(out: Path) -> None:
    """Remove the pictures and pairs that the certificate in the folder says were written with it, nothing else."""
    from weakspot.proofs.certificate_file import CertificateFile

    try:
        earlier = CertificateFile.open(out / FILES[0])
        # A certificate against patches comes with neither.
        names = [] if earlier.of_patches else earlier.texts("names")
        refuted = bool(names and earlier.part("counterexamples", "pixels"))
    except (ValueError, OSError):
        return
    pictures = [out / FILES[1] / name for name in picture_names(names)]
    for path in (*pictures, *([out / FILES[3]] if refuted else [])):
        path.unlink(missing_ok=True)


def save_pairs(path: Path, certificate: PixelCertificate) -> None:
    """Write the pairs whose pixel differs; an image that is misclassified already has none."""
    if bool((certificate.status == -1).any()):
        pairs = certificate.counterexamples
        changed = (pairs.perturbation != 0).flatten(1).any(1)
        if bool(changed.any()):
            pairs[changed].save(path)


def draw_pictures(folder: Path, certificate: PixelCertificate, scores: pd.DataFrame) -> None:
    """Write a picture of each image."""
    from weakspot._io.files import write_atomic
    from weakspot.report.certificate_figure import CertificateView, certificate_figure

    folder.mkdir(exist_ok=True)
    for index, (picture, (_, row)) in enumerate(
        zip(picture_names(certificate.names), scores.iterrows(), strict=True)
    ):
        view = CertificateView(
            certificate.images[index].cpu().numpy(),
            certificate.status[index].cpu().numpy(),
            certificate.region[index, 0].cpu().numpy(),
        )
        figure = certificate_figure(view, shorten_name(row["image"], 60), row["sentence"])
        write_atomic(folder / picture, partial(figure.savefig, dpi=130, format="png"))
