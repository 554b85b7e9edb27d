"""What a reproduction says: the words of the paper, our measurement with its control, and one of four verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from weakspot._io.files import write_atomic
from weakspot.reproduction.claim_panels import Panel, draw
from weakspot.statistics import paired_proportion_interval
from weakspot.statistics.number_format import counted, number, p_value, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIRMED = "confirmed"
CAUTION = "confirmed with a caution"
NOT_CONFIRMED = "not confirmed"
UNTESTED = "cannot be tested on this data"
VERDICTS = (CONFIRMED, CAUTION, NOT_CONFIRMED, UNTESTED)
LEVEL = 0.05
# Points by which a rate must exceed its control: less is found in networks without learning too.
SMALLEST = 0.05
KINDS: Mapping[str, Callable[[float], str]] = {
    "fraction": percent,
    "number": number,
    "p": lambda value: p_value(value, ""),
}
One = TypeVar("One")


@dataclass(frozen=True)
class Measurement:
    """One number, for the table of a claim.

    Attributes:
        name: what was measured.
        value: None if it is not defined.
        low: lower end of the 95% interval, if there is one.
        high: upper end.
        images: over how many images.
        kind: how it is written, a key of `KINDS`.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    images: int | None = None
    kind: str = "fraction"

    def __post_init__(self) -> None:
        # JSON has no NaN.
        for one in ("value", "low", "high"):
            given = getattr(self, one)
            if given is not None:
                object.__setattr__(self, one, None if math.isnan(given) else round(float(given), 6))

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, value, interval and number of images, as a table shows them."""
        write = KINDS[self.kind]
        value = "not defined" if self.value is None else write(self.value)
        ends = [] if self.low is None or self.high is None else [write(self.low), write(self.high)]
        return self.name, value, " to ".join(ends), "" if self.images is None else f"{self.images:,}"


@dataclass(frozen=True)
class Claim:
    """One empirical claim of a paper, and what was measured.

    Attributes:
        name: short, for tables.
        quote: the words of the abstract.
        measured: our measurement, with intervals.
        control: what the measurement was compared with.
        verdict: one of `VERDICTS`.
        table: the numbers in `measured` and `control`.
        panels: their pictures, as plain data.
    """

    name: str
    quote: str
    measured: str
    control: str
    verdict: str
    table: tuple[Measurement, ...] = ()
    panels: tuple[Panel, ...] = ()

    def __str__(self) -> str:
        return f"{self.verdict.upper()}: {self.name}\n  “{self.quote}”\n  {self.measured}\n  {self.control}"

    def value(self, name: str) -> float:
        """The measurement of this name; NaN if it is not defined."""
        values = {one.name: one.value for one in self.table}
        value = values[name]
        return math.nan if value is None else value

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Self:
        """The claim that `dataclasses.asdict` took apart."""
        given = dict(values)
        table = tuple(_build(Measurement, one) for one in _listed(given.pop("table")))
        panels = tuple(Panel.from_json(one) for one in _listed(given.pop("panels")))
        return _build(cls, {**given, "table": table, "panels": panels})


@dataclass(frozen=True)
class Provenance:
    """How a reproduction was made.

    Attributes:
        date: of its end, as in 2026-11-23.
        machine: processor, cores and versions.
        command: what was typed; empty if it was called from Python.
        seconds: of work, over all pieces of an interrupted run.
        cpu_seconds: of the process, over all pieces.
    """

    date: str
    machine: str
    command: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Reproduction:
    """The claims of one paper on one data set.

    Attributes:
        paper: short name, such as "spatial".
        title: of the paper.
        citation: authors and arXiv number.
        data: what was attacked, and with which network.
        attack: how.
        size: "quick" or "full".
        seed: of all random numbers.
        method: what was measured, in five sentences.
        limits: what the numbers do not say.
        claims: in the paper's order.
        made: when, where and how long. Two reproductions that differ in nothing else are equal.
    """

    paper: str
    title: str
    citation: str
    data: str
    attack: str
    size: str
    seed: int
    method: str
    limits: str
    claims: tuple[Claim, ...]
    made: Provenance = field(compare=False)

    def __str__(self) -> str:
        head = f"{self.citation}\n{self.data}; {self.attack}, {self.size}, seed {self.seed}"
        return "\n\n".join([head, *map(str, self.claims)])

    def figure(self) -> Figure:
        """All panels of the claims side by side.

        Raises:
            ValueError: if no claim has a panel.
        """
        return draw([panel for claim in self.claims for panel in claim.panels])

    @property
    def drawn(self) -> bool:
        """Whether there is a figure."""
        return any(claim.panels for claim in self.claims)

    def to_json(self, path: Path | str) -> Path:
        """Write everything to a JSON file; `read_reproduction` reads it."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(Path(path), lambda part: part.write_text(text, "utf-8"))
        return Path(path)


def read_reproduction(path: Path | str) -> Reproduction:
    """Read what `Reproduction.to_json` wrote.

    Raises:
        ValueError: if the file is not one of these.
    """
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        values["claims"] = tuple(Claim.from_json(claim) for claim in values["claims"])
        values["made"] = _build(Provenance, values["made"])
        return _build(Reproduction, values)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a stored reproduction: {error}") from None


def _build(kind: type[One], values: Mapping[str, object]) -> One:
    """A dataclass from its fields, all of them."""
    missing = {one.name for one in fields(kind)} - set(values)  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    return kind(**values)


def _listed(values: object) -> Sequence[Mapping[str, object]]:
    if not isinstance(values, list):
        raise TypeError("a list was expected")
    return values


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
        _, low, high = paired_proportion_interval(first, second)
        return cls(float(first.mean()), float(second.mean()), low, high, len(first))

    @property
    def beyond_zero(self) -> bool:
        """Whether the first rate is larger beyond doubt, and by at least `SMALLEST`."""
        return self.low > 0 and self.first - self.second >= SMALLEST

    def table(self, first: str, second: str) -> tuple[Measurement, ...]:
        """Both rates and their difference."""
        images = self.images
        return (
            Measurement(first, self.first, images=images),
            Measurement(second, self.second, images=images),
            Measurement("difference", self.first - self.second, self.low, self.high, images, "number"),
        )

    def __str__(self) -> str:
        points = (
            f"{100 * (self.first - self.second):+.0f} points [{100 * self.low:.0f}, {100 * self.high:.0f}]"
        )
        return f"{percent(self.first)} against {percent(self.second)}, {points}, {counted(self.images)}"


def too_few(found: int, noun: str, verb: str, needed: int) -> str:
    """Why a claim is not tested, as in "Only 1 attack succeeds; 10 are needed."

    Args:
        found: how many there are.
        noun: of what.
        verb: what they do, with a plural; "s" is added for one, and "have" becomes "has".
        needed: how many the test takes.
    """
    one = "has" + verb.removeprefix("have") if verb.startswith("have") else f"{verb}s"
    return f"Only {counted(found, noun)} {one if found == 1 else verb}; {needed} are needed."


def untested(name: str, quote: str, why: str) -> Claim:
    """A claim that this data cannot decide."""
    return Claim(name, quote, why, "None was computed.", UNTESTED)
