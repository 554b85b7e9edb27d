"""Pictures of units: the right ones, lit where the unit is active."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dissection.test_units import planted, seeing
from tests.networks import untouched
from weakspot.dissection import ConceptSet, dissect_layers
from weakspot.dissection.unit_examples import show_units
from weakspot.report.unit_page import unit_page


def test_an_example_of_a_detector_is_active_on_its_concept(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    model = seeing((32, 32))
    result = dissect_layers(model, ["look"], dataset, quantile=0.07)["look"]
    with untouched(model):
        shown = show_units(model, result, dataset, [0, 1], count=3)
    concepts = ConceptSet.open(dataset)
    for unit in (0, 1):
        assert [one.image for one in shown[unit]] == result.top_images[unit, :3].tolist()
        for one in shown[unit]:
            annotation = concepts.annotation(one.image)
            mask = annotation.masks[(annotation.concepts == unit).nonzero()[0, 0]]
            assert float((one.active & mask).sum() / (one.active | mask).sum()) > 0.99
            assert one.pixels.shape == (3, 16, 16)
    with pytest.raises(ValueError, match="units must be between 0 and 3 for 'look', got 4"):
        show_units(model, result, dataset, [4])


def test_the_page_lists_units_that_stand_for_a_concept_and_counts_the_rest(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    model = seeing((32, 32))
    result = dissect_layers(model, ["look"], dataset, quantile=0.07)
    text = unit_page(result, {}, model="a & b", made={"layer": "<look>"})
    assert (
        "2 of 4 units detect a concept (intersection over union, IoU, of at least 0.04): green (1), red (1). "
        "The other 2 are not shown." in text
    )
    assert text.count("<tr data-unit=") == 2
    assert "a &amp; b" in text
    assert "&lt;look&gt;" in text
