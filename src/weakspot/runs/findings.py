"""Findings of a run: what holds over images, with intervals."""

from __future__ import annotations

import pandas as pd

from weakspot.runs.run import Run

CURVES = ("attack", "region", "control", "norm", "size", "fooled", "low", "high", "images")
CONTRASTS = (
    "attack", "region", "control", "region_share", "control_share", "images", "measure", "here", "there", "difference",
    "low", "high", "p", "q",
)  # fmt: skip
SCORES = (
    "attack", "region", "score", "images", "mean", "low", "high", "null", "excess", "excess_low", "excess_high", "p",
    "q",
)  # fmt: skip


def budget_curves(run: Run) -> pd.DataFrame:
    """Share of images fooled at a size or below, for every attack and region; columns `CURVES`."""
    del run
    return pd.DataFrame(columns=list(CURVES))


def region_contrasts(run: Run) -> pd.DataFrame:
    """Regions against controls of their area; columns `CONTRASTS`."""
    del run
    return pd.DataFrame(columns=list(CONTRASTS))


def score_findings(run: Run) -> pd.DataFrame:
    """Mean scores against chance; columns `SCORES`."""
    del run
    return pd.DataFrame(columns=list(SCORES))
