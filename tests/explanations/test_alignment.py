"""SSIM alignment: closed forms, a planted alignment is found, what follows from the image alone is not accused."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import Made, untouched
from weakspot import (
    L2,
    SSIM,
    Budget,
    Linf,
    ModelWarning,
    Pairs,
    attacks,
    explain,
    overlap,
    regions,
    ssim_alignment,
)
from weakspot.classifier import as_classifier
from weakspot.explanations.alignment_findings import STATISTICS, SsimAlignment, alignment
from weakspot.explanations.analysis import competing_classes
from weakspot.explanations.visible_change import (
    margin_gradient,
    pgd_of_equal_ssim,
    variance_gradient,
    with_shuffled_weights,
)
from weakspot.similarity import ssim_map
from weakspot.statistics import RunTest

SIZE, COUNT = 32, 40


def blobs(count: int, seed: int, *, spread: float = 1.0) -> Tensor:
    """(N, 1, H, W) a Gaussian hill in each, at a place of its own."""
    generator = torch.Generator().manual_seed(seed)
    middle = SIZE / 2 + spread * (SIZE / 2 - 7) * (2 * torch.rand(count, 2, generator=generator) - 1)
    sites = torch.arange(SIZE)
    down = (sites[None, :, None] - middle[:, :1, None]).square()
    across = (sites[None, None, :] - middle[:, 1:, None]).square()
    return torch.exp(-(down + across) / (2 * 3**2))[:, None]


class RedEvidence(nn.Module):
    """Evidence for class 0 is red; class 1 gains by green, up or down site by site."""

    signs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gather = nn.Conv2d(3, 1, 1, bias=False)
        self.gather.weight.data = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
        self.slope = 8.0
        generator = torch.Generator().manual_seed(9)
        self.register_buffer("signs", torch.rand(SIZE, SIZE, generator=generator).sub(0.5).sign())

    def forward(self, images: Tensor) -> Tensor:
        evidence = self.slope * F.relu(self.gather(images)).mean((1, 2, 3))
        return torch.stack([evidence, 2 * (images[:, 1] * self.signs).mean((1, 2))], 1)


def photographs(evidence: Tensor, seed: int, texture: Tensor | float = 1.0) -> Tensor:
    """Images whose red is the evidence, with texture of all colors everywhere, or where it is asked for."""
    noise = torch.rand(len(evidence), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) - 0.5
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    return (0.3 + 0.3 * evidence * red + 0.3 * noise * texture).clamp(0.01, 0.99)


def changed(clean: Tensor, where: Tensor, seed: int) -> Pairs:
    """Random changes of gray as strong as `where`, and a trace of them everywhere."""
    signs = (
        torch.rand(len(clean), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).sub(0.5).sign()
    )
    adversarial = (clean + (0.002 + 0.1 * where) * signs).clamp(0, 1)
    return Pairs(clean, adversarial, torch.zeros(len(clean)).long(), torch.ones(len(clean)).long())


# ---------------------------------------------------------------- the statistics


def test_statistics_are_highest_inside_the_activation_and_lowest_outside() -> None:
    hill = blobs(1, 0)
    result = {name: float(value) for name, value in alignment(hill, hill).items()}
    area = float((hill > 0.5).double().mean())
    inside = float(hill[hill > 0.5].double().sum() / hill.double().sum())
    assert result["ssim_pointing"] == 1
    assert result["ssim_spearman"] == pytest.approx(1)
    assert result["ssim_concentration"] == pytest.approx(inside / area)
    apart = torch.where(hill > 0.5, 0.0, 1 - hill)
    away = {name: float(value) for name, value in alignment(apart, hill).items()}
    assert away["ssim_pointing"] == away["ssim_concentration"] == 0
    assert away["ssim_spearman"] < -0.5


def test_alignment_equals_its_definition_for_every_pairing() -> None:
    generator = torch.Generator().manual_seed(3)
    change = torch.rand(4, 1, 7, 5, generator=generator) ** 3
    change[1, 0, 2, 1] = change[1, 0, 4, 3] = 2.0  # two most changed sites
    maps = torch.randn(6, 1, 7, 5, generator=generator)
    result = alignment(change, maps)
    for j, visible in enumerate(change[:, 0].double().numpy()):
        for i, looked in enumerate(maps[:, 0].double().numpy()):
            region = looked > looked.max() / 2
            expected = {
                "ssim_pointing": region[visible == visible.max()].mean(),
                "ssim_concentration": visible[region].sum() / visible.sum() / region.mean(),
                "ssim_spearman": spearmanr(visible.ravel(), looked.ravel())[0],
            }
            for name, value in expected.items():
                assert float(result[name][j, i]) == pytest.approx(value), (name, j, i)


@pytest.mark.parametrize("which", ["nothing changed", "all alike changed", "unknown", "negative", "constant"])
def test_undefined_maps_have_no_statistic(which: str) -> None:
    change, looked = blobs(1, 0), blobs(1, 1)
    if which == "nothing changed":
        change = torch.zeros_like(change)
    elif which == "all alike changed":
        change = torch.full_like(change, 0.2)
    elif which == "unknown":
        change = torch.full_like(change, torch.nan)
    else:
        looked = looked - 2 if which == "negative" else torch.ones_like(looked)
    result = alignment(torch.cat([change, blobs(1, 2)]), torch.cat([looked, blobs(1, 3)]))
    for name in STATISTICS:
        assert bool(result[name][0, 0].isnan()), name
        assert bool(result[name][1, 1].isfinite()), name


# ---------------------------------------------------------------- verdicts


def test_a_planted_alignment_is_found() -> None:
    evidence = blobs(COUNT, 1)
    result = ssim_alignment(RedEvidence().eval(), changed(photographs(evidence, 2), evidence, 3))
    assert result.aligned_overall
    assert result.aligned.mean() > 0.3
    assert "The visible change lies where the network looks, on average over 40 images" in result.sentences[0]
    assert "variance x gradient" in result.sentences[0]
    assert (result.scores["ssim_concentration"] > result.scores["ssim_concentration_pgd"]).all()
    assert result.why_not == ("",) * COUNT


def test_least_numbers_of_images_for_a_run_and_for_a_single_image() -> None:
    evidence = blobs(COUNT, 1)
    clean = photographs(evidence, 2)
    for count, stated in ((9, False), (19, True)):
        some = changed(clean[:count], evidence[:count], 3)
        result = ssim_alignment(RedEvidence().eval(), some)
        assert result.aligned_overall == stated
        assert not result.aligned.any()
        assert result.scores["ssim_concentration_p"].isna().all()
    filled = ssim_alignment(RedEvidence().eval(), some, reference=clean[count:])
    assert filled.scores["ssim_concentration_p"].notna().all()


@pytest.mark.parametrize("spread", [1.0, 0.3], ids=["anywhere", "all near the middle"])
def test_an_unrelated_change_is_not_accused(spread: float) -> None:
    evidence, elsewhere = blobs(70, 1, spread=spread), blobs(70, 4, spread=spread)
    result = ssim_alignment(RedEvidence().eval(), changed(photographs(evidence, 2), elsewhere, 3))
    for name in STATISTICS:
        assert (result.scores[f"{name}_p"] <= 0.05).mean() <= 0.10, name
    assert not result.aligned.any()
    assert not result.aligned_overall
    assert "There is not enough evidence that" in result.sentences[0]


def test_noise_of_equal_size_is_not_accused() -> None:
    result = ssim_alignment(
        RedEvidence().eval(), changed(photographs(blobs(COUNT, 1), 2), torch.ones(COUNT, 1, SIZE, SIZE), 3)
    )
    assert not result.aligned_overall
    assert not result.aligned.any()


def test_a_change_explained_by_variance_and_gradient_is_not_accused() -> None:
    """Texture lies where the network looks: other images' maps are exceeded, the control is not."""
    evidence = blobs(COUNT, 1)
    clean = photographs(evidence, 2, texture=0.05 + evidence)
    model = RedEvidence().eval()
    first_order = variance_gradient(clean, torch.ones_like(clean)).float()
    result = ssim_alignment(model, changed(clean, first_order / first_order.amax((1, 2, 3), keepdim=True), 3))
    assert result.runs["other images"].p < 0.01
    assert result.runs["other images"].value > 1.25 * result.runs["other images"].null
    assert "variance_gradient" not in result.exceeded
    assert not result.aligned_overall
    assert not result.aligned.any()
    assert "it does not clearly exceed local variance x gradient energy" in result.sentences[0]


def test_a_change_explained_by_pgd_of_equal_ssim_is_not_accused() -> None:
    """Texture lies elsewhere, so that the change of any PGD attack is seen where the network looks."""
    evidence = blobs(COUNT, 1)
    clean = photographs(evidence, 2, texture=3 * (1 - evidence) ** 4 + 0.02)
    model = RedEvidence().eval()
    result = attacks.pgd(model, clean, torch.zeros(COUNT).long(), budget=Linf(4 / 255), steps=20)
    outcome = ssim_alignment(model, result)
    assert {"other images", "variance_gradient"} <= set(outcome.exceeded)
    assert "pgd" not in outcome.exceeded
    assert not outcome.aligned_overall
    assert not outcome.aligned.any()


def random_network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("budget", [SSIM(0.005), L2(0.5), Linf(4 / 255)], ids=str)
@pytest.mark.parametrize("seed", [0, 2])
def test_a_network_with_random_weights_is_not_accused(seed: int, budget: Budget) -> None:
    """Of seed 0 the SSIM attack exceeds other images' maps and both controls, p < .001, by less than the floor."""
    model = random_network(seed)
    clean = photographs(blobs(COUNT, 1), 2, texture=0.1 + blobs(COUNT, 5))
    result = attacks.pgd(model, clean, model(clean).argmax(1), budget=budget, steps=5)
    outcome = ssim_alignment(model, result)
    assert outcome.runs["other images"].images > 10
    assert not outcome.aligned_overall
    assert not outcome.aligned.any()


def test_permuted_weights_are_an_optional_control() -> None:
    clean = photographs(blobs(COUNT, 1), 2, texture=0.1 + blobs(COUNT, 5))
    model = random_network(0)
    result = ssim_alignment(model, changed(clean, blobs(COUNT, 1), 3), random_weights=True)
    assert result.controls == ["variance_gradient", "pgd", "random_weights"]
    assert result.scores["ssim_spearman_random_weights"].notna().any()
    assert len(result.sentences) >= 5
    before = [parameter.clone() for parameter in model.parameters()]
    shuffled = with_shuffled_weights(as_classifier(model), 0)
    for old, own, new in zip(before, model.parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(old, own)
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


@pytest.mark.parametrize(("count", "verb"), [(0, "show"), (1, "shows"), (2, "show")])
def test_images_that_are_aligned_by_themselves_are_counted(count: int, verb: str) -> None:
    own = torch.arange(20) < count
    columns = {"": torch.where(own, 3.0, 1.0), "_null": torch.ones(20), "_p": torch.where(own, 0.01, 0.5)}
    scores = pd.DataFrame({f"ssim_concentration{end}": values for end, values in columns.items()})
    scores["ssim_concentration_q"] = scores["ssim_concentration_p"]
    maps = torch.zeros(20, 1, 2, 2)
    result = SsimAlignment(maps, maps, scores, {"other images": RunTest(20, 1.1, 1.0, 0.4)})
    assert f"Tested individually, {count} of 20 images {verb} a visible change that" in result.sentences[2]


# ---------------------------------------------------------------- what is not defined


def test_a_local_ssim_budget_gives_no_evidence() -> None:
    evidence = blobs(20, 1)
    clean, model = photographs(evidence, 2), RedEvidence().eval()
    result = attacks.pgd(model, clean, torch.zeros(20).long(), budget=SSIM(0.01, mode="local"), steps=3)
    outcome = ssim_alignment(model, result)
    assert outcome.scores.isna().all(axis=None)
    assert not outcome.aligned_overall
    assert outcome.sentences[0] == "No image can be compared."
    assert outcome.sentences[1] == (
        "20 images are left out: the attack's budget bounds SSIM in every patch, and the attack spends it in every "
        "patch."
    )


def test_an_activation_without_positive_values_has_no_region() -> None:
    evidence = blobs(4, 1)
    model = RedEvidence().eval()
    model.slope = -8.0
    pairs = changed(photographs(evidence, 2), evidence, 3)
    result = ssim_alignment(model, pairs)
    assert result.scores[list(STATISTICS)].isna().all(axis=None)
    assert "nowhere positive, so no region matters most" in result.why_not[0]
    regional = overlap(model, pairs)
    assert not bool(regional.roi.any())
    assert regional.scores[["effect_in_roi", "jaccard", "spearman", "moran_i"]].isna().all(axis=None)
    explanation = explain(model, pairs, analyses=["overlap"])
    assert "shows no evidence for class 0, so there is no region of importance" in explanation.verdict(0)
    with pytest.warns(ModelWarning, match="4 of 4 images is nowhere positive"):
        region = regions.cam(model, pairs.clean, pairs.labels)
    assert int(region[0].sum()) == round(0.3 * SIZE * SIZE)


def test_an_attack_confined_to_a_region_has_no_statistic() -> None:
    evidence = blobs(COUNT, 1)
    pairs = changed(photographs(evidence, 2), evidence, 3)
    inside = torch.where(evidence > 0.3, pairs.adversarial, pairs.clean)
    result = ssim_alignment(RedEvidence().eval(), Pairs(pairs.clean, inside, pairs.labels, pairs.targets))
    assert result.scores.isna().all(axis=None)
    assert result.runs["other images"].images == 0
    assert "40 images are left out: the attack changed only a part of the image." in result.sentences


def test_a_copy_counts_once_in_the_test_of_a_run() -> None:
    evidence = blobs(10, 1)
    pairs = changed(photographs(evidence, 2), evidence, 3)
    twice = [
        torch.cat([tensor, tensor])
        for tensor in (pairs.clean, pairs.adversarial, pairs.labels, pairs.targets)
    ]
    result = ssim_alignment(RedEvidence().eval(), Pairs(*twice))
    assert result.scores["ssim_concentration_p"].isna().all()
    assert result.runs["other images"].images == 10
    assert {test.images for test in result.runs.values()} == {10}


# ---------------------------------------------------------------- controls


def test_the_pgd_control_has_the_ssim_of_the_attack(any_model: Made) -> None:
    model, images = any_model
    classifier = as_classifier(model)
    labels = model(images).argmax(1)
    generator = torch.Generator().manual_seed(0)
    for strength in (0.01, 0.2):
        noisy = (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        pairs = Pairs(images, noisy, labels, labels)
        targets, loss = competing_classes(classifier, pairs), (1 - ssim_map(images, noisy)).mean((1, 2, 3))
        gradient = margin_gradient(classifier, images, labels, targets)
        result = pgd_of_equal_ssim(classifier, images, labels, targets, gradient, loss=loss, seed=0)
        reached = result.mean((1, 2, 3))
        defined = reached.isfinite()
        assert bool(defined.any()) or strength > 0.1
        torch.testing.assert_close(reached[defined], loss[defined], rtol=0.02, atol=0)


def test_variance_gradient_equals_its_definition_and_a_small_steepest_step() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 21, 21, generator=generator) * 0.5 + 0.25
    gradient = torch.randn(1, 1, 21, 21, generator=generator)
    result = variance_gradient(image, gradient)
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    pixels, slopes = (tensor[0, 0, 5:16, 5:16].double().numpy() for tensor in (image, gradient))
    variance = (window * pixels**2).sum() - (window * pixels).sum() ** 2
    assert float(result[0, 0, 10, 10]) == pytest.approx((2 * variance + 0.03**2) * (window * slopes**2).sum())
    # A small change of random signs, in proportion to the bound of its window, is seen as the first order has it.
    clean = photographs(blobs(1, 1), 2, texture=0.05 + blobs(1, 4))
    bound = variance_gradient(clean, torch.ones_like(clean)).float()
    pairs = changed(clean, 0 * clean[:, :1], 3)
    seen = 1 - ssim_map(clean, (clean + 5 * (pairs.adversarial - clean) * bound).clamp(0, 1))
    assert spearmanr(seen.flatten().numpy(), bound.flatten().numpy())[0] > 0.85


# ---------------------------------------------------------------- the house


@pytest.mark.filterwarnings("ignore::weakspot._checks.ModelWarning")
def test_ssim_alignment_leaves_networks_unchanged_and_parts_equal_the_whole(any_model: Made) -> None:
    model, images = any_model
    labels = model(images).argmax(1)
    result = attacks.pgd(model, images, labels, budget=Linf(0.05), steps=3)
    with untouched(model, images, result.clean, result.adversarial):
        whole = ssim_alignment(model, result, compare=False)
    assert not whole.runs
    assert "_p" not in "".join(str(name)[-2:] for name in whole.scores)
    for number in range(len(images)):
        one = slice(number, number + 1)
        alone = ssim_alignment(
            copy.deepcopy(model),
            Pairs(images[one], result.adversarial[one], labels[one], result.targets[one]),
            compare=False,
        )
        for name in map(str, whole.scores):
            # The steps of PGD are signs of gradients, which rounding may turn.
            tolerance = 0.03 if name.endswith("_pgd") else 1e-3
            np.testing.assert_allclose(
                alone.scores[name], whole.scores[name][one], rtol=tolerance, atol=tolerance
            )


def test_the_report_has_a_meaning_for_each_score_and_the_finding() -> None:
    evidence = blobs(10, 1)
    pairs = changed(photographs(evidence, 2), evidence, 3)
    result = explain(RedEvidence().eval(), pairs, analyses=["ssim"])
    plain = [
        name for name in map(str, result.analyses["ssim"].scores) if not name.endswith(("_null", "_p", "_q"))
    ]
    assert list(result.meanings) == plain
    assert "The visible change lies where the network looks" in result.pictures["ssim"].meaning
    few = explain(
        RedEvidence().eval(), changed(photographs(evidence[:2], 2), evidence[:2], 3), analyses=["ssim"]
    )
    assert "At least 10 images are needed" in few.pictures["ssim"].meaning
    assert "lies where the network looks, on average" not in few.pictures["ssim"].meaning


def test_repr_is_short_and_errors_name_the_argument() -> None:
    evidence = blobs(2, 1)
    pairs = changed(photographs(evidence, 2), evidence, 3)
    model = RedEvidence().eval()
    assert len(repr(ssim_alignment(model, pairs))) < 300
    with pytest.raises(ValueError, match=r"reference must be images \(R, 3, 32, 32\), got \(2, 1, 32, 32\)"):
        ssim_alignment(model, pairs, reference=pairs.clean[:, :1])
    with pytest.raises(ValueError, match="pairs"):
        ssim_alignment(model, cast("Pairs", pairs.clean))
