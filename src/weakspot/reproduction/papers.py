"""The papers by name, and `reproduce`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from weakspot._checks import check_choice
from weakspot._io.files import write_atomic
from weakspot.models.specs import fingerprint
from weakspot.reproduction import localized, one_pixel, perceptual, perturbation_types, spatial
from weakspot.reproduction.claims import Claim, Reproduction
from weakspot.reproduction.material import Material


class Claims(Protocol):
    """The claims of one paper, on one network and its images."""

    attack: str

    @property
    def claims(self) -> Mapping[str, Callable[[], Claim]]:
        """Each claim's name, and the function that measures it."""


@dataclass(frozen=True)
class Paper:
    """How to reproduce one paper."""

    citation: str
    claims: Callable[[Material, Path], Claims]


PAPERS: Mapping[str, Paper] = {
    "spatial": Paper(spatial.CITATION, lambda material, _: spatial.Spatial(material)),
    "perceptual": Paper(perceptual.CITATION, lambda material, _: perceptual.Perceptual(material)),
    "localized": Paper(localized.CITATION, localized.Localized),
    "promotion": Paper(
        perturbation_types.CITATION, lambda material, _: perturbation_types.Promotion(material)
    ),
    "one-pixel": Paper(one_pixel.CITATION, lambda material, _: one_pixel.OnePixel(material)),
}


def reproduce(paper: str, material: Material, out: Path | str) -> Reproduction:
    """Test the empirical claims of a paper on your own network and images.

    Every finished claim is stored in `out`, so the same call resumes after an interruption. The same seed
    gives the same table.

    Args:
        paper: "spatial", "perceptual", "localized", "promotion" or "one-pixel".
        material: the network and the images.
        out: a folder for PAPER.json.

    Raises:
        ValueError: if there is no such paper.
    """
    check_choice("paper", paper, PAPERS)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tested = PAPERS[paper].claims(material, out)
    key = _key(material)
    claims: list[Claim] = []
    for name, measure in tested.claims.items():
        stored = out / f".{paper}-{name.replace(' ', '-')}-{key}.json"
        if stored.exists():
            claims.append(Claim(**json.loads(stored.read_text("utf-8"))))
            continue
        claim = measure()
        text = json.dumps(asdict(claim), ensure_ascii=False)
        write_atomic(stored, lambda part, text=text: part.write_text(text, "utf-8"))  # type: ignore[misc]
        claims.append(claim)
    settings = f"{tested.attack}, {'quick' if material.quick else 'full'}, seed {material.seed}"
    result = Reproduction(paper, PAPERS[paper].citation, material.about, settings, tuple(claims))
    result.to_json(out / f"{paper}.json")
    return result


def _key(material: Material) -> str:
    """What the claims depend on: network, images, size and seed."""
    digest = hashlib.sha256(fingerprint(material.model).encode())
    digest.update(material.images.contiguous().cpu().numpy().tobytes())
    digest.update(torch.as_tensor(material.labels).cpu().numpy().tobytes())
    digest.update(f"{material.quick} {material.seed}".encode())
    return digest.hexdigest()[:12]
