"""Certificates of pixels on planted weaknesses, which must never be proven, and on networks without one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Made, Wrapped, untouched
from tests.pretend_gpu import GPU, PretendGPU
from tests.proofs.architectures import ARCHITECTURES
from tests.proofs.test_enumeration import brute_force, weakened
from weakspot import PixelCertificate, certify_pixels, explain
from weakspot.proofs import AllowedColors, check_certificate
from weakspot.proofs.certificate import AS_RUN, EXACT
from weakspot.proofs.certificate_file import CertificateFile
from weakspot.proofs.margin_bounds import MarginBounds, Margins

STATEMENTS = pytest.mark.parametrize("statement", [AS_RUN, EXACT])


class Trapdoor(nn.Module):
    """Two logits, 6 and 5 + a spike of height 2 where one pixel has nearly one color, built from ReLUs.

    With d the distance of one channel to the color, relu(d + w) - 2 relu(d) + relu(d - w) is a triangle of width 2 w
    and height w. The spike needs all channels at once.
    """

    def __init__(self, color: Tensor, width: float, place: tuple[int, int] = (1, 2)) -> None:
        super().__init__()
        self.color, self.width, self.place = color, width, place

    def forward(self, images: Tensor) -> Tensor:
        row, column = self.place
        channels = images.shape[1]
        apart = images[:, :, row : row + 1, column : column + 1].flatten(1) - self.color[None]
        parts = (
            torch.relu(apart + self.width)
            - torch.relu(apart)
            - torch.relu(apart)
            + torch.relu(apart - self.width)
        )
        total = (parts / self.width).sum(1, keepdim=True)
        spike = torch.relu(total - channels + 1)
        return torch.cat([6 + 0 * spike, 5 + 2 * spike], 1)


class Threshold(nn.Module):
    """Two logits, 0 and the value of one pixel less a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, images: Tensor) -> Tensor:
        excess = images[:, :1, 1, 1] - self.threshold
        return torch.cat([0 * excess, excess], 1)


def gray_image() -> Tensor:
    return torch.full((1, 1, 3, 4), 0.25)


@STATEMENTS
@pytest.mark.parametrize("color", [[0.6180339], [0.3, 0.7, 0.1]], ids=["gray", "color"])
def test_a_trapdoor_of_one_color_is_never_proven(color: list[float], statement: str) -> None:
    network = Trapdoor(torch.tensor(color), 0.001).eval()
    image = torch.full((1, len(color), 3, 4), 0.25)
    with torch.no_grad():
        edited = image.clone()
        edited[0, :, 1, 2] = torch.tensor(color)
        assert int(network(image).argmax(1)) == 0
        assert int(network(edited).argmax(1)) == 1
    certificate = certify_pixels(network, image, torch.tensor([0]), statement=statement)
    expected = torch.ones(3, 4, dtype=torch.int8)
    assert int(certificate.status[0, 1, 2]) != 1
    certificate.status[0, 1, 2] = 1
    assert torch.equal(certificate.status[0], expected)  # nothing else is accused


def test_a_trapdoor_between_8bit_grays_is_open_to_floats_alone() -> None:
    network = Trapdoor(torch.tensor([137.5 / 255]), 0.2 / 255).eval()
    labels = torch.tensor([0])
    assert bool((certify_pixels(network, gray_image(), labels, colors="8bit").status == 1).all())
    full = certify_pixels(network, gray_image(), labels)
    assert int(full.status[0, 1, 2]) != 1
    assert int((full.status == 1).sum()) == 11


def test_a_trapdoor_at_an_8bit_gray_is_found_by_enumeration() -> None:
    network = Trapdoor(torch.tensor([137 / 255]), 0.2 / 255).eval()
    certificate = certify_pixels(network, gray_image(), torch.tensor([0]), colors="8bit")
    assert int(certificate.status[0, 1, 2]) == -1
    assert float(certificate.color[0, 0, 1, 2]) == pytest.approx(137 / 255, abs=1e-7)
    assert certificate.counterexample_pixels.tolist() == [[0, 1, 2]]
    assert int(certificate.counterexamples.targets) == 1


@STATEMENTS
@pytest.mark.parametrize("hair", [1e-6, 1e-3])
def test_flips_just_inside_and_just_outside_a_box_are_told_apart(hair: float, statement: str) -> None:
    image, radius = gray_image(), 8 / 255
    inside, outside = (
        certify_pixels(
            Threshold(0.25 + radius + shift).eval(),
            image,
            torch.tensor([0]),
            colors=radius,
            statement=statement,
        )
        for shift in (-hair, hair)
    )
    assert int(inside.status[0, 1, 1]) == -1
    assert bool((outside.status == 1).all())
    assert int((inside.status == 1).sum()) == 11
    color = float(inside.color[0, 0, 1, 1])
    assert 0.25 + radius - hair < color <= 0.25 + radius


def test_a_margin_within_rounding_is_proven_in_exact_arithmetic_alone() -> None:
    linear = nn.Linear(12, 2)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.copy_(torch.tensor([1e-7, 0.0]))
    network = nn.Sequential(nn.Flatten(), linear).eval()
    exact = certify_pixels(network, gray_image(), torch.tensor([0]), statement=EXACT)
    assert bool((exact.status == 1).all())
    assert exact.statement == EXACT
    assert float(exact.lower_bound.max()) <= 1.0001e-7
    as_run = certify_pixels(network, gray_image(), torch.tensor([0]), statement=AS_RUN)
    assert not bool((as_run.status == 1).any())


def test_more_images_may_have_their_own_reason_than_int8_counts(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    network[1].weight.data, network[1].bias.data = torch.full((2, 4), 1e4), torch.tensor([1e-2, 0.0])
    images = torch.linspace(0.1, 1, 260).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    result = certify_pixels(network, images, network(images).argmax(1), colors=8 / 255)
    unknown = result.reason[result.status == 0]
    # The bound of rounding grows with the values of an image and is a part of its reason.
    assert len(result.reasons) > 128
    assert bool(((unknown >= 0) & (unknown < len(result.reasons))).all())
    read = CertificateFile.open(result.to_json(tmp_path / "many.json")).pixel_certificate(images)
    assert torch.equal(read.reason, result.reason)


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_certificate_holds_for_every_color_tried(make: Callable[[], Made]) -> None:
    network, images = make()
    network = Wrapped(network, after=lambda output: output[0] if isinstance(output, tuple) else output).eval()
    network, labels = weakened(network, images, 0.9)
    with untouched(network, images):
        certificate = certify_pixels(network, images[:1], labels)
    assert bool((certificate.status != 0).double().mean() > 0.9)
    colors = torch.rand(40, images.shape[1], generator=torch.Generator().manual_seed(0))
    colors[:20] = colors[:20].round()
    proven = (certificate.status[0] == 1).nonzero()
    with torch.no_grad():
        for color in colors:
            edited = images[:1].repeat(len(proven), 1, 1, 1)
            edited[torch.arange(len(proven)), :, proven[:, 0], proven[:, 1]] = color
            logits = network(edited).double()
            other = logits.scatter(1, labels[:, None].expand(len(logits), 1), -torch.inf).amax(1)
            margins = logits[:, int(labels)] - other
            assert bool((margins >= certificate.lower_bound[0, proven[:, 0], proven[:, 1]]).all())
        refuted = certificate.counterexamples
        assert bool((network(refuted.adversarial).argmax(1) != labels).all() if len(refuted) else True)


def test_8bit_grays_of_bounded_networks_equal_brute_force() -> None:
    for name in ("gray, two classes, not square", "max pooling, linear layers"):
        network, images = ARCHITECTURES[name]()
        network, labels = weakened(network, images, 0.97)
        certificate = certify_pixels(network, images[:1], labels, colors="8bit")
        expected = brute_force(network, images[:1], labels)
        assert torch.equal(certificate.status[0], expected)
        assert {-1, 1} == set(expected.flatten().tolist())


def test_8bit_colors_near_the_pixel_equal_brute_force() -> None:
    network, images = ARCHITECTURES["convolutions and linear layers, normalized"]()
    image = (images[:1] * 255).round() / 255
    network, labels = weakened(network, image, 0.995)
    region = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    region[:, :, 3:6, 2:7] = True
    certificate = certify_pixels(network, image, labels, colors="8bit:2/255", region=region)
    offsets = torch.cartesian_prod(*[torch.arange(-2, 3)] * 3)
    for row, column in region[0, 0].nonzero().tolist():
        levels = ((image[0, :, row, column] * 255).round() + offsets).clamp(0, 255)
        edited = image.repeat(len(levels), 1, 1, 1)
        edited[:, :, row, column] = levels / 255
        with torch.no_grad():
            holds = all(bool((network(part).argmax(1) == labels).all()) for part in edited.split(64))
        assert int(certificate.status[0, row, column]) == (1 if holds else -1)
    assert {-1, 1} == set(certificate.status[region[:, 0]].tolist())
    assert not bool(certificate.status[~region[:, 0]].any())


@STATEMENTS
def test_layers_without_bounds_leave_pixels_unknown_with_a_reason(statement: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        labels = network(gray_image()).argmax(1)
    certificate = certify_pixels(network, gray_image(), labels, statement=statement)
    assert "gelu is not supported" in certificate.unknown_because()
    assert not bool((certificate.status == 1).any())


def test_time_that_is_up_leaves_the_rest_unknown() -> None:
    network, images = ARCHITECTURES["branches, pooling, ReLU6, tuple"]()
    certificate = certify_pixels(network, images, torch.tensor([0, 1, 2]), seconds=1e-9)
    assert bool((certificate.status == 0).all())
    assert certificate.unknown_because() == {"the time was up": 240}


@pytest.mark.parametrize("statement", [AS_RUN, EXACT])
def test_no_bound_is_begun_after_the_time_is_up(statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = ARCHITECTURES["convolutions and linear layers, normalized"]()
    with torch.no_grad():
        labels = network(images).argmax(1)
    now, begun = 0.0, []
    bounds = MarginBounds.bounds

    def slow(self: MarginBounds, *boxes: Tensor, deep: bool = False) -> Margins:
        nonlocal now
        begun.append(now)
        now += 1
        return bounds(self, *boxes, deep=deep)

    monkeypatch.setattr(MarginBounds, "bounds", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    certificate = certify_pixels(network, images, labels, statement=statement, seconds=2.5)
    assert max(begun) <= 3
    assert len(begun) >= 3
    assert "the time was up" in certificate.unknown_because()


def test_a_region_of_one_pixel_and_images_of_several_labels() -> None:
    network, images = ARCHITECTURES["convolutions and linear layers, normalized"]()
    with torch.no_grad():
        labels = network(images).argmax(1)
    region = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    region[:, :, 11, 0] = True
    alone = certify_pixels(network, images, labels, region=region)
    everything = certify_pixels(network, images, labels)
    assert torch.equal(alone.status[:, 11, 0], everything.status[:, 11, 0])
    assert int(alone.status.abs().sum()) == int(everything.status[:, 11, 0].abs().sum())
    torch.testing.assert_close(alone.lower_bound[:, 11, 0], everything.lower_bound[:, 11, 0])
    assert bool((alone.proven_fraction + alone.refuted_fraction + alone.unknown_fraction == 1).all())


@contextmanager
def changed_float32(how: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if how.endswith("FPMATH_MODE"):
        monkeypatch.setenv(how, "BF16")
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    try:
        if how == "matmul precision":
            torch.set_float32_matmul_precision("medium")
        elif how == "TF32":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif how == "denormal":
            torch.set_flush_denormal(True)
        with torch.backends.mkldnn.flags(enabled=how != "mkldnn"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.matmul.allow_tf32 = before[1]
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    "how",
    [
        "ONEDNN_DEFAULT_FPMATH_MODE",
        "DNNL_DEFAULT_FPMATH_MODE",
        "matmul precision",
        "TF32",
        "denormal",
        "mkldnn",
        "half precision",
        "float64",
    ],
)
def test_settings_that_change_float32_are_refused_by_name(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = ARCHITECTURES["gray, two classes, not square"]()
    if how == "half precision":
        network = network.bfloat16()
    if how == "float64":
        network = network.double()
    message = f'statement must be "exact arithmetic" here.*({how}|precision)'
    with changed_float32(how, monkeypatch), pytest.raises(ValueError, match=message):
        certify_pixels(network, images, torch.zeros(3, dtype=torch.long))


def test_counterexamples_are_pairs_that_explain_takes() -> None:
    network, images = ARCHITECTURES["residual, batch norm, in-place ReLU"]()
    network, labels = weakened(network, images, 0.999)
    certificate = certify_pixels(network, images[:1], labels)
    pairs = certificate.counterexamples
    assert len(pairs) == int((certificate.status == -1).sum()) > 0
    assert bool((pairs.distances["pixels"] == 1).all())
    scores = explain(network, pairs[:2], analyses=["ssim"]).scores
    assert len(scores) == 2


def test_a_network_on_a_gpu_has_the_same_proofs_in_exact_arithmetic_and_refutations_as_run() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    images = torch.rand(2, 3, 8, 8)
    region = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    region[..., 3:5, 3:5] = True
    labels = network(images).argmax(1)
    here = certify_pixels(network, images, labels, region=region, statement=EXACT)
    with PretendGPU():
        network = copy.deepcopy(network).to(GPU)
        there = certify_pixels(network, images, labels, region=region, statement=EXACT)
        as_run = certify_pixels(network, images, labels, region=region, statement=AS_RUN)
    assert {int(one) for one in here.status.unique()} == {-1, 0, 1}
    assert torch.equal(there.status, here.status)
    # The rounding of a GPU is not bounded, so nothing is proven there; a color that the network turns is a fact.
    assert torch.equal(as_run.status, here.status.clamp(max=0))


def test_a_region_without_pixels_claims_nothing() -> None:
    network, images = ARCHITECTURES["gray, two classes, not square"]()
    region = torch.zeros(1, 1, 16, 12, dtype=torch.bool)
    certificate = certify_pixels(network, images, torch.zeros(3, dtype=torch.long), region=region)
    assert "no pixel in the region" in repr(certificate)
    assert not bool(certificate.status.any())
    assert not len(certificate.boxes)


def test_one_refuted_pixel_of_many_is_not_rounded_away() -> None:
    status = torch.ones(1, 96, 96, dtype=torch.int8)
    status[0, 3, 4] = -1
    network = nn.Sequential(nn.Flatten(), nn.Linear(9216, 2)).eval()
    image = torch.rand(1, 1, 96, 96)
    nowhere = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    made = certify_pixels(network, image, network(image).argmax(1), region=nowhere)
    every = replace(made, status=status, region=~nowhere)
    assert "over 99.9% proven, under 0.1% refuted, 0% unknown" in repr(every)


def test_checkpoints_hold_what_is_known_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weakspot._progress.SAVE_EVERY", 0.0)
    monkeypatch.setattr("weakspot._progress.SAVE_AT_MOST", 1.0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.rand(3, 1, 4, 4)
    labels = network(images).argmax(1)
    kept: list[PixelCertificate] = []
    last = certify_pixels(network, images, labels, on_checkpoint=kept.append)
    assert len(kept) >= 3
    assert (kept[0].status[2] == 0).all()  # the third image was not reached
    assert kept[0].unknown_because()["the search had not finished"] >= 16
    for earlier in kept:
        decided = earlier.status != 0
        assert torch.equal(earlier.status[decided], last.status[decided])
        assert (earlier.reason[earlier.status == 0] >= 0).all()
        path = earlier.to_json(tmp_path / "kept.json")
        assert check_certificate(network, path, images, seed=0).passed
    assert torch.equal(kept[-1].status, last.status)
    assert "the search had not finished" not in last.reasons


class NotFiniteWhere(nn.Module):
    """NaN for bright upper left pixels of images that are dark elsewhere."""

    def forward(self, images: Tensor) -> Tensor:
        score = 4 + images.mean((1, 2, 3))
        bad = (images[:, 0, 0, 0] > 0.9) & (images[:, 0, 2, 2] < 0.1)
        return torch.stack([score, 0 * score], 1).masked_fill(bad[:, None], torch.nan)


def test_an_image_whose_changed_versions_give_nan_is_unknown_and_the_others_are_decided() -> None:
    images = torch.full((3, 1, 3, 4), 0.5)
    images[1] = 0
    result = certify_pixels(NotFiniteWhere().eval(), images, torch.zeros(3, dtype=torch.long), colors="8bit")
    assert int(result.status[1, 0, 0]) == 0
    assert (result.status[[0, 2]] == 1).all()
    assert (
        result.reasons[int(result.reason[1, 0, 0])]
        == "the network returned NaN or infinity for a changed image"
    )


@pytest.mark.parametrize("radius", [-0.5, 0, 1.5, float("nan"), "8/255"], ids=repr)
def test_allowed_colors_without_a_color_are_refused(radius: Any) -> None:
    with pytest.raises(ValueError, match=r"^colors must have a radius above 0 and at most 1, got"):
        AllowedColors(radius=radius)
    with pytest.raises(ValueError, match=r"^colors must have a radius of at least 1/255"):
        AllowedColors(radius=0.001, eight_bit=True)
