"""The papers by name, and `reproduce`."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from weakspot._checks import check_choice
from weakspot._io.files import write_atomic
from weakspot.classifier import as_classifier
from weakspot.reproduction import localized, one_pixel, perceptual, perturbation_types, spatial
from weakspot.reproduction.claims import Claim, Provenance, Reproduction, untested
from weakspot.reproduction.material import Material


class About(Protocol):
    """What the module of a paper says about it."""

    TITLE: str
    CITATION: str
    METHOD: str
    LIMITS: str
    QUOTES: Mapping[str, str]


class Claims(Protocol):
    """The claims of one paper, on one network and its images."""

    attack: str

    @property
    def claims(self) -> Mapping[str, Callable[[], Claim]]:
        """Each claim's name, and the function that measures it."""


@dataclass(frozen=True)
class Paper:
    """How to reproduce one paper."""

    about: About
    claims: Callable[[Material, Path], Claims]


TRAINS = "localized"  # the only paper that trains networks
PAPERS: Mapping[str, Paper] = {
    "spatial": Paper(spatial, lambda material, _: spatial.Spatial(material)),
    "perceptual": Paper(perceptual, lambda material, _: perceptual.Perceptual(material)),
    "localized": Paper(localized, localized.Localized),
    "promotion": Paper(perturbation_types, lambda material, _: perturbation_types.Promotion(material)),
    "one-pixel": Paper(one_pixel, lambda material, _: one_pixel.OnePixel(material)),
}


def reproduce(paper: str, material: Material, out: Path | str, *, command: str = "") -> Reproduction:
    """Test the empirical claims of a paper on your own network and images.

    Every finished claim is stored in `out`, so the same call resumes after an interruption. The same seed gives the
    same table.

    Args:
        paper: "spatial", "perceptual", "localized", "promotion" or "one-pixel".
        material: the network and the images.
        out: a folder for PAPER.json.
        command: what was typed, for the page.

    Raises:
        ValueError: if there is no such paper.
    """
    check_choice("paper", paper, PAPERS)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    key = material.training_key if paper == TRAINS else material.key
    spent = Spent(out / f".{paper}-{key}-spent.json")
    material = replace(material, store=out, log=spent.saving(material.log))
    about, tested = PAPERS[paper].about, PAPERS[paper].claims(material, out)
    claims: list[Claim] = []
    for name, measure in tested.claims.items():
        stored = out / f".{paper}-{name.replace(' ', '-')}-{key}.json"
        if not stored.exists():
            claim = untested(name, about.QUOTES[name], material.why_not) if material.why_not else measure()
            text = json.dumps(asdict(claim), ensure_ascii=False, allow_nan=False)
            write_atomic(stored, lambda part, text=text: part.write_text(text, "utf-8"))  # type: ignore[misc]
            spent.save()
        # Read back even if just measured, so that an interrupted run gives exactly the same values.
        claims.append(Claim.from_json(json.loads(stored.read_text("utf-8"))))
    seconds, cpu_seconds = spent.stored()
    result = Reproduction(
        paper=paper,
        title=about.TITLE,
        citation=about.CITATION,
        data=material.about,
        attack=tested.attack,
        size="quick" if material.quick else "full",
        seed=material.seed,
        method=about.METHOD,
        limits=about.LIMITS,
        claims=tuple(claims),
        made=Provenance(
            f"{datetime.now(UTC):%Y-%m-%d}",
            _machine(material),
            command,
            round(seconds, 1),
            round(cpu_seconds, 1),
        ),
    )
    result.to_json(out / f"{paper}.json")
    return result


def is_resumable(paper: str, material: Material, out: Path) -> bool:
    """Whether `out` holds anything that `reproduce` need not do again: claims, pieces of attacks, or networks."""
    key = material.training_key if paper == TRAINS else material.key
    patterns = [f".{paper}-*-{key}.json", f".[!.]*-{material.key}.safetensors"]
    if paper == TRAINS:
        patterns.append(f"networks-{'quick' if material.quick else 'full'}/*/*")
    return any(True for pattern in patterns for _ in out.glob(pattern))


class Spent:
    """Seconds and CPU seconds spent on a paper, in a file that outlives an interruption."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before, self.begun = self.stored(), _clocks()

    def stored(self) -> tuple[float, float]:
        """What the file says."""
        if not self.path.exists():
            return 0.0, 0.0
        seconds, cpu_seconds = json.loads(self.path.read_text())
        return seconds, cpu_seconds

    def save(self) -> None:
        """Add what this process has spent to what earlier ones had."""
        total = [
            before + now - begun
            for before, now, begun in zip(self.before, _clocks(), self.begun, strict=True)
        ]
        write_atomic(self.path, lambda part: part.write_text(json.dumps(total)))

    def saving(self, log: Callable[[str], object]) -> Callable[[str], object]:
        """A log that saves before each entry."""

        def saved(text: str) -> object:
            self.save()
            return log(text)

        return saved


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _machine(material: Material) -> str:
    """Processor, cores, threads and versions; no name of a host."""
    device = as_classifier(material.model).mean.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return (
        f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} used, {name}, "
        f"torch {torch.__version__}"
    )
