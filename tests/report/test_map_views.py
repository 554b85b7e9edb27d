"""Map views: scales and sentences of maps as the page draws them."""

from __future__ import annotations

import numpy as np

from weakspot.explanations.analysis import Picture
from weakspot.report.map_views import LEAST_RATIO, MapView, _ends, worth_drawing


def test_no_scale_of_sizes_goes_beyond_the_whole_range() -> None:
    for sizes in ([0.42, 0.9], [0.3, 0.31], [0.002, 0.003], [1.0, 1.0]):
        high, low = _ends(np.array(sizes, np.float32))
        assert high <= 1
        assert high >= LEAST_RATIO * low * (1 - 1e-6)
        assert low <= np.float32(min(sizes))


def test_a_map_of_sizes_that_are_never_enough_names_no_needed_change() -> None:
    picture = Picture("Change needed in each cell, estimated")
    view = MapView("first_order", picture.title, "", picture, np.ones((4, 4), np.float32), 1.0, 0.25)
    (sentence,) = worth_drawing([view])[1].values()
    assert (
        sentence == "“Change needed in each cell, estimated” is the whole range, 255/255, or more everywhere."
    )
