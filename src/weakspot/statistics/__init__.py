"""Intervals, p values and null distributions, each checked by simulation in tests/statistics."""

from weakspot.statistics.intervals import (
    fraction_interval,
    mean_interval,
    mean_intervals,
    paired_proportion_interval,
    proportion_interval,
    rate_interval,
)
from weakspot.statistics.nulls import (
    LEAST_OTHERS,
    LEAST_REGION,
    LEAST_RUN,
    OtherImageTest,
    RunTest,
    ShiftTest,
    other_image_test,
    products_over_shifts,
    queen_lag,
    ranks,
    run_test,
    shift_test,
    standardized,
)
from weakspot.statistics.significance import false_discovery, mcnemar, mcnemar_counts, mean_test, region_test

__all__ = [
    "LEAST_OTHERS",
    "LEAST_REGION",
    "LEAST_RUN",
    "OtherImageTest",
    "RunTest",
    "ShiftTest",
    "false_discovery",
    "fraction_interval",
    "mcnemar",
    "mcnemar_counts",
    "mean_interval",
    "mean_intervals",
    "mean_test",
    "other_image_test",
    "paired_proportion_interval",
    "products_over_shifts",
    "proportion_interval",
    "queen_lag",
    "ranks",
    "rate_interval",
    "region_test",
    "run_test",
    "shift_test",
    "standardized",
]
