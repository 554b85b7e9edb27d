"""Two-mask certificates: covers by brute force, every patch against the masked classifier, planted triggers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, Made, Wrapped, seeded, untouched
from weakspot.classifier import Classifier, evaluating
from weakspot.proofs import DoubleMasking, MaskSet, PatchCertificate, certify_patches
from weakspot.proofs.mask_set import NONE, MaskedImage
from weakspot.proofs.two_masks import SLACK

CORNER = 6  # side of the images of planted networks


def patched_images(image: Tensor, side: int, contents: Tensor) -> Tensor:
    """(P * M, C, H, W) the image with each content (M, C, side, side) at each of P places."""
    _, height, width = image.shape
    made = []
    for top, left in itertools.product(range(height - side + 1), range(width - side + 1)):
        copies = image.repeat(len(contents), 1, 1, 1)
        copies[:, :, top : top + side, left : left + side] = contents
        made.append(copies)
    return torch.cat(made)


def black_and_white(side: int) -> Tensor:
    """(2^(side * side), 1, side, side) every patch of black and white pixels."""
    return torch.tensor([*itertools.product([0.0, 1.0], repeat=side * side)]).view(-1, 1, side, side)


class Blocks(nn.Module):
    """Class 1 if any block of side x side pixels is white, else 0: a trigger that works anywhere."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        lowest = -torch.nn.functional.max_pool2d(-images, self.side, 1)
        score = lowest.flatten(1).amax(1) - 0.9
        return torch.stack([-score, score], 1)


class CornerReader(nn.Module):
    """Class 1 if the pixel in the upper left corner is bright."""

    def forward(self, images: Tensor) -> Tensor:
        score = images[:, 0, 0, 0] - 0.5
        return torch.stack([-score, score], 1)


def test_numbers_of_numpy_are_written_as_those_of_python(tmp_path: Path) -> None:
    images, labels = torch.full((1, 1, CORNER, CORNER), 0.25), torch.tensor([0])

    def written(whole: Callable[[int], Any]) -> str:
        certificate = certify_patches(CornerReader().eval(), images, labels, patch=whole(2), masks=whole(3))
        return certificate.to_json(tmp_path / "certificate.json").read_text()

    assert written(np.int64) == written(int)


def test_every_patch_is_covered_whatever_the_sizes() -> None:
    for height, width, side, masks in itertools.product(range(2, 15), (9, 13), range(1, 10), (2, 3, 6, 20)):
        if side > min(height, width):
            continue
        cover = MaskSet.covering((height, width), side, masks)
        for length, mask, starts in (
            (height, cover.mask[0], cover.tops),
            (width, cover.mask[1], cover.lefts),
        ):
            assert len(starts) <= masks
            assert all(start >= 0 and start + mask <= length for start in starts)
            for first in range(length - side + 1):
                assert any(start <= first and first + side <= start + mask for start in starts)


def test_hidden_pixels_cover_every_place_of_a_patch_on_an_image_that_is_not_square() -> None:
    cover = MaskSet.covering((9, 14), 3, 3)
    hidden = cover.hidden(torch.device("cpu"))[:, 0]
    assert hidden.shape == (len(cover), 9, 14)
    assert hidden.sum((1, 2)).tolist() == [cover.mask[0] * cover.mask[1]] * len(cover)
    for top, left in itertools.product(range(7), range(12)):
        assert bool(hidden[:, top : top + 3, left : left + 3].flatten(1).all(1).any())


def test_a_cover_with_one_mask_less_leaves_patches_uncovered() -> None:
    cover = MaskSet.covering((20, 20), 4, 4)
    for left_out in cover.tops:
        rest = [start for start in cover.tops if start != left_out]
        assert any(
            not any(start <= first and first + 4 <= start + cover.mask[0] for start in rest)
            for first in range(17)
        )


def test_masks_of_the_paper() -> None:
    """224 x 224 images, a patch of 2%, six masks a side: 32 x 32 patches, masks of 64 x 64, 666 pairs."""
    cover = MaskSet.covering((224, 224), 0.02, 6)
    assert (cover.patch, cover.mask, cover.tops) == (32, (64, 64), (0, 33, 66, 99, 132, 160))
    assert cover.fraction >= 0.02
    assert len(cover) * (len(cover) + 1) // 2 == 666


@pytest.mark.parametrize("patch", [0, -1, 0.0, 1.0, 1.5, True, "2", float("nan"), 9])
def test_a_patch_that_does_not_fit_is_refused(patch: float) -> None:
    with pytest.raises(ValueError, match=r"^patch must be .* got"):
        MaskSet.covering((8, 12), patch, 3)


def test_a_fraction_is_rounded_up_to_whole_pixels() -> None:
    """A patch of the stated fraction must be covered, so the square is never smaller."""
    for size, fraction in itertools.product(
        [(10, 10), (7, 31), (224, 224)], [0.001, 0.01, 0.0204, 0.09, 0.1]
    ):
        cover = MaskSet.covering(size, fraction, 3)
        assert cover.fraction >= fraction * (1 - 1e-9)
        assert (cover.patch - 1) ** 2 < fraction * size[0] * size[1]


def small_networks() -> list[Made]:
    """Networks of different kinds for gray images of 6 x 6."""

    def convolutional() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.AvgPool2d(2), nn.Flatten()
        )

    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

    made = []
    for seed, build in enumerate([convolutional, linear] * 3):
        network, _ = seeded(build, 1, 6, 6)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            last = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
            last.weight.mul_(0.3)
        made.append((network, torch.rand(6, 1, 6, 6, generator=generator)))
    return made


@pytest.mark.slow
def test_no_patch_at_any_place_turns_a_certified_image() -> None:
    """All 25 places of a 2 x 2 patch, all black and white contents and random ones, through the masked classifier."""
    contents = torch.cat([black_and_white(2), torch.rand(8, 1, 2, 2)])
    certified = turned_certified = turned_others = 0
    for network, images in small_networks()[3:]:
        masked = DoubleMasking(network, patch=2, masks=3)
        labels = masked(images).argmax(1)
        result = certify_patches(network, images, labels, patch=2, masks=3)
        assert result.predicted.tolist() == labels.tolist()
        for image, label, sure in zip(images, labels, result.certified.tolist(), strict=True):
            answers = masked(patched_images(image, 2, contents)).argmax(1)
            turned = int((answers != label).sum())
            certified += sure
            turned_certified += turned if sure else 0
            turned_others += 0 if sure else turned
    assert turned_certified == 0
    # Otherwise the test would say nothing.
    assert certified > 5
    assert turned_others > 10


def test_the_patch_is_withstood_only_behind_the_masks() -> None:
    """A corner pixel alone decides: dark, the image can be certified, though one pixel turns the bare network."""
    network, dark = CornerReader().eval(), torch.zeros(1, 1, CORNER, CORNER)
    result = certify_patches(network, dark, torch.tensor([0]), patch=2, masks=3)
    assert result.certified.tolist() == [True]
    attacked = patched_images(dark[0], 2, black_and_white(2))
    assert bool((network(attacked).argmax(1) == 1).any())
    assert not bool(DoubleMasking(network, patch=2, masks=3)(attacked).argmax(1).any())
    assert result.sentence.startswith("Behind double masking, the label of 1 of 1 image withstands")
    assert "nothing is certified of the classifier without the masks" in result.statement


def test_a_network_that_reads_one_corner_is_not_certified_where_the_corner_decides() -> None:
    network, bright = CornerReader().eval(), torch.ones(1, 1, CORNER, CORNER)
    result = certify_patches(network, bright, torch.tensor([1]), patch=2, masks=3)
    assert result.certified.tolist() == [False]
    # A mask over the corner is the reason that is given.
    cover = result.masks
    hidden = cover.hidden(torch.device("cpu"))[result.pair[0]]
    assert bool(hidden[:, 0, 0, 0].any())
    assert float(result.margin) < 0
    # The patch that hides the corner turns the masked classifier.
    attacked = patched_images(bright[0], 2, torch.zeros(1, 1, 2, 2))
    assert bool((DoubleMasking(network, patch=2, masks=3)(attacked).argmax(1) == 0).any())


def test_a_trigger_that_works_anywhere_is_withstood_and_a_larger_one_is_not_claimed() -> None:
    images = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 0.5
    network = Blocks(3).eval()
    result = certify_patches(network, images, torch.zeros(3, dtype=torch.long), patch=3, masks=4)
    assert bool(result.certified.all())
    masked = DoubleMasking(network, patch=3, masks=4)
    triggers = patched_images(images[0], 3, torch.ones(1, 1, 3, 3))
    assert bool((network(triggers).argmax(1) == 1).all())
    assert not bool(masked(triggers).argmax(1).any())
    # A patch beyond the stated size turns it: the size belongs to the statement.
    larger = patched_images(images[0], 9, torch.ones(1, 1, 9, 9))
    assert bool((masked(larger).argmax(1) == 1).any())
    assert "3 x 3 pixels (6.25% of the image)" in result.sentence
    assert "3 x 3 pixels (6.25% of the image)" in result.statement


def test_a_misclassified_image_is_not_certified_for_its_label() -> None:
    network, images = NETWORKS["pooling"]()
    predicted = network(images).argmax(1)
    result = certify_patches(network, images, (predicted + 1) % 4, patch=1, masks=3)
    assert not bool(result.certified.any())
    assert "the label of 0 of 3 images withstands" in result.sentence


def test_two_logits_a_hair_apart_are_decided_by_the_network_itself() -> None:
    """Under every mask, next to large ones: a gap that float32 rounds away is a tie, which nobody wins."""

    def logits_of(gap: float) -> nn.Module:
        def after(images: Tensor) -> Tensor:
            score = images.flatten(1).sum(1)
            return torch.stack([score + gap, score, -score], 1)

        return Wrapped(after).eval()

    images, labels = torch.rand(2, 1, 8, 8) + 0.1, torch.tensor([0, 0])
    images = images.clamp(max=1)
    for gap, sure in ((0.0, False), (1e-9, False), (-1e-4, False), (1e-4, True), (1.0, True)):
        result = certify_patches(logits_of(gap), images, labels, patch=2, masks=3)
        assert result.certified.tolist() == [sure, sure], gap
        assert ((result.margin > 0) == result.certified).all()


def lowest_margin_as_run(network: nn.Module, image: Tensor, label: int, cover: MaskSet) -> Tensor:
    """The least margin of all masked images that the masked classifier may ask about, in its batches."""
    hidden = cover.hidden(image.device)
    bases = [image, *(torch.where(one, 0.0, image) for one in hidden)]
    with torch.no_grad():
        logits = torch.stack([network(torch.where(hidden, 0.0, base)) for base in bases]).flatten(0, 1)
    others = torch.arange(logits.shape[1]) != label
    return (logits[:, label : label + 1] - logits[:, others]).min()


def test_near_ties_are_what_the_network_itself_computes() -> None:
    """The label's bias leaves the least margin a few units of rounding above or below zero, where windows may err."""
    outcomes = []
    for network, images in small_networks()[::2]:
        image = images[:1]
        last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
        assert last.bias is not None
        label = int(network(image).argmax(1))
        cover = MaskSet.covering((6, 6), 2, 3)
        with torch.no_grad():
            last.bias[label] -= lowest_margin_as_run(network, image, label, cover)
        for step in range(-4, 5):
            shift = 2e-7 * step
            with torch.no_grad():
                last.bias[label] += shift
            lowest = lowest_margin_as_run(network, image, label, cover)
            result = certify_patches(network, image, torch.tensor([label]), patch=2, masks=3)
            assert result.certified.tolist() == [bool(lowest > 0)], step
            assert bool(result.margin.abs() < SLACK)
            outcomes.append(bool(lowest > 0))
            with torch.no_grad():
                last.bias[label] -= shift
    assert 5 < sum(outcomes) < len(outcomes) - 5


def test_batches_of_the_masked_classifier_do_not_depend_on_how_many_images_there_are() -> None:
    """torch rounds differently in batches of another size: an answer must not depend on the other images."""
    network, images = Blocks(3).eval(), torch.rand(5, 1, 12, 12)
    images[1] = 1.0
    masked = DoubleMasking(network, patch=3, masks=3)
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    for count in (1, 2, 5):
        masked(images[:count])
    assert set(sizes) == {9}


def test_any_network_is_masked_and_left_as_it_was(any_model: Made) -> None:
    network, images = any_model
    labels = network(images).argmax(1)
    with untouched(network, images, labels):
        together = certify_patches(network, images, labels, patch=2, masks=3)
        alone = [certify_patches(network, images[[i]], labels[[i]], patch=2, masks=3) for i in range(3)]
        votes = DoubleMasking(network, patch=2, masks=3)(images)
    assert together.certified.tolist() == [bool(one.certified) for one in alone]
    torch.testing.assert_close(together.margin, torch.cat([one.margin for one in alone]))
    assert together.predicted.tolist() == votes.argmax(1).tolist()
    assert bool((together.predicted == labels)[together.certified].all())


def test_under_the_masks_that_hide_a_patch_logits_are_equal_to_the_last_bit(any_model: Made) -> None:
    """The theorem needs it: the rows of a batch beside them, where the patch shows, are others."""
    network, images = any_model
    image, patched = images[:1], images[:1].clone()
    patched[:, :, 1:3, 1:3] = 1 - patched[:, :, 1:3, 1:3]
    cover = MaskSet.covering((image.shape[2], image.shape[3]), 2, 3)
    with evaluating(network) as classifier:
        clean, attacked = (MaskedImage(classifier, cover, one) for one in (image, patched))
        hides = clean.hidden[:, 0, 1:3, 1:3].flatten(1).all(1)
        assert 0 < int(hides.sum()) < len(cover)
        for base in (NONE, *range(len(cover))):
            rows = hides if base == NONE or not bool(hides[base]) else torch.ones_like(hides)
            assert torch.equal(clean.logits(base)[rows], attacked.logits(base)[rows]), base


def test_hidden_pixels_have_a_color_that_no_patch_can_choose() -> None:
    """Under the mask over it, an image does not depend on a patch at all, also with a normalization."""
    network, images = NETWORKS["normalized"]()
    masked = DoubleMasking(network, patch=4, masks=3)
    cover = MaskSet.covering((18, 26), 4, 3)
    seen: list[Tensor] = []
    assert isinstance(network, Classifier)
    network.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    patched = images[:1].clone()
    patched[:, :, :4, :4] = 1.0
    masked(images[:1])
    clean = seen[0][0]
    seen.clear()
    masked(patched)
    torch.testing.assert_close(seen[0][0], clean, rtol=0, atol=0)
    height, width = cover.mask
    torch.testing.assert_close(clean[:, :height, :width], torch.zeros(3, height, width), rtol=0, atol=1e-6)


def test_all_pairs_are_asked_for_a_certified_image_and_few_for_one_that_fails() -> None:
    network, images = Blocks(3).eval(), torch.full((2, 1, 12, 12), 0.2)
    images[1] = 1.0
    result = certify_patches(network, images, torch.tensor([0, 0]), patch=3, masks=3)
    assert result.certified.tolist() == [True, False]
    assert result.n_forward[0] == 9 * 10 // 2
    assert result.n_forward[1] == 9


def test_progress_ends_at_one() -> None:
    network, images = NETWORKS["linear"]()
    told: list[float] = []
    certify_patches(network, images, network(images).argmax(1), patch=2, masks=2, progress=told.append)
    assert told == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: (images * 255).byte(), r"floats in \[0, 1\], got torch.uint8"),
        (lambda images: images[0], r"must have shape \(N, C, H, W\)"),
        (lambda images: images[:0], "at least one pixel"),
    ],
)
def test_the_masked_classifier_refuses_what_is_no_batch_of_images(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    masked = DoubleMasking(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval(), patch=2, masks=2)
    with pytest.raises(ValueError, match=message):
        masked(change(torch.rand(2, 1, 8, 8)))


def test_checkpoints_are_certificates_of_the_images_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weakspot._progress.SAVE_EVERY", 0.0)
    monkeypatch.setattr("weakspot._progress.SAVE_AT_MOST", 1.0)
    images = torch.rand(3, 1, CORNER, CORNER, generator=torch.Generator().manual_seed(0))
    network = CornerReader().eval()
    labels = network(images).argmax(1)
    kept: list[PatchCertificate] = []
    last = certify_patches(network, images, labels, patch=2, on_checkpoint=kept.append)
    assert [len(one) for one in kept] == [1, 2, 3]
    for one in kept:
        assert torch.equal(one.certified, last.certified[: len(one)])
        assert torch.equal(one.images, images[: len(one)])
