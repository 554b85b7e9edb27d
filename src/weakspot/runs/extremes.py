"""Extremes: the images of a run that were fooled most easily and those that held longest, with their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from weakspot.report.run_images import overlaid, picture, pixelated
from weakspot.report.run_words import counted, heading
from weakspot.report.sections import Thumbnail
from weakspot.report.words import number
from weakspot.runs.plan import bounded_attacks
from weakspot.runs.run import Run

SHOWN = 12  # at either end
COUNTED = ("pixels",)
ASIDE = ", attacks that look for the smallest change aside"
MARGIN = "They are ranked by the least margin that any attack in any region has left them."
SIZE = (
    "They are ranked by the smallest change (L2 norm) that fooled them in any region, of "
    "the attacks that look for the smallest; those that none fooled held longest."
)


@dataclass(frozen=True, eq=False)
class Extremes:
    """Images at both ends.

    Attributes:
        easiest: fooled most easily first.
        hardest: held longest first.
        told: how many held, and by what they were ranked.
    """

    easiest: list[Thumbnail]
    hardest: list[Thumbnail]
    told: list[str]


def extremes(run: Run, shown: int = SHOWN) -> Extremes:
    """A dozen at either end; of few images none is at both."""
    # What a budget bounds says nothing by its size, nor does the change of so many pixels by any amount.
    sized = not any(attack.takes_budget() or attack.name in COUNTED for attack in run.plan.attacks)
    reported, asked = "list_contains($regions, region)", "list_contains($attacks, attack)"
    # Each image by the attack and region that brought it furthest; ties by name, so that no page differs.
    if sized:
        kept, value = (
            f"correct and success is not null and {reported}",
            "case when success then l2 else 'inf'::double end",
        )
        better = "value, margin_adversarial, attack, region"
    else:
        kept, value = (
            f"correct and success is not null and isfinite(margin_adversarial) and {reported} and {asked}",
            "margin_adversarial",
        )
        better = "value, attack, region"
    bounded = bounded_attacks(run.plan)
    every = sized or len(bounded) == len(run.plan.attacks) or not bounded
    told: dict[str, Any] = {"regions": list(run.plan.reported_regions)}
    if not sized:
        told["attacks"] = bounded or [attack.label for attack in run.plan.attacks]
    ranked = (
        f'select * exclude (place) from (select *, row_number() over (partition by "index" order by {better}) as place '
        'from (select "index", image, label_name, landed_name, attack, region, success, margin_adversarial, '
        f"{value} as value from records where {kept})) where place = 1"
    )
    count, fooled = run.sql(
        f"select count(*), count(*) filter (where success) from ({ranked})", **told
    ).fetchall()[0]
    half = min(shown, count - count // 2)
    easiest = run.sql(f'{ranked} order by value, margin_adversarial, "index" limit {half}', **told).df()
    hardest = run.sql(
        f'{ranked} order by value desc, margin_adversarial desc, "index" desc limit {min(shown, count - half)}',
        **told,
    ).df()
    drawer = _Drawer(run)
    return Extremes(
        [drawer.thumbnail(row, sized) for row in easiest.to_dict("records")],
        [drawer.thumbnail(row, sized) for row in hardest.to_dict("records")],
        [
            (
                f"Of {counted(count)} that were read rightly before, {fooled:,} were fooled in some way and "
                f"{count - fooled:,} held against everything{'' if every else ASIDE}."
            ),
            SIZE if sized else MARGIN,
        ],
    )


class _Drawer:
    """Reads the maps of an image, those that there are."""

    def __init__(self, run: Run) -> None:
        names = set(run.maps)
        self.maps = {name: run.maps[name] for name in ("clean", "adversarial", "importance") if name in names}
        self.cells = {(attack.label, region): place for place, (attack, region) in enumerate(run.plan.cells)}
        self.regions = len(run.plan.regions)

    def thumbnail(self, row: dict[str, Any], sized: bool) -> Thumbnail:
        pictures, small = [], False
        if {"clean", "adversarial"} <= set(self.maps):
            place = (int(row["index"]), *divmod(self.cells[row["attack"], row["region"]], self.regions))
            clean = self.maps["clean"][place[0]]
            small = pixelated(clean)
            pictures = [("clean", picture(clean)), ("adversarial", picture(self.maps["adversarial"][place]))]
            if "importance" in self.maps:
                pictures.append(("importance", overlaid(clean, self.maps["importance"][place])))
        return Thumbnail(str(row["image"]), _caption(row, sized), pictures, small)


def _caption(row: dict[str, Any], sized: bool) -> str:
    label, landed = (_name(row[key]) for key in ("label_name", "landed_name"))
    if not row["success"]:
        return f"{label} held under {heading(row)}; margin {number(row['margin_adversarial'])}"
    measured = f"L2 {number(row['value'])}" if sized else f"margin {number(row['margin_adversarial'])}"
    return f"{label} → {landed} under {heading(row)}; {measured}"


def _name(text: object) -> str:
    return text if isinstance(text, str) and not pd.isna(text) else "no name"
