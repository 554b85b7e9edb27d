"""What a reproduction says: the words of the paper, our measurement with its control, and one of four verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weakspot._io.files import write_atomic
from weakspot.statistics.number_format import counted, p_value, percent

CONFIRMED = "confirmed"
CAUTION = "confirmed with a caution"
NOT_CONFIRMED = "not confirmed"
UNTESTED = "cannot be tested on this data"
VERDICTS = (CONFIRMED, CAUTION, NOT_CONFIRMED, UNTESTED)
LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """One empirical claim of a paper, and what was measured.

    Attributes:
        name: short, for tables.
        quote: the words of the abstract.
        measured: our measurement, with intervals.
        control: what the measurement was compared with.
        verdict: one of `VERDICTS`.
        numbers: the numbers in `measured` and `control`.
    """

    name: str
    quote: str
    measured: str
    control: str
    verdict: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.verdict.upper()}: {self.name}\n  “{self.quote}”\n  {self.measured}\n  {self.control}"


@dataclass(frozen=True)
class Reproduction:
    """The claims of one paper on one data set.

    Attributes:
        paper: short name, such as "spatial".
        citation: authors and arXiv number.
        data: what was attacked, and with which network.
        settings: attack, sizes and seed.
        claims: in the paper's order.
    """

    paper: str
    citation: str
    data: str
    settings: str
    claims: tuple[Claim, ...]

    def __str__(self) -> str:
        head = f"{self.citation}\n{self.data}; {self.settings}"
        return "\n\n".join([head, *map(str, self.claims)])

    def to_json(self, path: Path | str) -> Path:
        """Write everything to a JSON file; `read_reproduction` reads it."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomic(Path(path), lambda part: part.write_text(text, "utf-8"))
        return Path(path)

    def to_markdown(self) -> str:
        """A section for the docs: the sentences, then a table of verdicts."""
        rows = [f"| {claim.name} | {claim.verdict} |" for claim in self.claims]
        parts = [
            f"### {claim.name}\n\n> {claim.quote}\n\n**{claim.verdict.capitalize()}.** {claim.measured}\n\n"
            f"*Control:* {claim.control}"
            for claim in self.claims
        ]
        table = "\n".join(["| claim | verdict |", "|---|---|", *rows])
        return "\n\n".join([f"{self.citation}. {self.data}; {self.settings}.", table, *parts]) + "\n"


def read_reproduction(path: Path | str) -> Reproduction:
    """Read what `Reproduction.to_json` wrote.

    Raises:
        ValueError: if the file is not one of these.
    """
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        values["claims"] = tuple(Claim(**claim) for claim in values["claims"])
        return Reproduction(**values)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a stored reproduction: {error}") from None


@dataclass(frozen=True)
class Difference:
    """Two rates over the same images, and the interval of their difference in points."""

    first: float
    second: float
    low: float
    high: float
    images: int

    @classmethod
    def of(cls, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
        """Paired outcomes of the same images."""
        from weakspot.statistics import paired_proportion_interval

        _, low, high = paired_proportion_interval(first, second)
        return cls(float(first.mean()), float(second.mean()), low, high, len(first))

    @property
    def beyond_zero(self) -> bool:
        """Whether the first rate is larger beyond doubt."""
        return self.low > 0

    def __str__(self) -> str:
        points = (
            f"{100 * (self.first - self.second):+.0f} points [{100 * self.low:.0f}, {100 * self.high:.0f}]"
        )
        return f"{percent(self.first)} against {percent(self.second)}, {points}, {counted(self.images)}"


def untested(name: str, quote: str, why: str) -> Claim:
    """A claim that this data cannot decide."""
    return Claim(name, quote, why, "None was computed.", UNTESTED)


def significance(p: float, null: str) -> str:
    """The p value in words, with what it compares."""
    return f"compared with {null}: {p_value(p)}"
