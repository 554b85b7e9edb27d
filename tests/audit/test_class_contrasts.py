"""Single classes: a planted weak class and region are found; without one, nobody is accused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from benchmarks.gallery_run import PLANTED, synthetic_run
from weakspot.audit.findings.class_contrasts import UNCONTROLLED, class_contrasts, compare_classes
from weakspot.statistics import LEAST_REGION, proportion_interval

CONTROLLED = ("none", "cam", "matched:cam", *(f"other:cam#{number}" for number in range(1, 4)))


def counts_of(images: np.ndarray, hits: np.ndarray) -> pd.DataFrame:
    labels = np.arange(len(images))
    return pd.DataFrame(
        {
            "label": labels,
            "name": labels.astype(str),
            "attack": "pgd",
            "region": "cam",
            "images": images,
            "hits": hits,
        }
    )


def test_numbers_equal_the_closed_forms_class_by_class() -> None:
    images, hits = np.array([50, 40, 3, 200, 60]), np.array([50, 0, 2, 77, 20])
    table = compare_classes(counts_of(images, hits))
    for place, row in enumerate(table.to_dict("records")):
        own = np.arange(images[place]) < hits[place]
        rest = np.arange(images.sum() - images[place]) < hits.sum() - hits[place]
        assert (row["fooled"], row["low"], row["high"]) == pytest.approx(proportion_interval(own))
        assert (row["rest"], row["rest_low"], row["rest_high"]) == pytest.approx(proportion_interval(rest))
        square = [[own.sum(), (~own).sum()], [rest.sum(), (~rest).sum()]]
        above, below = (fisher_exact(square, alternative=side).pvalue for side in ("greater", "less"))
        if images[place] < LEAST_REGION:
            assert np.isnan(row["p"])
        else:
            assert row["p"] == pytest.approx(min(1, 2 * min(above, below)))


def test_without_a_weak_class_hardly_any_run_accuses_one() -> None:
    rng = np.random.default_rng(0)
    accused = 0
    for _ in range(400):
        images = rng.integers(30, 120, 20)
        accused += int(compare_classes(counts_of(images, rng.binomial(images, 0.35)))["weak_class"].any())
    assert accused <= 12  # 3%: fewer than the 5% that q allows, as the intervals must not overlap either


def test_a_planted_class_is_found_and_a_robust_one_is_not_called_weak() -> None:
    images = np.full(10, 80)
    hits = np.array([24] * 8 + [64, 2])
    table = compare_classes(counts_of(images, hits))
    assert table.index[table["weak_class"]].tolist() == [8]


@pytest.mark.parametrize(
    ("images", "hits"),
    [
        ([50], [25]),
        ([1, 1], [1, 0]),
        ([39, 400], [39, 0]),
        ([100, 100], [0, 0]),
        ([100, 100], [100, 100]),
        ([], []),
    ],
)
def test_odd_counts_are_never_called_weak(images: list[int], hits: list[int]) -> None:
    table = compare_classes(counts_of(np.array(images, int), np.array(hits, int)))
    assert not table["weak_class"].any()


def test_a_difference_below_five_points_is_not_called_weak() -> None:
    table = compare_classes(counts_of(np.array([100_000, 100_000]), np.array([34_000, 30_000])))
    assert table["q"].max() < 1e-9
    assert not table["weak_class"].any()


def test_a_run_with_a_planted_class_names_it_alone(tmp_path: Path) -> None:
    fractions: list[float] = []
    found = class_contrasts(
        synthetic_run(tmp_path / "run", 1500, classes=10, planted=0.5, regions=CONTROLLED), fractions.append
    )
    weak = found.table[found.table["weak_class"]]
    assert set(weak["name"]) == {PLANTED}
    assert set(weak["region"]) == {"cam"}
    regions = found.table[found.table["weak_region"]]
    assert set(zip(regions["name"], regions["region"], strict=True)) == {(PLANTED, "cam")}
    assert len(found.sentences) == 4
    assert all(sentence.startswith(f"Images of {PLANTED}") for sentence in found.sentences)
    assert "of other classes (q < .001)." in found.sentences[0]
    assert found.sentences[-1].endswith("Verdict: a weak region.")
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert found.table["name"].iloc[0] == PLANTED  # weakest first


def test_a_run_without_a_weak_class_accuses_nobody(tmp_path: Path) -> None:
    found = class_contrasts(synthetic_run(tmp_path / "run", 1500, classes=10, regions=CONTROLLED))
    assert not found.table["weak_class"].any()
    assert not found.table["weak_region"].any()
    assert [sentence.partition(" (")[0] for sentence in found.sentences] == [
        "No class was shown to be fooled more often than the others",
        "No region was shown to be weak for a single class",
    ]


def test_few_images_and_no_controls_are_named_as_the_reason(tmp_path: Path) -> None:
    found = class_contrasts(synthetic_run(tmp_path / "run", 40, classes=10, planted=0.7))
    assert found.sentences[0].startswith("No class was compared with the others: that needs 40 ")
    assert found.sentences[1] == UNCONTROLLED
