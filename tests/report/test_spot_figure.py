"""The figure of a weak-spot map says what its colors, its numbers and their absence mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from weakspot.report.robustness_figures import SpotView, spot_figure

ESTIMATE = (np.array([[1, 2, 4], [8, 16, np.inf]]) / 255).astype(np.float32)
VIEW = SpotView(np.full((3, 20, 30), 0.4, dtype=np.float32), ESTIMATE, (6, 2, 11))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def legend(figure: Figure) -> str:
    return figure.axes[0].get_xlabel().replace("\n", " ")


def test_the_square_is_outlined_at_the_edges_of_its_pixels() -> None:
    (outline, _) = (
        patch for patch in spot_figure(VIEW, "a", "b").axes[0].patches if isinstance(patch, Rectangle)
    )
    assert outline.get_bbox().bounds == (10.5, 1.5, 6, 6)
    assert not spot_figure(replace(VIEW, square=None), "a", "b").axes[0].patches


def test_the_scale_is_logarithmic_in_gray_levels() -> None:
    axis = spot_figure(VIEW, "a", "b").axes[1]
    assert axis.get_yscale() == "log"
    assert axis.get_ylim() == pytest.approx((1, 16))
    assert "estimated (n/255)" in axis.get_ylabel()


def test_verified_cells_are_numbered_and_missing_ones_are_said_to_be_not_found() -> None:
    sizes = np.where(np.isinf(ESTIMATE), np.nan, 1.5 * ESTIMATE).astype(np.float32)
    figure = spot_figure(replace(VIEW, sizes=sizes, max_size=32 / 255), "a", "b")
    assert texts(figure) == ["1.5", "3", "6", "12", "24", "?"]
    assert "?: not found up to 32/255." in legend(figure)
    everything = " ".join([*texts(figure), legend(figure)])
    assert "robust" not in everything
    assert "?" not in legend(spot_figure(replace(VIEW, sizes=sizes[:1]), "a", "b"))


def test_a_question_mark_is_explained_only_where_one_is_drawn() -> None:
    nothing = np.full((2, 2), np.nan, dtype=np.float32)
    many = np.pad(np.full((13, 12), 0.1, dtype=np.float32), ((0, 0), (0, 1)), constant_values=np.nan)
    for sizes in (nothing, many):
        figure = spot_figure(replace(VIEW, sizes=sizes, estimate=sizes), "a", "b")
        assert texts(figure) == []
        assert "Uncolored: not found up to 255/255." in legend(figure)


def test_nothing_is_said_of_what_is_not_drawn() -> None:
    figure = spot_figure(replace(VIEW, estimate=ESTIMATE[:1], square=None), "a", "b")
    assert legend(figure) == "Cells: the change that each needs alone, estimated from gradients."
    assert "Uncolored: none is enough to first order." in legend(spot_figure(VIEW, "a", "b"))


@pytest.mark.parametrize("size", [0.0, np.inf, 1 / 255])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 90), (3, 90, 5)])
def test_flat_maps_and_odd_images_are_drawn(size: float, shape: tuple[int, int, int]) -> None:
    view = SpotView(np.zeros(shape, dtype=np.float32), np.full((1, 1), size, dtype=np.float32), (1, 0, 0))
    figure = spot_figure(view, "$name$_{x}", "sentence with $math$")
    figure.canvas.draw()
    assert len(figure.axes) == (2 if 0 < size < 1 else 1)
