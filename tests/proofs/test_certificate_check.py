"""The checker: covers against a grid of points, certificates that hold, and every kind of tampering refused."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.networks import Made, Wrapped, seeded, untouched
from weakspot import Classifier, certify_patches, certify_pixels
from weakspot.proofs import check_certificate
from weakspot.proofs.certificate import PixelCertificate
from weakspot.proofs.certificate_file import CertificateFile
from weakspot.proofs.cover_check import find_gap, overlap
from weakspot.proofs.two_masks import PatchCertificate

Record = dict[str, Any]


def split_boxes(random: np.random.Generator, channels: int, splits: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the boxes that random splits of the unit cube leave."""
    boxes = [(np.zeros(channels), np.ones(channels))]
    for _ in range(splits):
        low, high = boxes.pop(int(random.integers(len(boxes))))
        channel = int(random.integers(channels))
        value = low[channel] + random.choice([0.25, 0.5, 0.75]) * (high[channel] - low[channel])
        below, above = high.copy(), low.copy()
        below[channel] = above[channel] = value
        boxes += [(low, below), (above, high)]
    return np.array([low for low, _ in boxes]), np.array([high for _, high in boxes])


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_boxes_of_splits_cover_and_one_less_leaves_a_gap(seed: int, channels: int, splits: int) -> None:
    random = np.random.default_rng(seed)
    lows, highs = split_boxes(random, channels, splits)
    cube = np.zeros(channels), np.ones(channels)
    assert find_gap(*cube, lows, highs) is None
    assert not overlap(*cube, lows, highs)
    left_out = int(random.integers(len(lows)))
    fewer = np.delete(lows, left_out, 0), np.delete(highs, left_out, 0)
    gap = find_gap(*cube, *fewer)
    assert gap is not None
    middle = (gap[0] + gap[1]) / 2
    assert bool(((lows[left_out] <= middle) & (middle <= highs[left_out])).all())
    # One box a little smaller leaves a gap as thin.
    smaller = highs.copy()
    smaller[left_out, 0] = np.nextafter(smaller[left_out, 0], -1)
    assert find_gap(*cube, lows, smaller) is not None
    # Twice the same box is an overlap.
    assert overlap(*cube, np.concatenate([lows, lows[:1]]), np.concatenate([highs, highs[:1]]))


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 4), max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_boxes_cover_where_every_cell_of_the_grid_is_in_one(corners: list[tuple[int, ...]]) -> None:
    """Boxes with whole corners in the square from 0 to 4, of any kind, against its 16 cells."""
    lows = np.array([corner[:2] for corner in corners], dtype=float).reshape(-1, 2)
    highs = np.array([corner[2:] for corner in corners], dtype=float).reshape(-1, 2)
    cells = itertools.product(range(4), range(4))
    covered = all(
        any(
            low[0] <= x and x + 1 <= high[0] and low[1] <= y and y + 1 <= high[1]
            for low, high in zip(lows, highs, strict=True)
        )
        for x, y in cells
    )
    assert (find_gap(np.zeros(2), np.full(2, 4.0), lows, highs) is None) == covered


def weak_network() -> Made:
    """A network on gray images of 6 x 8, some of whose pixels decide alone."""
    network, images = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(6 * 6 * 4, 3)), 1, 8, 6
    )
    images = (255 * images).round() / 255
    with torch.no_grad():
        logits = network(images)
    gaps = logits.max(1).values - logits.topk(2).values[:, 1]
    shift = torch.zeros(3)
    shift[logits[0].argmax()] = -0.9 * gaps[0]
    return Wrapped(network, after=lambda output: output + shift).eval(), images[:2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Record]:
    """A network, its images, and the record of their certificate."""
    network, images = weak_network()
    certificate = certify_pixels(network, images, network(images).argmax(1), colors="8bit:60/255")
    path = certificate.to_json(tmp_path_factory.mktemp("certificate") / "certificate.json")
    assert certificate.refuted_fraction[0] > 0
    assert certificate.proven_fraction.min() > 0
    return network, images, json.loads(path.read_text("utf-8"))


def written(record: Record, path: Path) -> Path:
    path.write_text(json.dumps(record), "utf-8")
    return path


def test_a_certificate_holds_also_among_other_images(
    made: tuple[nn.Module, Tensor, Record], tmp_path: Path
) -> None:
    network, images, record = made
    others = torch.cat([torch.rand(2, 1, 8, 6), images.flip(0)])
    path = written(record, tmp_path / "one.json")
    with untouched(network, others):
        check = check_certificate(network, path, others)
    assert check.passed, check.problems
    assert check.sentence.startswith("The certificate holds: ")
    proven = sum(value == 1 for image in record["status"] for row in image for value in row)
    assert f"{proven} pixels proven (float32 as run)" in check.sentence


def test_what_is_read_is_what_was_written(made: tuple[nn.Module, Tensor, Record], tmp_path: Path) -> None:
    network, images, record = made
    certificate = CertificateFile.open(written(record, tmp_path / "one.json")).pixel_certificate(images)
    again = json.loads(certificate.to_json(tmp_path / "two.json").read_text("utf-8"))
    assert again == record
    pairs = certificate.counterexamples
    assert bool((network(pairs.adversarial).argmax(1) != pairs.labels).all())


def level_value(level: int) -> float:
    """The float32 value of a level, as images have it."""
    return float(torch.tensor(float(level)) / 255)


def first(record: Record, status: int) -> list[int]:
    """Image, row and column of the first pixel with a status."""
    return next(
        [n, r, c]
        for n, image in enumerate(record["status"])
        for r, row in enumerate(image)
        for c, value in enumerate(row)
        if value == status
    )


def remove_leaf(record: Record) -> None:
    for values in record["boxes"].values():
        del values[3]


def shrink_leaf(record: Record) -> None:
    record["boxes"]["high"][2][0] -= 1 / 255


def widen_leaf(record: Record) -> None:
    record["boxes"]["high"][2][0] += 1 / 255


def repeat_leaf(record: Record) -> None:
    for values in record["boxes"].values():
        values.append(values[0])


def widen_colors(record: Record) -> None:
    record["colors"]["radius"] = 70 / 255


def all_colors(record: Record) -> None:
    record["colors"]["eight_bit"] = False


def exact_statement(record: Record) -> None:
    record["statement"] = "exact arithmetic"


def reverse_leaf(record: Record) -> None:
    boxes = record["boxes"]
    boxes["low"][2], boxes["high"][2] = boxes["high"][2], boxes["low"][2]


def reverse_forged_leaf(record: Record) -> None:
    """Within the allowed colors, beside a box that covers all of them: as volumes, the two do not overlap."""
    repeat_leaf(record)
    boxes = record["boxes"]
    low, high = boxes["low"][0], boxes["high"][0]
    boxes["low"][-1], boxes["high"][-1] = high, low


def huge_leaf(record: Record) -> None:
    record["boxes"]["low"][2], record["boxes"]["high"][2] = [-1e300], [1e300]


def leaf_between_levels(record: Record) -> None:
    repeat_leaf(record)
    low = record["boxes"]["low"][0][0]
    record["boxes"]["low"][-1], record["boxes"]["high"][-1] = [low + 0.001], [low + 0.002]


def no_leaves(record: Record) -> None:
    for values in record["boxes"].values():
        values.clear()


def refute_with_a_huge_color(record: Record) -> None:
    record["counterexamples"]["colors"][0] = [1e300]


def repeat_a_counterexample(record: Record) -> None:
    for values in record["counterexamples"].values():
        values.append(values[0])


def prove_a_refuted_pixel(record: Record) -> None:
    image, row, column = first(record, -1)
    record["status"][image][row][column] = 1


def prove_a_refuted_pixel_with_a_box(record: Record) -> None:
    """As one would who knows the format: with the whole box, and without the counterexample."""
    pixel = first(record, -1)
    image, row, column = pixel
    record["status"][image][row][column] = 1
    number = record["counterexamples"]["pixels"].index(pixel)
    for values in record["counterexamples"].values():
        del values[number]
    boxes = record["boxes"]
    own = _OWN_LEVELS[image][row][column]
    low, high = max(0, own - 60), min(255, own + 60)
    boxes["pixels"].append(pixel)
    boxes["low"].append([level_value(low)])
    boxes["high"].append([level_value(high)])
    boxes["bound"].append(1.0)
    boxes["method"].append(2)
    record["lower_bound"][image][row][column] = 1.0


def refute_a_proven_pixel(record: Record) -> None:
    image, row, column = first(record, 1)
    record["status"][image][row][column] = -1


def refute_with_a_harmless_color(record: Record) -> None:
    """The counterexample keeps the image's own level."""
    image, row, column = record["counterexamples"]["pixels"][0]
    level = _OWN_LEVELS[image][row][column]
    record["counterexamples"]["colors"][0] = [level_value(level)]


def raise_a_bound(record: Record) -> None:
    record["boxes"]["bound"][1] *= 2


def raise_a_lower_bound(record: Record) -> None:
    image, row, column = first(record, 1)
    record["lower_bound"][image][row][column] *= 2


def other_label(record: Record) -> None:
    record["labels"][0] = (record["labels"][0] + 1) % 3


def impossible_label(record: Record) -> None:
    record["labels"][0] = 7


def status_of_two(record: Record) -> None:
    record["status"][0][0][0] = 2


def status_outside_the_region(record: Record) -> None:
    image, row, column = first(record, 1)
    record["region"][image][row][column] = 0


def unknown_without_reason(record: Record) -> None:
    image, row, column = first(record, 1)
    keep = [n for n, pixel in enumerate(record["boxes"]["pixels"]) if pixel != [image, row, column]]
    for name, values in record["boxes"].items():
        record["boxes"][name] = [values[n] for n in keep]
    record["status"][image][row][column] = 0


def forget_a_refuted_pixel(record: Record) -> None:
    """The pixel is called unknown, with a bound that would prove it."""
    image, row, column = record["counterexamples"]["pixels"].pop(0)
    for name in ("colors", "predicted"):
        del record["counterexamples"][name][0]
    record["status"][image][row][column], record["lower_bound"][image][row][column] = 0, 3.0
    record["reason"][image][row][column], record["reasons"] = 0, ["it is hard"]


def bound_of_a_refuted_pixel(record: Record) -> None:
    image, row, column = first(record, -1)
    record["lower_bound"][image][row][column] = 1e6


def reason_of_a_proven_pixel(record: Record) -> None:
    image, row, column = first(record, 1)
    record["reason"][image][row][column], record["reasons"] = 0, ["it is hard"]


def other_meaning(record: Record) -> None:
    record["meaning"] = "no patch of any size changes anything"


def other_color_text(record: Record) -> None:
    record["colors"]["text"] = "all patches"


def other_shape(record: Record) -> None:
    record["image_shape"] = [3, 999, 999]


def one_more_part(record: Record) -> None:
    record["guarantee"] = "of everything"


TAMPERED: list[tuple[Callable[[Record], None], str]] = [
    (remove_leaf, "is not proven: it has no boxes"),
    (shrink_leaf, "is not proven: no box covers its color"),
    (widen_leaf, "reaches beyond the allowed colors or ends before it begins"),
    (repeat_leaf, "boxes overlap"),
    (reverse_leaf, "reaches beyond the allowed colors or ends before it begins"),
    (reverse_forged_leaf, "reaches beyond the allowed colors or ends before it begins"),
    (huge_leaf, "reaches beyond the allowed colors or ends before it begins"),
    (leaf_between_levels, "has a box without an 8-bit color"),
    (no_leaves, "is not proven: it has no boxes"),
    (refute_with_a_huge_color, "has a color that is not allowed"),
    (repeat_a_counterexample, "its part 'counterexamples' is not what"),
    (widen_colors, "no box covers its color"),
    (all_colors, "enumerated boxes, which prove 8-bit colors as run and nothing else"),
    (exact_statement, "enumerated boxes, which prove 8-bit colors as run and nothing else"),
    (prove_a_refuted_pixel, "does not fit its counterexamples"),
    (prove_a_refuted_pixel_with_a_box, "when computed again"),
    (refute_a_proven_pixel, "does not fit its counterexamples"),
    (refute_with_a_harmless_color, "does not change the class"),
    (raise_a_bound, "when computed again"),
    (raise_a_lower_bound, "is higher than those of its boxes"),
    (other_label, "when computed again"),
    (impossible_label, "labels are not classes between 0 and 2"),
    (status_of_two, "a status other than 1, 0 and -1"),
    (status_outside_the_region, "is outside the region, but has a status"),
    (unknown_without_reason, "is unknown without a reason"),
    (forget_a_refuted_pixel, "is not proven, but has a lower bound above zero"),
    (bound_of_a_refuted_pixel, "is not proven, but has a lower bound above zero"),
    (reason_of_a_proven_pixel, "is not unknown, but has a reason"),
    (other_meaning, "its part 'meaning' is not what"),
    (other_color_text, "its part 'colors' is not what"),
    (other_shape, "its part 'image_shape' is not what"),
    (one_more_part, "the part 'guarantee', which no certificate has"),
]
_OWN_LEVELS = (weak_network()[1][:, 0] * 255).round().long().tolist()


@pytest.mark.parametrize(("tamper", "problem"), TAMPERED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_tampered_certificate_does_not_hold(
    made: tuple[nn.Module, Tensor, Record],
    tmp_path: Path,
    tamper: Callable[[Record], None],
    problem: str,
) -> None:
    network, images, record = made
    changed = copy.deepcopy(record)
    tamper(changed)
    assert changed != record
    check = check_certificate(network, written(changed, tmp_path / "one.json"), images)
    assert not check.passed
    assert any(problem in text for text in check.problems), check.problems
    assert check.sentence.startswith("The certificate does not hold: ")


def test_another_network_and_other_images_are_refused_in_one_sentence(
    made: tuple[nn.Module, Tensor, Record], tmp_path: Path
) -> None:
    network, images, record = made
    path = written(record, tmp_path / "one.json")
    wider = copy.deepcopy(network)
    next(wider.parameters()).data[0] += 1e-3
    for other in (wider, Classifier.wrap(network, mean=[0.1])):
        with pytest.raises(
            ValueError, match=r"^model must be the network of the certificate, Wrapped with fingerprint"
        ):
            check_certificate(other, path, images)
    changed = images.clone()
    changed[1, 0, 0, 0] += 1 / 255
    with pytest.raises(
        ValueError, match=r"^images must hold every image of the certificate, but image 2 is not among"
    ):
        check_certificate(network, path, changed)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"format": "weakspot pixel certificate 1"}', '{"format": 3}', "[" * 100_000,
        '{"format": "weakspot pixel certificate 2"}', '{"format": []}', '{"format": {}}',
    ],
)  # fmt: skip
def test_files_that_are_no_certificates_are_refused(
    made: tuple[nn.Module, Tensor, Record], tmp_path: Path, content: str
) -> None:
    network, images, _ = made
    (tmp_path / "one.json").write_text(content)
    with pytest.raises(ValueError, match=r"one.json must be a certificate that weakspot certify wrote, but"):
        check_certificate(network, tmp_path / "one.json", images)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_certificate(network, tmp_path / "none.json", images)
    with pytest.raises(FileNotFoundError, match=r"is a folder$"):
        check_certificate(network, tmp_path, images)


@pytest.mark.parametrize(
    "key",
    ["status", "lower_bound", "boxes", "counterexamples", "colors", "labels", "region", "names", "versions"],
)
def test_malformed_parts_are_named(made: tuple[nn.Module, Tensor, Record], tmp_path: Path, key: str) -> None:
    network, images, record = made
    for value in (None, "text", 3, [["x"]], {"low": 1}, [[[[1]]]], [["x"], ["y"]]):
        path = written({**record, key: value}, tmp_path / "one.json")
        if key == "versions":  # they are only noted
            assert check_certificate(network, path, images, sample=1).passed
            continue
        with pytest.raises(ValueError, match=f"^.*one.json must be a certificate .* wrote, but .*{key}"):
            check_certificate(network, path, images)


def bright_network() -> nn.Module:
    """Class 0 as long as the image is bright."""

    def logits(images: Tensor) -> Tensor:
        score = images.flatten(1).mean(1) - 0.3
        return torch.stack([score, -score], 1)

    return Wrapped(logits).eval()


def test_patch_certificates_are_checked_too(tmp_path: Path) -> None:
    network, images = bright_network(), torch.stack([torch.full((1, 12, 12), value) for value in (0.9, 0.35)])
    certificate = certify_patches(network, images, torch.tensor([0, 0]), patch=3, masks=3)
    assert certificate.certified.tolist() == [True, False]
    record = json.loads(certificate.to_json(tmp_path / "one.json").read_text("utf-8"))
    check = check_certificate(network, tmp_path / "one.json", images)
    assert check.passed, check.problems
    assert "1 of 2 images certified for 3 x 3 pixels" in check.sentence

    def larger_patch(record: Record) -> None:
        record["patch"] = 4

    def fewer_masks(record: Record) -> None:
        record["tops"].pop()

    def certify_the_other(record: Record) -> None:
        record["certified"][1] = 1

    def other_label(record: Record) -> None:
        record["labels"][0] = 1

    def raised_margin(record: Record) -> None:
        record["margin"][0] += 0.1

    def lowered_margin(record: Record) -> None:
        record["margin"][0] -= 0.1

    def impossible_class(record: Record) -> None:
        record["predicted"][1] = 99

    def margin_of_the_other(record: Record) -> None:
        record["margin"][1] = 0.9

    def margin_of_a_tie(record: Record) -> None:
        record["margin"][1] = 1e-5

    def negative_margin(record: Record) -> None:
        record["margin"][0] = -1e-5

    def impossible_pair(record: Record) -> None:
        record["pair"][0] = [0, 99]

    for tamper, problem in (
        (larger_patch, "no mask covers a patch of 4 pixels"),
        (fewer_masks, "no mask covers a patch of 3 pixels"),
        (certify_the_other, "image 2 is not certified: under two of the masks"),
        (other_label, "image 1 is not certified: under two of the masks"),
        (raised_margin, "the margin of image 1 is"),
        (lowered_margin, "under the two masks that it names"),
        (impossible_class, "behind the masks, image 2 is not classified as stated"),
        (margin_of_the_other, "image 2 has a margin of 0.9, but is not certified"),
        (margin_of_a_tie, "image 2 has a margin of 1e-05, but is not certified"),
        (negative_margin, "image 1 has a margin of -1e-05, but is certified"),
        (impossible_pair, "its pairs are not masks between 0 and"),
        (other_meaning, "its part 'meaning' is not what"),
        (exact_statement, "its part 'statement' is not what"),
    ):
        changed = copy.deepcopy(record)
        tamper(changed)
        check = check_certificate(network, written(changed, tmp_path / "two.json"), images)
        assert not check.passed, tamper
        assert any(problem in text for text in check.problems), check.problems
    for key, value in (("margin", [float("nan"), 0.1]), ("names", ["a"]), ("margin", [1e999, 0.1])):
        path = written({**record, key: value}, tmp_path / "two.json")
        with pytest.raises(ValueError, match=f"two.json must be a certificate .* wrote, but {key}"):
            check_certificate(network, path, images)


def relu_network() -> Made:
    """A convolutional network with ReLU on gray images, some of whose pixels decide alone; bounds cover it."""
    network, images = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 2, 3)
        ),
        1, 8, 6,
    )  # fmt: skip
    with torch.no_grad():
        logits = network(images)
    gaps = logits.max(1).values - logits.topk(2).values[:, 1]
    shift = torch.zeros(3)
    shift[logits[0].argmax()] = -0.95 * gaps[0]
    return Wrapped(network, after=lambda output: output + shift).eval(), images[:1]


@pytest.mark.parametrize("statement", ["float32 as run", "exact arithmetic"])
@pytest.mark.parametrize("colors", ["full", 0.3])
def test_bounds_are_computed_again_for_both_statements(
    tmp_path: Path, statement: str, colors: str | float
) -> None:
    network, images = relu_network()
    labels = network(images).argmax(1)
    certificate = certify_pixels(network, images, labels, colors=colors, statement=statement)
    boxes = certificate.boxes
    assert len(boxes) > len(boxes.pixels.unique(dim=0)), "no pixel needed a split"
    assert certificate.refuted_fraction > 0
    record = json.loads(certificate.to_json(tmp_path / "one.json").read_text("utf-8"))
    check = check_certificate(network, tmp_path / "one.json", images)
    assert check.passed, check.problems

    def double_bounds(record: Record) -> None:
        record["boxes"]["bound"] = [2 * bound for bound in record["boxes"]["bound"]]

    def merge_boxes(record: Record) -> None:
        """One box instead of those that the splits left."""
        split = next(p for p in record["boxes"]["pixels"] if record["boxes"]["pixels"].count(p) > 1)
        rows = [n for n, pixel in enumerate(record["boxes"]["pixels"]) if pixel == split]
        lows = [record["boxes"]["low"][n][0] for n in rows]
        highs = [record["boxes"]["high"][n][0] for n in rows]
        record["boxes"]["low"][rows[0]], record["boxes"]["high"][rows[0]] = [min(lows)], [max(highs)]
        for n in rows[:0:-1]:
            for values in record["boxes"].values():
                del values[n]

    for tamper in (double_bounds, merge_boxes, remove_leaf):
        changed = copy.deepcopy(record)
        tamper(changed)
        check = check_certificate(network, written(changed, tmp_path / "two.json"), images)
        assert not check.passed, tamper


def test_numbers_that_are_not_finite_are_refused(
    made: tuple[nn.Module, Tensor, Record], tmp_path: Path
) -> None:
    network, images, record = made
    image, row, column = first(record, 1)
    for value in (float("nan"), float("inf")):
        changed = copy.deepcopy(record)
        changed["lower_bound"][image][row][column] = value
        with pytest.raises(ValueError, match="lower_bound holds something else than finite numbers"):
            check_certificate(network, written(changed, tmp_path / "one.json"), images)


def test_colors_without_a_value_are_refused(made: tuple[nn.Module, Tensor, Record], tmp_path: Path) -> None:
    """null stands for a bound that is not known, and for nothing else."""
    network, images, record = made
    for part, name in (("boxes", "low"), ("boxes", "high"), ("counterexamples", "colors")):
        changed = copy.deepcopy(record)
        changed[part][name][0] = [None]
        with pytest.raises(ValueError, match=f"{part}.{name} holds something else than finite numbers"):
            check_certificate(network, written(changed, tmp_path / "one.json"), images)


def test_boxes_with_too_many_colors_are_not_enumerated(tmp_path: Path) -> None:
    """All 256^3 colors of a pixel would take hours, and those of more channels more memory than there is."""
    layer = nn.Linear(3 * 2 * 2, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([2.0, -2.0]))
    network, images = nn.Sequential(nn.Flatten(), layer).eval(), torch.zeros(1, 3, 2, 2)
    certificate = certify_pixels(network, images, torch.tensor([0]), colors="8bit")
    assert certificate.proven_fraction == 1
    record = json.loads(certificate.to_json(tmp_path / "one.json").read_text("utf-8"))
    record["boxes"]["method"][0] = 2
    check = check_certificate(network, written(record, tmp_path / "one.json"), images)
    assert "has an enumerated box of more than 8192 colors" in check.sentence


# What takes the place of a part of a certificate.
ODD: tuple[object, ...] = (
    None, True, -1, 0, 1, 2, 7, 0.5, -0.5, 255, 1.0000001, 1e-300, 1e300, -1e300, 2**31, 2**63, -(2**63), 10**400,
    float("nan"), float("inf"), "x", [], {}, [0], [[]], [None],
)  # fmt: skip


def mutate(record: Record, random: Random) -> None:
    """Change one part, wherever it lies: its value, its place, how often it is there."""
    holder: Any = record
    key: Any = random.choice(sorted(record))
    # Down by one step at a time, so that small parts are met as often as large ones.
    while isinstance(holder[key], list | dict) and holder[key] and random.random() < 0.85:
        holder = holder[key]
        key = random.choice(sorted(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    kind = random.choice(["replace", "replace", "remove", "nest", "negate", "repeat", "exchange"])
    if kind == "remove":
        del holder[key]
    elif kind == "nest":
        holder[key] = [holder[key]]
    elif kind == "negate" and isinstance(holder[key], int | float):
        holder[key] = -holder[key]
    elif kind == "repeat" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "exchange" and isinstance(holder, list):
        other = random.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = copy.deepcopy(random.choice(ODD))


def mutate_colors(record: Record, random: Random) -> None:
    """Change the ends of a box, or the color of a counterexample."""
    boxes = record["boxes"]
    at = random.randrange(len(boxes["low"]))
    low, high = boxes["low"][at], boxes["high"][at]
    shift = random.choice([-1e300, -1.0, -1 / 255, 1e-4, 1.0, 1e300])
    kind = random.choice(["reverse", "low", "high", "point", "swap", "counterexample"])
    if kind == "counterexample" and record["counterexamples"]["colors"]:
        color = random.choice(record["counterexamples"]["colors"])
        color[0] += shift
    elif kind == "reverse":
        boxes["low"][at], boxes["high"][at] = high, low
    elif kind == "point":
        boxes["high"][at] = list(low)
    elif kind == "swap":
        other = random.randrange(len(boxes["low"]))
        for end in ("low", "high"):
            boxes[end][at], boxes[end][other] = boxes[end][other], boxes[end][at]
    else:
        (low if kind == "low" else high)[0] += shift


def claims(record: Record) -> Record:
    """What a certificate says about images: all but names, machines, and how it is known."""
    kept = {"format", "statement", "meaning", "colors", "image_shape", "images", "labels"}
    kept |= {"status", "certified", "patch"}  # of pixels, and against patches
    return {key: value for key, value in record.items() if key in kept}


MADE: list[Callable[[], tuple[nn.Module, Tensor, PixelCertificate | PatchCertificate]]] = [
    lambda: certified(weak_network(), colors="8bit:60/255"),
    lambda: certified(relu_network(), colors=0.3),
    lambda: certified(relu_network(), colors=0.3, statement="exact arithmetic"),
    lambda: masked_twice(bright_network(), torch.tensor([0.9, 0.35])),
]


def certified(made: Made, **options: Any) -> tuple[nn.Module, Tensor, PixelCertificate]:
    network, images = made
    return network, images, certify_pixels(network, images, network(images).argmax(1), **options)


def masked_twice(network: nn.Module, values: Tensor) -> tuple[nn.Module, Tensor, PatchCertificate]:
    images = values.view(-1, 1, 1, 1).expand(-1, 1, 12, 12)
    labels = torch.zeros(len(images), dtype=torch.long)
    return network, images, certify_patches(network, images, labels, patch=3, masks=3)


@pytest.mark.parametrize("make", MADE, ids=["8bit", "as run", "exact", "patches"])
def test_whatever_a_file_holds_the_check_ends_with_a_sentence_about_it(
    tmp_path: Path, make: Callable[[], tuple[nn.Module, Tensor, PixelCertificate | PatchCertificate]]
) -> None:
    """Random mutations: one that is read and passes claims what the certificate did; no other error is raised."""
    network, images, certificate = make()
    path = certificate.to_json(tmp_path / "one.json")
    original = json.loads(path.read_text("utf-8"))
    passed = 0
    for seed in range(60):
        random, record = Random(seed), copy.deepcopy(original)  # noqa: S311 - no secret
        mutate_any = mutate_colors if "boxes" in original and seed % 3 == 0 else mutate
        mutate_any(record, random)
        try:
            check = check_certificate(network, written(record, path), images, sample=20, seed=seed)
        except ValueError as error:
            assert str(error).startswith(  # noqa: PT017 - any other error fails the test by itself
                (f"{path} must be a certificate", "images must hold every image", "model must be the network")
            ), (seed, error)
            continue
        assert check.sentence.startswith("The certificate ")
        assert not check.passed or claims(record) == claims(original), (seed, check.sentence)
        passed += check.passed
    assert passed < 20
    check = check_certificate(network, written(original, path), images)
    assert check.passed, check.problems


def test_a_forged_pixel_is_found_whatever_the_sample(
    made: tuple[nn.Module, Tensor, Record], tmp_path: Path
) -> None:
    """A refuted pixel under one forged box: one box of every proven pixel is computed again, even in a sample of 1."""
    network, images, record = made
    changed = copy.deepcopy(record)
    prove_a_refuted_pixel_with_a_box(changed)
    path = written(changed, tmp_path / "one.json")
    for seed in range(5):
        assert not check_certificate(network, path, images, sample=1, seed=seed).passed


def test_the_sentence_says_how_large_the_sample_was_and_its_seed(
    made: tuple[nn.Module, Tensor, Record], tmp_path: Path
) -> None:
    network, images, record = made
    path = written(record, tmp_path / "one.json")
    every = check_certificate(network, path, images)
    assert every.complete
    assert "sample" not in every.sentence
    boxes, refuted = len(record["boxes"]["bound"]), len(record["counterexamples"]["pixels"])
    assert f"{boxes} of {boxes} bounds computed again;" in every.sentence
    one, two = (check_certificate(network, path, images, sample=1) for _ in range(2))
    assert one.seed != two.seed
    assert not one.complete
    assert one.sentence.startswith("The certificate holds as far as a sample shows: ")
    assert one.sentence.endswith(f"the sample was drawn with seed {one.seed}.")
    assert f"1 of {refuted} counterexamples run again" in one.sentence
    assert check_certificate(network, path, images, sample=1, seed=7).seed == 7


def test_a_tie_that_the_label_wins_holds(tmp_path: Path) -> None:
    """Class 0 and class 1 are level at one color; argmax takes the first."""
    layer = nn.Linear(16, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[1] = 1
        layer.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    network, images = nn.Sequential(nn.Flatten(), layer).eval(), torch.zeros(1, 1, 4, 4)
    certificate = certify_pixels(network, images, torch.tensor([0]), colors="8bit")
    assert certificate.proven_fraction == 1
    assert certificate.lower_bound.min() == 0
    check = check_certificate(network, certificate.to_json(tmp_path / "one.json"), images)
    assert check.passed, check.problems
    # Under the label that loses the tie, nothing is proven.
    other = certify_pixels(network, images, torch.tensor([1]), colors="8bit")
    assert other.proven_fraction == 0


class Fickle(nn.Module):
    """Other logits, once turned off, in a batch of three; a recording of one image does not show that, nor do four."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.off = layer, False

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return -logits if self.off and len(images) == 3 else logits


@pytest.mark.parametrize("statement", ["float32 as run", "exact arithmetic"])
def test_the_network_must_do_what_its_recording_says(tmp_path: Path, statement: str) -> None:
    network, images = seeded(lambda: Fickle(nn.Linear(16, 3)), 1, 4, 4)
    images = images[:1]
    certificate = certify_pixels(network, images, network(images).argmax(1), colors=0.01, statement=statement)
    assert certificate.proven_fraction == 1
    path = certificate.to_json(tmp_path / "one.json")
    assert check_certificate(network, path, images).passed
    vars(network)["off"] = True  # a fingerprint does not see it
    check = check_certificate(network, path, images)
    assert not check.passed
    assert "the network does not compute what its recording says" in check.sentence


def test_patch_certificates_are_of_float32_too(tmp_path: Path) -> None:
    network, images = bright_network(), torch.full((1, 1, 12, 12), 0.9)
    path = certify_patches(network, images, torch.tensor([0]), patch=3, masks=3).to_json(
        tmp_path / "one.json"
    )
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="float32 as run cannot be checked here: the float32 matmul"):
            check_certificate(network, path, images)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_single_mask_has_no_pairs(tmp_path: Path) -> None:
    """A patch as large as the image hides it whole; the class that is left is certified."""
    network, images = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 1, 8, 8)
    images = images[:1]
    label = network(torch.zeros(1, 1, 8, 8)).argmax(1)
    certificate = certify_patches(network, images, label, patch=8)
    assert certificate.certified.all()
    assert len(certificate.masks) == 1
    check = check_certificate(network, certificate.to_json(tmp_path / "one.json"), images)
    assert check.passed, check.problems
    assert check.complete


def test_a_class_that_does_not_exist_is_found_at_a_tie_too(tmp_path: Path) -> None:
    """Where two classes are as near as rounding, either may be stated, and no third."""
    network, images = bright_network(), torch.zeros(1, 1, 12, 12)
    vars(network)["after"] = torch.zeros_like
    certificate = certify_patches(network, images, torch.tensor([1]), patch=3, masks=3)
    record = json.loads(certificate.to_json(tmp_path / "one.json").read_text("utf-8"))
    assert check_certificate(network, tmp_path / "one.json", images).passed
    for value in (2, -1):
        path = written({**record, "predicted": [value]}, tmp_path / "one.json")
        check = check_certificate(network, path, images)
        assert "behind the masks, image 1 is not classified as stated" in check.sentence


def test_a_sample_of_pairs_of_masks_is_called_so(tmp_path: Path) -> None:
    network, images = bright_network(), torch.full((1, 1, 12, 12), 0.9)
    path = certify_patches(network, images, torch.tensor([0]), patch=3, masks=3).to_json(
        tmp_path / "one.json"
    )
    assert "36 of 36 pairs of masks" in check_certificate(network, path, images).sentence
    check = check_certificate(network, path, images, sample=5)
    assert check.passed
    assert "5 of 36 pairs of masks" in check.sentence
    assert f"seed {check.seed}" in check.sentence
