"""Attacks that are erased in a place: the decision then, the place beside it, and what is said about both."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.explorer.benches import SIZE, picture_of, png, square
from tests.explorer.test_places import ask, assert_told, attacked, logits_of, mask_in
from weakspot.classifier import Classifier
from weakspot.explorer.bench import Bench
from weakspot.explorer.desk import Desk
from weakspot.explorer.place_edits import Erased, comparable_place, undo_sentence
from weakspot.logits import margin


def test_an_erased_place_has_its_clean_pixels_back(desk: Desk) -> None:
    with pytest.raises(ValueError, match="attack the image first"):
        ask(desk, "undo_place", mask=png(square()))
    attacked(desk)
    pair, mask = desk.bench.exhibit(0).pair, square(4, 4, 8)
    assert pair is not None
    told = ask(desk, "undo_place", mask=png(mask))
    assert_told(desk, told, torch.where(mask, pair.clean, pair.adversarial))
    control = told["control"]
    assert isinstance(control, dict)
    place = mask_in(control)
    assert int(place.sum()) == 64
    assert not bool((place & mask).any())
    other = logits_of(desk, torch.where(place, pair.clean, pair.adversarial))
    label = desk.bench.exhibit(0).label_tensor
    assert control["margin"] == pytest.approx(float(margin(other[None], label)), abs=1e-4)
    assert picture_of(told["png"]).size == SIZE[::-1]
    # Without any perturbation, the decision is that of the clean image, and no other place is left to compare.
    whole = ask(desk, "undo_place", mask=png(torch.ones(1, 1, *SIZE, dtype=torch.bool)))
    assert_told(desk, whole, pair.clean)
    assert whole["control"] is None


def test_a_comparable_place_is_found_by_trying_every_shift() -> None:
    generator = torch.Generator().manual_seed(5)
    for density in (0.1, 0.5, 1.0):
        changed = torch.rand(1, 1, 9, 7, generator=generator) < density
        mask = square(1, 2, 3, (9, 7))
        own = int((mask & changed).sum())
        best = min(
            (
                abs(int((moved & changed).sum()) - own)
                for moved in (
                    mask.roll((down, right), (2, 3)) for down, right in itertools.product(range(9), range(7))
                )
                if not bool((moved & mask).any())
            ),
        )
        place = comparable_place(mask, changed, 0)
        if best > 0.1 * own or not own:
            assert place is None
        else:
            assert place is not None
            assert abs(int((place & changed).sum()) - own) == best
            assert not bool((place & mask).any())


def erased(*, restored: bool, pixels: int = 9) -> Erased:
    return Erased(torch.zeros(1), pixels, 1.0 if restored else -1.0, restored, "cat" if restored else "lynx")


def test_no_sentence_on_an_erased_place_claims_more_than_was_seen() -> None:
    yes, no = erased(restored=True), erased(restored=False)
    assert "one other place is no test" in undo_sentence(yes, no, -3.0, 90, changed=True)
    assert "another place, it is restored" in undo_sentence(yes, yes, -3.0, 90, changed=True)
    alone = undo_sentence(yes, None, -3.0, 90, changed=True)
    assert "nothing to compare" in alone
    # Places that overlap it, or of another shape, are not looked at.
    assert (
        "No place of its shape that lies outside it holds about as many changed pixels (within 10%)" in alone
    )
    assert "Without about as many" in undo_sentence(yes, no, -3.0, 90, changed=True)
    assert "the decision is not restored" in undo_sentence(no, no, -3.0, 90, changed=True)
    assert "none to restore" in undo_sentence(yes, no, 3.0, 90, changed=False)
    assert "changes nothing in this place" in undo_sentence(
        erased(restored=True, pixels=0), None, -3.0, 90, changed=True
    )


class Lightness(nn.Module):
    """Three classes, dark, medium and light, whatever else is in the image."""

    def forward(self, images: Tensor) -> Tensor:
        return -10 * (images.mean((1, 2, 3))[:, None] - torch.tensor([0.2, 0.5, 0.8])).abs()


def test_restored_is_the_decision_on_the_clean_image_even_if_it_was_wrong() -> None:
    classifier = Classifier.wrap(Lightness().eval(), input_size=SIZE, class_names=["dark", "medium", "light"])
    bench = Bench(classifier)
    bench.add(torch.full((1, 3, *SIZE), 0.6), ["gray"], torch.tensor([0]))
    desk = Desk(bench)
    try:
        attacked(desk, target=2)
        told = ask(desk, "undo_place", mask=png(square(0, 0, 20)))
        assert str(told["sentence"]).startswith(
            "The image is misclassified as medium without an attack. Without the perturbation in this place, where "
            "83% of the changed pixels are, the decision is restored (medium, "
        )
        attacked(desk, target=2, budget="linf:4/255")
        told = ask(desk, "undo_place", mask=png(square(0, 0, 20)))
    finally:
        desk.close()
    assert "does not change the decision, so that there is none to restore" in str(told["sentence"])
