"""Steady batches and isolation: neighbors decide nothing, failures stay where they are."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.networks import Made
from weakspot._checks import NotFiniteError
from weakspot.attacks import pgd
from weakspot.audit.work.batches import AdaptiveBatches, FixedBatchClassifier, bisect_failures
from weakspot.audit.work.shard import _without_numbers
from weakspot.classifier import Classifier, as_classifier

PARTS = (slice(0, 4), slice(4, None))  # of whole groups, as lots are


def test_logits_are_the_same_to_the_last_bit_in_any_company(any_model: Made) -> None:
    model, images = any_model
    steady = FixedBatchClassifier(as_classifier(model), 4)
    many = torch.cat([images, images.flip(3), images.flip(2)])
    with torch.no_grad():
        together = steady(many)
        torch.testing.assert_close(together, as_classifier(model)(many), rtol=1e-4, atol=1e-5)
        for count in range(1, len(many)):
            assert torch.equal(steady(many[:count]), together[:count])
        assert torch.equal(
            steady(torch.rand_like(many).index_copy(0, torch.tensor([5]), many[[5]]))[5], together[5]
        )


def test_attacks_are_the_same_to_the_last_bit_in_any_company(any_model: Made) -> None:
    model, images = any_model
    steady = FixedBatchClassifier(as_classifier(model), 4)
    many = torch.cat([images, images.flip(3)])
    with torch.no_grad():
        labels = steady(many).argmax(1)
    together = pgd(steady, many, labels, steps=3, batch_size=4).adversarial
    parts = [pgd(steady, many[rows], labels[rows], steps=3, batch_size=4).adversarial for rows in PARTS]
    assert torch.equal(together, torch.cat(parts))


def test_the_network_never_sees_another_number_of_images(pooling: Made) -> None:
    seen: set[int] = set()
    model, images = pooling
    model.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    steady = FixedBatchClassifier(Classifier.wrap(model), 2)
    steady(images)
    assert seen == {2}


def failing(bad: set[int], error: Callable[[], BaseException]) -> Callable[[Tensor], list[int]]:
    def work(rows: Tensor) -> list[int]:
        if bad & set(rows.tolist()):
            raise error()
        return rows.tolist()

    return work


@pytest.mark.parametrize("bad", [set(), {0}, {3, 7}, {8}])
def test_what_fails_is_found_and_the_rest_is_done(bad: set[int]) -> None:
    troubles: dict[int, str] = {}
    found = bisect_failures(
        failing(bad, lambda: ValueError("odd\nand more")), torch.arange(9), troubles, "work"
    )
    assert [row for _, rows in found for row in rows] == [row for row in range(9) if row not in bad]
    assert [row for rows, _ in found for row in rows.tolist()] == [row for row in range(9) if row not in bad]
    assert troubles == dict.fromkeys(sorted(bad), "work: odd")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotFiniteError("x"), "the model returned NaN or infinity"),
        (ValueError("odd"), "odd"),
        (SystemExit(0), "SystemExit: 0"),
        (OSError("no such picture"), "OSError: no such picture"),
    ],
)
def test_what_fails_everywhere_is_said_of_every_image(error: BaseException, said: str) -> None:
    troubles: dict[int, str] = {}
    assert bisect_failures(failing(set(range(4)), lambda: error), torch.arange(4), troubles, "work") == []
    assert troubles == dict.fromkeys(range(4), f"work: {said}")


def test_a_full_disk_and_an_interrupt_are_no_images_fault() -> None:
    with pytest.raises(OSError, match="full"):
        bisect_failures(failing({1}, lambda: OSError(errno.ENOSPC, "full")), torch.arange(4), {}, "work")
    with pytest.raises(KeyboardInterrupt):
        bisect_failures(failing({1}, KeyboardInterrupt), torch.arange(4), {}, "work")


@pytest.mark.parametrize("most", [1, 3, 5, 16])
def test_lots_are_halved_until_memory_holds_them(most: int) -> None:
    calls = []

    def work(rows: Tensor) -> list[int]:
        calls.append(len(rows))
        if len(rows) > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return rows.tolist()

    lots = AdaptiveBatches(None, None)
    found = lots.each(work, torch.arange(13), {}, "work")
    assert [row for _, rows in found for row in rows] == list(range(13))
    calls.clear()
    lots.each(work, torch.arange(13), {}, "work")
    assert max(calls) <= most  # what was learned is kept


def test_memory_that_does_not_hold_one_image_is_said() -> None:
    def work(rows: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    troubles: dict[int, str] = {}
    lots = AdaptiveBatches(None, None)
    assert lots.each(work, torch.arange(4), troubles, "work") == []
    assert troubles == dict.fromkeys(
        range(4), "work: OutOfMemoryError: CUDA out of memory (with 1 image at a time)"
    )
    assert lots.size is None


def test_one_image_that_memory_never_holds_makes_no_other_slower(any_model: Made) -> None:
    steady = FixedBatchClassifier(as_classifier(any_model[0]), 4)
    lots = AdaptiveBatches(None, steady)
    troubles: dict[int, str] = {}
    work = failing({5}, lambda: MemoryError("out of memory"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lots.each(work, torch.arange(9), troubles, "work")
    assert [row for rows, _ in found for row in rows.tolist()] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert troubles == {5: "work: MemoryError: out of memory (with 1 image at a time)"}
    assert (lots.size, lots.group) == (None, 4)


@pytest.mark.parametrize("places", ["image 3", "images 0, 12", "images 0, 1, 2, 5 and 9 more"])
def test_what_is_said_of_some_images_is_the_same_wherever_they_stand(places: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with _without_numbers():
            warnings.warn(
                f"the gradient of {places} is zero in the region of 30 pixels", UserWarning, stacklevel=1
            )
    assert [str(one.message) for one in told] == [
        "the gradient of some images is zero in the region of 30 pixels"
    ]
    assert told[0].category is UserWarning
