"""Claims are confirmed where they hold, and only there."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tests.pretend_gpu import GPU, PretendGPU
from weakspot import Classifier, attacks, regions, zoo
from weakspot.datasets.labeled import from_tensors
from weakspot.pairs import AttackResult, Pairs
from weakspot.reproduction import (
    PAPERS,
    VERDICTS,
    Claim,
    Material,
    Measurement,
    one_pixel,
    read_reproduction,
    reproduce,
)
from weakspot.reproduction.claims import CAUTION, CONFIRMED, NOT_CONFIRMED, UNTESTED, Difference, too_few
from weakspot.reproduction.localized import Localized
from weakspot.reproduction.material import guesses, unsure
from weakspot.reproduction.one_pixel import OnePixel, _beside, proven_safe, ring_rates
from weakspot.reproduction.paper_page import paper_page, verdict_table
from weakspot.reproduction.perturbation_types import Promotion
from weakspot.reproduction.spatial import Spatial
from weakspot.training import Matrix


class Bright(nn.Module):
    """Class 1 if any pixel is bright: one pixel fools it, wherever it is."""

    def forward(self, images: Tensor) -> Tensor:
        peak = images.amax((1, 2, 3))
        return torch.stack([torch.full_like(peak, 0.7), peak], 1)


class Window(nn.Module):
    """Class 1 if the patch of 5 x 5 pixels in the middle has a bright pixel: neighbors share the weakness."""

    def forward(self, images: Tensor) -> Tensor:
        peak = images[..., 4:9, 4:9].amax((1, 2, 3))
        return torch.stack([torch.full_like(peak, 0.7), peak], 1)


def material(
    model: nn.Module, count: int = 24, *, size: int = 13, channels: int = 3, seed: int = 0
) -> Material:
    images = 0.5 * torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    return Material(model, images, labels, "random images")


@pytest.fixture(autouse=True)
def few_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pixel, "IMAGES", {True: 2})
    monkeypatch.setattr(one_pixel, "PIXELS", {True: 3})


@pytest.fixture(scope="module")
def random_network() -> nn.Module:
    torch.manual_seed(0)
    return zoo.two_conv(classes=4, channels=3, size=(16, 16)).eval()


class Centered(nn.Module):
    """A network with random weights whose classes are balanced on given images: it looks trained and is not."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            logits = network(images)
        self.register_buffer("middle", logits.mean(0))
        self.register_buffer("spread", logits.std(0))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 3 * (self.network(images) - self.middle) / self.spread
        return logits


def pooled(classes: int) -> nn.Sequential:
    """Three convolutions, the mean over sites, and one linear layer."""
    layers: list[nn.Module] = []
    for given, width, stride in ((3, 16, 1), (16, 16, 2), (16, 32, 2)):
        layers += [nn.Conv2d(given, width, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)).eval()


def untrained(seed: int, count: int = 40, size: int = 24) -> Material:
    """Blurred noise and a network with random weights that divides it evenly into five classes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = (smooth + 0.1 * torch.randn(count, 3, size, size, generator=generator)).clamp(0, 1)
    torch.manual_seed(seed)
    model = Centered(pooled(5), images).eval()
    with torch.no_grad():
        return Material(model, images, model(images).argmax(1), "noise")


def quadrants(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright blob, whose quadrant is the class."""
    images = 0.4 + 0.025 * torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 4, (count,), generator=generator)
    places = torch.randint(1, 4, (count, 2), generator=generator)
    for image, label, (down, right) in zip(images, labels.tolist(), places.tolist(), strict=True):
        top, left = 8 * (label // 2) + down, 8 * (label % 2) + right
        image[:, top : top + 3, left : left + 3] += 0.03
    return images.clamp(0, 1), labels


@pytest.fixture(scope="module")
def learned() -> Material:
    """A network that has learned to find the blob, and images that it classifies correctly."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip
    network = Classifier.wrap(layers, mean=(0.4,), std=(0.1,), input_size=(16, 16))
    optimizer = torch.optim.Adam(layers.parameters(), 3e-3)
    for _ in range(300):
        images, labels = quadrants(generator, 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(layers((images - 0.4) / 0.1), labels).backward()
        optimizer.step()
    layers.eval()
    images, labels = quadrants(generator, 60)
    with torch.no_grad():
        right = network(images).argmax(1) == labels
    assert right.float().mean() > 0.9
    return Material(network, images[right][:24], labels[right][:24], "blobs")


def test_the_own_entries_of_the_matrix_are_the_scores_of_overlap(random_network: nn.Module) -> None:
    spatial = Spatial(material(random_network, size=16))
    claim = spatial.looks()
    assert claim.value("effect on the own region of importance") == pytest.approx(
        spatial.overlap.scores["effect_in_roi"].mean(), abs=1e-4
    )


@pytest.mark.parametrize("seed", range(3))
def test_unrelated_attacks_and_maps_do_not_confirm_a_relation(random_network: nn.Module, seed: int) -> None:
    spatial = Spatial(material(random_network, size=16, seed=seed))
    unrelated = replace(spatial.overlap, vulnerability=torch.rand_like(spatial.overlap.vulnerability))
    spatial.__dict__["overlap"] = unrelated
    assert spatial.looks().verdict == NOT_CONFIRMED


def test_attacks_inside_their_own_region_of_importance_confirm_it(random_network: nn.Module) -> None:
    spatial = Spatial(material(random_network, size=16))
    rows = torch.arange(24)
    roi = torch.zeros_like(spatial.overlap.roi)
    roi[rows, 0, rows % 16, :3] = True  # every image looks elsewhere
    roi[rows, 0, (rows * 5) % 16, 5:12] = True
    planted = replace(spatial.overlap, roi=roi, vulnerability=roi.float() + 0.01)
    spatial.__dict__["overlap"] = planted
    claim = spatial.looks()
    assert claim.verdict == CONFIRMED
    assert "both favor the middle" not in claim.control.replace(
        "may both", "may"
    )  # here, both favor the left


def test_a_weakness_of_one_place_is_shared_by_neighbors_and_one_of_every_place_is_not() -> None:
    local, everywhere = (OnePixel(material(model)).neighbors() for model in (Window(), Bright()))
    assert local.verdict in {CONFIRMED, CAUTION}
    assert local.value("neighbors") > 2 * local.value("random")
    assert everywhere.verdict == NOT_CONFIRMED


def test_too_few_attacks_decide_nothing() -> None:
    class Deaf(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([2.0, -1.0]).repeat(len(images), 1) + 0 * images.sum()

    paper = OnePixel(material(Deaf()))
    assert {claim().verdict for claim in paper.claims.values()} == {UNTESTED}
    assert "One pixel fooled the network on 0 of 24 images; 20 are needed." in paper.neighbors().measured


def test_controls_that_are_missing_are_not_given_as_numbers() -> None:
    """Every attack succeeds: there is no failed one beside them."""
    paper = OnePixel(material(Bright()))
    assert paper.pairs is not None
    assert bool(paper.pairs.success.all())
    assert paper.neighbors().control == "There is no failed attack to compare with."
    none = pd.Series({"images": 0, "spread": np.nan, "reach": np.nan})
    some = pd.Series({"images": 24, "spread": 0.5, "spread_low": 0.4, "spread_high": 0.6})
    some = pd.concat([some, pd.Series({"reach": 1.0, "reach_low": 0.9, "reach_high": 1.1})])
    rows = {"successes": some, "failures": none, "random edits": some}
    assert _beside(rows) == "Random edits: 50% [40%, 60%] of the sites, 1 [0.9, 1.1] times the peak."
    assert _beside({"successes": some, "failures": none}) == "There is no other attack to compare with."


def test_what_has_learned_nothing_is_the_network_with_permuted_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    permuted, studied = Classifier.wrap(Bright().eval()), []

    def study(model: nn.Module, pairs: Pairs, *, seed: int) -> SimpleNamespace:
        studied.append(model)
        assert bool((pairs.labels != model(pairs.clean).argmax(1)).all())
        row = {"layer": "last", "group": "random edits", "reach_high": 0.25}
        return SimpleNamespace(layers=["last"], table=pd.DataFrame([row, {**row, "group": "successes"}]))

    monkeypatch.setattr(one_pixel, "with_shuffled_weights", lambda *_: permuted)
    monkeypatch.setattr(one_pixel, "propagation_study", study)
    assert OnePixel(material(Bright().eval())).unlearned["reach_high"] == 0.25
    assert studied == [permuted]


def test_a_control_that_is_not_exceeded_is_not_said_to_be_equal(
    monkeypatch: pytest.MonkeyPatch, learned: Material
) -> None:
    """Wide intervals: a network without learning passes on half as much, and failed attacks a quarter."""

    def row(group: str, reach: float, low: float, high: float) -> dict[str, object]:
        spread = {"spread": 0.6, "spread_low": 0.5, "spread_high": 0.7}
        reached = {"reach": reach, "reach_low": low, "reach_high": high}
        return {"layer": "last", "group": group, "images": 24, **spread, **reached}

    paper = OnePixel(material(Bright()))
    rows = [
        row("successes", 0.8, 0.5, 1.1),
        row("failures", 0.2, 0.0, 0.6),
        row("random edits", 0.6, 0.3, 0.9),
    ]
    paper.__dict__["study"] = SimpleNamespace(layers=["last"], table=pd.DataFrame(rows))
    paper.__dict__["unlearned"] = pd.Series(row("random edits", 0.3, 0.1, 0.5))
    claim = paper.reaches()
    assert claim.verdict == NOT_CONFIRMED
    assert claim.control.endswith(
        "Random pixels do not clearly arrive more strongly than in a network that has learned nothing."
    )
    paper.__dict__["unlearned"] = pd.Series(row("random edits", 0.1, 0.0, 0.2))
    claim = paper.reaches()
    assert claim.verdict == CAUTION
    assert "Successful attacks do not clearly exceed failed ones and random pixels" in claim.control
    # Nothing was measured on the network with permuted weights.
    promotion = Promotion(replace(learned))
    monkeypatch.setattr(promotion, "_without_learning", lambda: (np.nan, np.nan, np.nan))
    claim = promotion.cam()
    assert claim.verdict != UNTESTED
    assert "with the same attack, the difference is not defined." in claim.control.replace(
        "and the", "with the"
    )
    assert "does not clearly exceed" not in claim.control


def test_what_is_too_few_agrees_with_its_verb(
    random_network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert too_few(1, "attack", "succeed", 10) == "Only 1 attack succeeds; 10 are needed."
    assert too_few(0, "attack", "succeed", 10) == "Only 0 attacks succeed; 10 are needed."
    masks = torch.zeros(24, 1, 16, 16, dtype=torch.bool)
    masks[3, :, :4] = True
    monkeypatch.setattr(regions, "background", lambda _: masks)
    claim = Localized(material(random_network, size=16), tmp_path).background()
    assert claim.measured == "Only 1 image has a background that can be found; 10 are needed."


@pytest.mark.parametrize(
    ("fooled", "control", "verdict", "ending"),
    [
        (12, 24, CAUTION, "The background is less sensitive than as many pixels anywhere, but sensitive."),
        (12, 13, CAUTION, "The background is not shown to be more sensitive than as many pixels anywhere."),
        (20, 4, CONFIRMED, "24 images."),
        (1, 0, NOT_CONFIRMED, "24 images."),
    ],
    ids=["below", "equal", "above", "not sensitive"],
)
def test_the_background_is_compared_with_the_whole_image(
    random_network: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fooled: int,
    control: int,
    verdict: str,
    ending: str,
) -> None:
    """The control may lie in the background too, so nothing is known of the rest."""
    masks = torch.zeros(24, 1, 16, 16, dtype=torch.bool)
    masks[:, :, :4] = True
    monkeypatch.setattr(regions, "background", lambda _: masks)
    outcomes = iter([torch.arange(24) < fooled, torch.arange(24) < control])

    class Confined:
        def __init__(self) -> None:
            self.success = next(outcomes)

    monkeypatch.setattr(attacks, "pgd", lambda *_, **__: Confined())
    claim = Localized(material(random_network, size=16), tmp_path).background()
    assert claim.verdict == verdict
    assert claim.control.endswith(ending)


def test_pixels_that_no_color_turns_are_proven_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pixel, "IMAGES", {True: 3})
    monkeypatch.setattr(one_pixel, "PIXELS", {True: 64})
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(192, 4)
    linear.weight.data, linear.bias.data = torch.randn(4, 192, generator=generator), torch.zeros(4)
    head, images = nn.Sequential(nn.Flatten(), linear).eval(), torch.rand(3, 3, 8, 8, generator=generator)
    few = Material(head, images, head(images).argmax(1), "noise")
    rows = {
        one.name: one.value for one in proven_safe(few, Pairs.of(head, few.images, few.images, few.labels))
    }
    # A linear network has a closed form: the largest loss of margin that one color can cause.
    weight, bias = linear.weight.double(), linear.bias.double()
    logits = few.images.double().flatten(1) @ weight.T + bias
    gain = (
        weight[None] - weight[few.labels][:, None]
    )  # (N, K, 192), what each value adds to another class's lead
    own = few.images.double().flatten(1)[:, None]
    best = torch.maximum(gain * (1 - own), gain * -own).view(3, 4, 3, 64).sum(2)
    lead = logits - logits.gather(1, few.labels[:, None])
    safe = ((lead[:, :, None] + best < 0) | (lead == 0)[:, :, None]).all(1)
    assert 0 < float(safe.double().mean()) < 1
    assert rows["pixels proven safe"] == pytest.approx(float(safe.double().mean()), abs=1e-5)
    assert rows["pixels with a color that fools"] == pytest.approx(float((~safe).double().mean()), abs=1e-5)
    assert rows["pixels not decided"] == 0


def test_a_network_without_bounds_has_nothing_proven() -> None:
    class Odd(Bright):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).sin()

    network = material(Odd(), 3)
    assert proven_safe(network, Pairs.of(network.model, network.images, network.images)) == ()


def test_photographs_are_too_large_for_one_pixel(random_network: nn.Module) -> None:
    large = Material(random_network, torch.rand(2, 3, 80, 80), torch.zeros(2, dtype=torch.long), "")
    assert OnePixel(large).reaches().verdict == UNTESTED


def test_training_needs_training_data(random_network: nn.Module, tmp_path: Path) -> None:
    assert Localized(material(random_network, size=16), tmp_path).training().verdict == UNTESTED


@pytest.mark.parametrize("paper", ["spatial", "perceptual", "promotion", "one-pixel"])
def test_the_same_seed_gives_the_same_claims_and_finished_ones_are_not_measured_again(
    paper: str, learned: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reproduce(paper, replace(learned), tmp_path / "one")
    assert {claim.verdict for claim in first.claims} != {UNTESTED}
    assert reproduce(paper, replace(learned), tmp_path / "two") == first
    monkeypatch.setattr(AttackResult, "__getitem__", _never)
    assert reproduce(paper, replace(learned), tmp_path / "one") == first
    assert read_reproduction(tmp_path / "one" / f"{paper}.json") == first
    assert {claim.verdict for claim in first.claims} <= set(VERDICTS)
    assert all(claim.quote in str(first) for claim in first.claims)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_with_random_weights_confirms_no_claim_about_learning(seed: int, tmp_path: Path) -> None:
    """These claims have a control of their own; that the network guesses is not even looked at."""
    given = untrained(seed)
    owned = {
        "spatial": ("regions correlate", "regions matter"),
        "perceptual": ("changes lie where the network looks",),
        "promotion": ("perturbations follow the class activation", "sensitive units are interpretable"),
        "one-pixel": ("reaches the last layer", "becomes global", "neighbors share the weakness"),
    }
    for paper, names in owned.items():
        claims = PAPERS[paper].claims(given, tmp_path).claims
        for name in names:
            claim = claims[name]()
            assert claim.verdict in {NOT_CONFIRMED, UNTESTED}, str(claim)


def test_a_network_that_guesses_tests_nothing(learned: Material, tmp_path: Path) -> None:
    images, labels = quadrants(torch.Generator().manual_seed(5), 100)
    torch.manual_seed(5)
    fresh = zoo.two_conv(classes=4, channels=3, size=(16, 16)).eval()
    with torch.no_grad():
        assert "not clearly more than guessing among 4 classes" in guesses(
            fresh(images).argmax(1) == labels, 4
        )
        assert not guesses(learned.model(images).argmax(1) == labels, 4)
        assert "nothing shows that it has learned" in unsure(0.1 * fresh(images))
        assert not unsure(10 * learned.model(images))
    result = reproduce("spatial", replace(learned, unusable="It guesses."), tmp_path)
    assert {(claim.verdict, claim.measured) for claim in result.claims} == {(UNTESTED, "It guesses.")}


def test_images_of_one_class_test_nothing(learned: Material, tmp_path: Path) -> None:
    one = replace(learned, labels=torch.zeros_like(learned.labels))
    assert "have the same class" in one.why_not
    assert {claim.verdict for claim in reproduce("one-pixel", one, tmp_path).claims} == {UNTESTED}
    assert not learned.why_not


def test_every_figure_is_drawn_and_survives_the_file(learned: Material, tmp_path: Path) -> None:
    result = reproduce("spatial", learned, tmp_path)
    maps = [panel for claim in result.claims for panel in claim.panels if panel.kind == "map"]
    assert len(maps) == 2
    # Both maps are relative to their own mean.
    assert all(np.mean(np.array(panel.grid, dtype=float)) == pytest.approx(1, abs=1e-3) for panel in maps)
    again = read_reproduction(tmp_path / "spatial.json")
    assert again.claims == result.claims
    page = paper_page(again, [f"{number}.svg" for number in range(3)])
    assert all(text in page for text in (result.title, "**quick** run", "](2.svg)", "## Limits"))
    assert all(claim.verdict in page and claim.quote in page for claim in result.claims)
    assert "| [spatial](spatial.md) | regions matter |" in verdict_table([again], ["spatial.md"])
    result.figure().savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert (result.made.seconds > 0, result.made.cpu_seconds > 0) == (True, True)


def test_time_adds_up_over_the_pieces_of_an_interrupted_run(learned: Material, tmp_path: Path) -> None:
    whole = reproduce("spatial", replace(learned), tmp_path)
    resumed = reproduce("spatial", replace(learned), tmp_path)
    assert resumed.made.cpu_seconds == whole.made.cpu_seconds
    stored = next(tmp_path.glob(".spatial-regions-matter-*.json"))
    stored.unlink()
    assert reproduce("spatial", replace(learned), tmp_path) == whole


def test_time_of_an_interrupted_run_counts(
    learned: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = iter(range(10_000))
    monkeypatch.setattr(
        "weakspot.reproduction.papers._clocks", lambda: (3600.0 * (hour := next(hours)), hour)
    )
    steps: list[str] = []

    def interrupted(step: str) -> None:
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("spatial", replace(learned, log=interrupted), tmp_path)
    (stored,) = tmp_path.glob(".spatial-*-spent.json")
    before = json.loads(stored.read_text())
    assert before[1] >= 4
    made = reproduce("spatial", replace(learned), tmp_path).made
    # All hours but the one between the two runs.
    assert made.cpu_seconds == next(hours) - 2
    assert made.seconds == 3600 * made.cpu_seconds


def test_pieces_of_an_attack_equal_the_whole_and_are_not_attacked_again(
    learned: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OnePixel(learned).pairs
    pieces = OnePixel(replace(learned, store=tmp_path)).pairs
    assert whole is not None
    assert pieces is not None
    assert torch.equal(whole.adversarial, pieces.adversarial)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # 24 images in pieces of 16
    monkeypatch.setattr("weakspot.attacks.few_pixel", _never)
    again = OnePixel(replace(learned, store=tmp_path)).pairs
    assert again is not None
    assert torch.equal(again.adversarial, whole.adversarial)


@pytest.mark.parametrize(
    ("paper", "name"),
    [
        ("spatial", "regions matter"),
        ("localized", "the background is enough"),
        ("promotion", "three types"),
        ("one-pixel", "neighbors share the weakness"),
        *(
            pytest.param(paper, name, marks=pytest.mark.slow)
            for paper, name in (
                ("spatial", "regions correlate"),
                ("spatial", "neutralizing helps"),
                ("perceptual", "less visible"),
                ("perceptual", "changes lie where the network looks"),
                ("promotion", "perturbations follow the class activation"),
                ("promotion", "sensitive units are interpretable"),
                ("one-pixel", "reaches the last layer"),
            )
        ),
    ],
)
def test_a_network_on_a_gpu_gives_the_same_claims(
    paper: str, name: str, learned: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pretend GPU computes as the CPU does, so that every number is the same."""
    masks = torch.zeros(24, 1, 16, 16, dtype=torch.bool)
    masks[:, :, :8] = True
    monkeypatch.setattr(regions, "background", lambda _: masks)
    # Float32 as run is proven on the CPU alone.
    monkeypatch.setattr(one_pixel, "proven_safe", lambda *_: ())
    here = PAPERS[paper].claims(replace(learned), tmp_path).claims[name]()
    assert here.verdict != UNTESTED
    with PretendGPU():
        there = replace(learned, model=copy.deepcopy(learned.model).to(GPU))
        assert PAPERS[paper].claims(there, tmp_path).claims[name]() == here


def test_a_run_that_is_resumed_on_a_gpu_has_its_pieces_on_one_device(
    learned: Material, tmp_path: Path
) -> None:
    with PretendGPU():
        given = replace(learned, model=copy.deepcopy(learned.model).to(GPU), store=tmp_path)
        whole = replace(given).pairs
        next(tmp_path.glob("*-0-*.safetensors")).unlink()
        resumed = replace(given).pairs
    for pairs in (whole, resumed):
        assert (pairs.adversarial.device.type, pairs.success.device.type) == ("cpu", "cpu")
    assert torch.equal(whole.adversarial, resumed.adversarial)


def test_rates_in_a_ring_count_its_sites() -> None:
    success = torch.zeros(2, 5, 5, dtype=torch.bool)
    success[0, 1, 1] = True  # one of the eight neighbors of (2, 2)
    success[1, 0, 1] = True  # one of the three neighbors of the corner
    assert ring_rates(success, torch.tensor([12, 0]), 1).tolist() == pytest.approx([1 / 8, 1 / 3])
    assert len(ring_rates(success, torch.tensor([12, 0]), 3)) == 1  # none lies 3 away from the middle


def test_a_measurement_that_is_not_defined_is_written_as_such() -> None:
    assert Measurement("rate", float("nan"), float("nan"), 0.5).cells == ("rate", "not defined", "", "")
    assert Measurement("rate", 0.25, 0.1, 0.5, 1200).cells == ("rate", "25%", "10% to 50%", "1,200")


def _never(*_: object) -> None:
    raise AssertionError("measured again")


def test_a_stored_reproduction_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "spatial.json"
    path.write_text(json.dumps({"paper": "spatial", "claims": []}))
    with pytest.raises(ValueError, match=r"spatial\.json is not a stored reproduction"):
        read_reproduction(path)


def test_other_images_are_never_the_own() -> None:
    given = material(Bright(), 9)
    maps = torch.arange(9)[:, None, None, None].float()
    assert (given.others(maps) != maps).all()
    assert sorted(given.others(maps).flatten().tolist()) == list(range(9))


@pytest.mark.parametrize(
    ("clean", "robust", "verdict", "sentence"),
    [
        ((0.02, 0.01, 0.03), (0.3, 0.2, 0.4), "confirmed", ""),
        ((0.0, -0.01, 0.01), (0.3, 0.2, 0.4), "confirmed with a caution", "is not shown to rise"),
        # No interval, because few images differ.
        ((0.0, np.nan, np.nan), (0.3, 0.2, 0.4), "confirmed with a caution", "is not shown to rise"),
        ((-0.03, -0.05, -0.01), (0.3, 0.2, 0.4), "confirmed with a caution", "falls, so this part"),
        ((-0.03, -0.05, -0.01), (0.01, -0.1, 0.1), "not confirmed", ""),
        ((0.02, 0.01, 0.03), (0.04, 0.01, 0.07), "not confirmed", "is no larger"),  # seeds differ by .05
    ],
)
def test_what_is_said_of_localized_training_follows_from_its_two_differences(
    clean: tuple[float, ...],
    robust: tuple[float, ...],
    verdict: str,
    sentence: str,
    learned: Material,
    tmp_path: Path,
) -> None:
    recipes, tests = ("standard", "localized", "full"), ("clean", "localized", "full")
    accuracy = [
        {
            "recipe": recipe,
            "test": test,
            "accuracy": 0.9,
            "low": 0.8,
            "high": 0.95,
            "spread": 0.05,
            "images": 9,
        }
        for recipe in recipes
        for test in tests
    ]
    shown = {"clean": clean, "localized": robust, "full": (0.0, -0.1, 0.1)}
    differences = [
        {"test": test, "recipe": "localized", "against": against}
        | dict(zip(("difference", "low", "high"), shown[test], strict=True))
        for test in tests
        for against in ("standard", "full")
    ]
    claims = Localized(learned, tmp_path)
    stopped = {"full-1": "robust accuracy fell"}
    vars(claims)["matrix"] = Matrix(pd.DataFrame(accuracy), pd.DataFrame(differences), stopped)
    claim = claims.training()
    assert "The training of full-1 ended early: robust accuracy fell." in claim.control
    assert claim.verdict == verdict
    for part in ("is not shown to rise", "falls, so this part", "is no larger"):
        assert (part in claim.control) == (part == sentence)


@pytest.mark.parametrize(
    ("first", "second", "beyond"),
    [
        (lambda n: np.ones(n, bool), lambda n: np.zeros(n, bool), True),
        (lambda n: np.arange(n) % 2 == 0, lambda n: np.arange(n) % 2 == 1, False),
    ],
)
def test_a_difference_is_beyond_zero_if_its_interval_is(
    first: Callable[[int], np.ndarray], second: Callable[[int], np.ndarray], beyond: bool
) -> None:
    assert Difference.of(first(40), second(40)).beyond_zero == beyond


def test_every_paper_has_claims_with_words_of_the_abstract(random_network: nn.Module, tmp_path: Path) -> None:
    for paper in PAPERS.values():
        assert paper.claims(material(random_network, 2, size=16), tmp_path).claims
    claim = Claim("name", "the words", "measured", "control", CONFIRMED)
    assert "the words" in str(claim)


@pytest.mark.train
def test_trained_networks_are_not_trained_again(
    learned: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count, size in ((160, 32), (60, 32)):
        images, labels = quadrants(generator, count)
        large = nn.functional.interpolate((images - 0.4) * 8 + 0.5, size=size).clamp(0, 1)
        order = labels.argsort()  # as in folders of classes
        parts.append(from_tensors(large[order], labels[order], class_names=[*"abcd"], name="blobs"))
    train, test = parts

    def make(seed: int) -> nn.Module:
        return zoo.build("two_conv", classes=4, channels=3, size=(32, 32), seed=seed)

    given = replace(
        learned,
        images=test.images(torch.arange(20)),
        labels=test.labels[:20],
        train=train,
        test=test,
        make=make,
    )
    first = Localized(given, tmp_path).training()
    assert first.verdict in VERDICTS
    assert sorted(path.name for path in (tmp_path / "networks-quick").glob("*-0")) == [
        "full-0",
        "localized-0",
        "standard-0",
    ]
    monkeypatch.setattr("torch.optim.SGD.step", _never)
    assert Localized(given, tmp_path).training() == first
    # One network is missing: only this one is trained.
    shutil.rmtree(tmp_path / "networks-quick/full-0")
    with pytest.raises(AssertionError, match="measured again"):
        Localized(given, tmp_path).training()


def test_regions_that_matter_are_confirmed_with_a_caution_at_most(
    learned: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four networks with random weights passed this test: each region is chosen by what it is tested for."""
    monkeypatch.setattr(Difference, "of", lambda *_: Difference(0.9, 0.3, 0.4, 0.7, 23))
    claim = Spatial(learned).regions()
    assert claim.verdict == CAUTION, str(claim)
    assert "networks that have learned nothing can pass this test" in claim.control


def test_a_difference_is_over_the_images_that_have_both_values(
    learned: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion = Promotion(learned)
    promotion.__dict__["pairs"] = learned.pairs
    monkeypatch.setattr(promotion, "_without_learning", lambda: (0.0, 0.0, 0.0))
    promotion.__dict__["successes"] = 40
    own = np.random.default_rng(0).uniform(0.6, 0.7, 40)
    table = pd.DataFrame({"interpretability_label": own, "interpretability_label_null": own - own**2 / 9})
    table.loc[:5, "interpretability_label_null"] = np.nan
    monkeypatch.setattr("weakspot.reproduction.perturbation_types.interpretability_test", lambda *_: table)
    claim = promotion.cam()
    assert "(34 images)" in claim.measured
    values = {one.name: one.value for one in claim.table}
    both = (values[f"length in {whose}"] or 0 for whose in ("the own class activation", "other images'"))
    assert next(both) - next(both) == pytest.approx(values["difference"], abs=1e-5)
    table.loc[:20, "interpretability_label_null"] = np.nan
    claim = promotion.cam()
    assert claim.verdict == UNTESTED
    assert claim.measured == "Only 19 images can be compared with other images; 20 are needed."


def test_claims_about_training_depend_on_its_data(learned: Material) -> None:
    data = from_tensors(learned.images, learned.labels, class_names=list("abcd"))
    other = from_tensors(learned.images.flip(3), learned.labels, class_names=list("abcd"))
    given = [replace(learned, train=train, test=data) for train in (None, data, other)]
    assert len({one.training_key for one in given}) == 3
    assert {one.key for one in given} == {learned.key}
