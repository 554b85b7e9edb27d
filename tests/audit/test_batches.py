"""Batches: other images of a batch change no bit, and failures stay with their image."""

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
from weakspot.audit.execution.attacked_groups import _without_numbers
from weakspot.audit.execution.batches import AdaptiveBatches, FixedBatchClassifier, bisect_failures
from weakspot.classifier import Classifier, as_classifier

HALVES = (slice(0, 4), slice(4, None))  # whole groups, as in batches


def test_logits_are_bit_equal_in_any_batch(any_model: Made) -> None:
    model, images = any_model
    fixed = FixedBatchClassifier(as_classifier(model), 4)
    many = torch.cat([images, images.flip(3), images.flip(2)])
    with torch.no_grad():
        expected = fixed(many)
        torch.testing.assert_close(expected, as_classifier(model)(many), rtol=1e-4, atol=1e-5)
        for count in range(1, len(many)):
            assert torch.equal(fixed(many[:count]), expected[:count])
        assert torch.equal(
            fixed(torch.rand_like(many).index_copy(0, torch.tensor([5]), many[[5]]))[5], expected[5]
        )


def test_attacks_are_bit_equal_in_any_batch(any_model: Made) -> None:
    model, images = any_model
    fixed = FixedBatchClassifier(as_classifier(model), 4)
    many = torch.cat([images, images.flip(3)])
    with torch.no_grad():
        labels = fixed(many).argmax(1)
    expected = pgd(fixed, many, labels, steps=3, batch_size=4).adversarial
    parts = [pgd(fixed, many[rows], labels[rows], steps=3, batch_size=4).adversarial for rows in HALVES]
    assert torch.equal(expected, torch.cat(parts))


def test_the_network_always_gets_the_same_number_of_images(pooling: Made) -> None:
    seen: set[int] = set()
    model, images = pooling
    model.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    fixed = FixedBatchClassifier(Classifier.wrap(model), 2)
    fixed(images)
    assert seen == {2}


def failing(bad: set[int], error: Callable[[], BaseException]) -> Callable[[Tensor], list[int]]:
    def work(rows: Tensor) -> list[int]:
        if bad & set(rows.tolist()):
            raise error()
        return rows.tolist()

    return work


@pytest.mark.parametrize("bad", [set(), {0}, {3, 7}, {8}])
def test_failing_rows_are_isolated(bad: set[int]) -> None:
    errors: dict[int, str] = {}
    parts = bisect_failures(
        failing(bad, lambda: ValueError("odd\nand more")), torch.arange(9), errors, "work"
    )
    assert [row for _, rows in parts for row in rows] == [row for row in range(9) if row not in bad]
    assert [row for rows, _ in parts for row in rows.tolist()] == [row for row in range(9) if row not in bad]
    assert errors == dict.fromkeys(sorted(bad), "work: odd")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotFiniteError("x"), "the model returned NaN or infinity"),
        (ValueError("odd"), "odd"),
        (SystemExit(0), "SystemExit: 0"),
        (OSError("no such picture"), "OSError: no such picture"),
    ],
)
def test_every_failing_row_gets_its_reason(error: BaseException, reason: str) -> None:
    errors: dict[int, str] = {}
    assert bisect_failures(failing(set(range(4)), lambda: error), torch.arange(4), errors, "work") == []
    assert errors == dict.fromkeys(range(4), f"work: {reason}")


def test_a_full_disk_and_an_interrupt_are_raised() -> None:
    with pytest.raises(OSError, match="full"):
        bisect_failures(failing({1}, lambda: OSError(errno.ENOSPC, "full")), torch.arange(4), {}, "work")
    with pytest.raises(KeyboardInterrupt):
        bisect_failures(failing({1}, KeyboardInterrupt), torch.arange(4), {}, "work")


@pytest.mark.parametrize("most", [1, 3, 5, 16])
def test_batches_are_halved_until_memory_holds_them(most: int) -> None:
    calls = []

    def work(rows: Tensor) -> list[int]:
        calls.append(len(rows))
        if len(rows) > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return rows.tolist()

    batches = AdaptiveBatches(None)
    parts = batches.each(work, torch.arange(13), {}, "work")
    assert [row for _, rows in parts for row in rows] == list(range(13))
    calls.clear()
    batches.each(work, torch.arange(13), {}, "work")
    assert max(calls) <= most  # the size that fits is remembered


def test_too_little_memory_for_one_image_is_an_error_of_the_row() -> None:
    def work(rows: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    errors: dict[int, str] = {}
    batches = AdaptiveBatches(None)
    assert batches.each(work, torch.arange(4), errors, "work") == []
    assert errors == dict.fromkeys(
        range(4), "work: OutOfMemoryError: CUDA out of memory (with 1 image at a time)"
    )
    assert batches.size is None


def test_one_image_too_large_for_memory_does_not_shrink_later_batches(any_model: Made) -> None:
    fixed = FixedBatchClassifier(as_classifier(any_model[0]), 4)
    batches = AdaptiveBatches(fixed)
    errors: dict[int, str] = {}
    work = failing({5}, lambda: MemoryError("out of memory"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = batches.each(work, torch.arange(9), errors, "work")
    assert [row for rows, _ in parts for row in rows.tolist()] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert errors == {5: "work: MemoryError: out of memory (with 1 image at a time)"}
    assert (batches.size, batches.group) == (None, 4)


@pytest.mark.parametrize("places", ["image 3", "images 0, 12", "images 0, 1, 2, 5 and 9 more"])
def test_warnings_do_not_depend_on_the_places_of_images(places: str) -> None:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        with _without_numbers():
            warnings.warn(
                f"the gradient of {places} is zero in the region of 30 pixels", UserWarning, stacklevel=1
            )
    assert [str(one.message) for one in recorded] == [
        "the gradient of some images is zero in the region of 30 pixels"
    ]
    assert recorded[0].category is UserWarning
