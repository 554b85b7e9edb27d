"""The figure of a certificate: each pixel is drawn as what it is, also without color."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from weakspot.report.robustness_figures import CertificateView, certificate_figure

STATUS = np.array([[1, 1, 0, 0], [1, -1, 0, 1], [-1, 1, 1, 1]], dtype=np.int8)
REGION = np.ones((3, 4), dtype=bool)
REGION[0, 0] = False
VIEW = CertificateView(np.full((3, 3, 4), 0.4, dtype=np.float32), STATUS, REGION)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_three_kinds_differ_in_lightness() -> None:
    chart = certificate_figure(VIEW, "a", "b").axes[1]
    drawn = np.asarray(chart.images[0].get_array())
    lightness = drawn @ [0.2126, 0.7152, 0.0722]
    proven, unknown, refuted = (lightness[REGION & (status == STATUS)] for status in (1, 0, -1))
    outside = lightness[~REGION]
    for group in (proven, unknown, refuted, outside):
        assert np.ptp(group) == 0
    assert outside[0] > proven[0] > unknown[0] + 0.15 > refuted[0] + 0.3


def test_refuted_pixels_have_crosses_and_unknown_ones_are_hatched() -> None:
    figure = certificate_figure(VIEW, "a", "b")
    chart = figure.axes[1]
    hatched, crosses = chart.collections
    assert np.asarray(crosses.get_offsets()).tolist() == [[1, 1], [0, 2]]  # column, row
    paths = hatched.get_paths()
    for row in range(3):
        for column in range(4):
            inside = any(path.contains_point((column, row)) for path in paths)
            assert inside == (STATUS[row, column] == 0 and REGION[row, column]), (row, column)
    assert legend(figure) == ["proven: 6", "unknown: 3", "refuted: 2", "not asked about"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (3, 7, 300)])
def test_any_size_is_drawn(shape: tuple[int, int, int]) -> None:
    status = np.zeros(shape[1:], dtype=np.int8)
    status[0, 0] = -1
    view = CertificateView(np.random.default_rng(0).random(shape).astype(np.float32), status, status > -2)
    figure = certificate_figure(view, "$name$", "A sentence.")
    figure.canvas.draw()
    assert legend(figure) == ["proven: 0", f"unknown: {status.size - 1:,}", "refuted: 1"]
