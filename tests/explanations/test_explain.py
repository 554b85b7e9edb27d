"""Explain: base scores by brute force, analyses by entry point, and what a badly behaved one may not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import weakspot
from tests.networks import NETWORKS, LinearNetwork, Made, untouched
from weakspot._checks import ModelWarning
from weakspot.attacks import pgd, pixel_sweep
from weakspot.attribution import cam, class_activation
from weakspot.budgets import L2, Linf
from weakspot.classifier import Classifier
from weakspot.edits import engine
from weakspot.explanations import Analysis, Explanation, Picture, explain, overlap
from weakspot.explanations.analysis import ON_REQUEST, ORDER, available_analyses, usual_analyses
from weakspot.pairs import AttackResult, Pairs
from weakspot.similarity import ssim_map


def attacked(model: nn.Module, images: Tensor) -> AttackResult:
    with torch.no_grad():
        labels = model(images).argmax(1)
    return pgd(model, images, labels, budget=L2(1.5), steps=5)


@dataclass(frozen=True)
class Entry:
    """What importlib.metadata gives for an installed entry point."""

    name: str
    function: Callable[..., Any]

    def load(self) -> Callable[..., Any]:
        return self.function


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Register functions as analyses, beside those that are installed."""

    def installed(**functions: Callable[..., Any]) -> None:
        def entry_points(*, group: str, name: str | None = None) -> Sequence[Any]:
            own = [entry for entry in metadata.entry_points(group=group) if name in {None, entry.name}]
            third = [Entry(key, function) for key, function in functions.items() if name in {None, key}]
            return [*own, *third]

        monkeypatch.setattr("weakspot.explanations.analysis.entry_points", entry_points)

    return installed


def returning(
    scores: dict[str, Any], maps: dict[str, Tensor] | None = None, **extra: Any
) -> Callable[..., Analysis]:
    def analyze(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
        return Analysis(pd.DataFrame(scores), maps or {}, **extra)

    return analyze


@pytest.mark.parametrize("from_attack", [True, False])
def test_base_scores_equal_the_logits_of_the_model(any_model: Made, from_attack: bool) -> None:
    model, images = any_model
    result = attacked(model, images)
    pairs = result if from_attack else Pairs.of(model, result.clean, result.adversarial, result.labels)
    outcome = explain(model, pairs, analyses=[])
    assert outcome.scores["image"].tolist() == ["image 0", "image 1", "image 2"]
    for index, row in outcome.scores.iterrows():
        assert isinstance(index, int)
        with torch.no_grad():
            clean, adversarial = (
                model(batch[index : index + 1])[0] for batch in (images, result.adversarial)
            )
        label, adversarial_class = int(pairs.labels[index]), int(adversarial.argmax())
        others = [k for k in range(len(clean)) if k != label]
        target = (
            adversarial_class
            if adversarial_class != label
            else max(others, key=lambda k: float(adversarial[k]))
        )
        names = [f"class {k}" for k in (label, target, adversarial_class, int(clean.argmax()))]
        assert row[["label", "target", "adversarial_class", "read_clean_as"]].tolist() == names
        assert outcome.class_names[index] == (names[0], names[1])
        before, after = (torch.exp(z) / torch.exp(z).sum() for z in (clean.double(), adversarial.double()))
        change = (result.adversarial[index] - images[index]).double()
        expected = {
            "success": adversarial_class != label,
            "label_clean": before[label],
            "label_adversarial": after[label],
            "target_clean": before[target],
            "target_adversarial": after[target],
            "adversarial_class_adversarial": after[adversarial_class],
            "margin_clean": clean[label] - max(clean[k] for k in others),
            "margin_adversarial": adversarial[label] - max(adversarial[k] for k in others),
            "linf": max(change.abs().flatten().tolist()),
            "l2": sum(value**2 for value in change.flatten().tolist()) ** 0.5,
        }
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name


def test_success_after_rounding_to_8_bits_is_reported_for_any_pairs() -> None:
    weight = torch.full((1, 4, 4), 1.0)
    model = Classifier.wrap(LinearNetwork(weight).eval())
    last = nn.Linear(2, 2)
    shifted = nn.Sequential(model, last).eval()
    with torch.no_grad():  # the border lies a quarter of a level below the images
        last.weight.copy_(torch.eye(2))
        last.bias.copy_(torch.tensor([-1.0, 1.0]) * 16 * 99.75 / 255)
    clean, labels = torch.full((2, 1, 4, 4), 100 / 255), torch.tensor([0, 0])
    moved = clean - torch.tensor([0.4, 1.0]).view(2, 1, 1, 1) / 255
    pairs = Pairs.of(shifted, clean, moved, labels)
    made = AttackResult(clean, moved, labels, pairs.targets, torch.tensor([True, True]), labels, labels)
    for one in (pairs, made):  # the latter says nothing of its files
        explanation = explain(shifted, one, analyses=[])
        assert explanation.scores["success"].tolist() == [True, True]
        assert explanation.scores["success_8bit"].tolist() == [False, True]
        assert explanation.verdict(0).startswith(
            "The attack fools the network only before rounding to 8 bits: it changed"
        )
        assert explanation.verdict(1).startswith("The attack changed the classification from")


def test_success_of_an_attack_is_its_own_verdict() -> None:
    model, images = NETWORKS["linear"]()
    labels = model(images).argmax(1)
    targets = model(images).argsort(1)[:, 0]
    missed = pgd(model, images, labels, targets=targets, budget=Linf(1e-4))
    assert missed.success.tolist() == [False] * 3
    assert explain(model, missed, analyses=[]).scores["success"].tolist() == [False] * 3
    reached = pgd(model, images, labels, targets=targets, budget=Linf(0.6))
    result = explain(model, reached, analyses=[])
    assert result.scores["success"].tolist() == reached.success.tolist() == [True] * 3
    assert result.scores["target"].tolist() == [f"class {int(k)}" for k in targets]


def test_images_and_classes_have_their_names() -> None:
    model, images = NETWORKS["linear"]()
    named = Classifier.wrap(model, class_names=["cat", "dog", "owl"])
    pairs = attacked(named, images)
    result = explain(named, pairs, analyses=[], names=["a.png", "b.png", "c.png"], made={"budget": "1.5 L2"})
    assert result.scores["image"].tolist() == ["a.png", "b.png", "c.png"]
    assert result.scores["label"].tolist() == [["cat", "dog", "owl"][int(k)] for k in pairs.labels]
    assert result.scores["adversarial_class"].tolist() == [
        ["cat", "dog", "owl"][int(k)] for k in pairs.targets
    ]
    assert dict(result.made) == {"budget": "1.5 L2"}
    assert result.model == "Sequential"
    assert len(result) == 3


def test_every_analysis_adds_its_scores_and_maps_on_the_cpu(any_model: Made) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    with untouched(model, pairs.clean, pairs.adversarial, pairs.labels):
        result = explain(model, pairs)
    assert list(result.analyses) == usual_analyses()
    assert set(available_analyses()) == {*usual_analyses(), *ON_REQUEST}
    assert all(f'"{name}"' in (explain.__doc__ or "") for name in ON_REQUEST)
    for maps in result.maps.values():
        assert maps.device.type == "cpu"
        assert not maps.requires_grad
        assert maps.shape == (3, 1, *images.shape[2:])
    assert set(result.pictures) == set(result.maps)
    torch.testing.assert_close(result.maps["ssim"], 1 - ssim_map(pairs.clean, pairs.adversarial))
    alone = overlap(model, pairs)
    pd.testing.assert_frame_equal(result.scores[list(alone.scores)], alone.scores, rtol=1e-3)
    torch.testing.assert_close(result.maps["vulnerability"], alone.vulnerability, rtol=1e-3, atol=1e-6)
    partition = alone.essential * 1 + alone.contested * 2 + alone.neutralizable * 3
    assert torch.equal(result.maps["partition"], partition)
    assert set(result.meanings) <= set(result.scores)


@pytest.fixture(scope="module")
def together() -> tuple[nn.Module, AttackResult, Explanation]:
    """A network, pairs of it, and what all analyses find."""
    model, images = NETWORKS["pooling"]()
    pairs = attacked(model, images)
    return model, pairs, explain(model, pairs)


@pytest.mark.parametrize("name", usual_analyses())
def test_an_analysis_finds_alone_what_it_finds_among_others(
    name: str, together: tuple[nn.Module, AttackResult, Explanation]
) -> None:
    """What analyses share in one explanation changes none of them, nor the model, its hooks or generators."""
    model, pairs, all_found = together
    with untouched(model, pairs.clean, pairs.adversarial, pairs.labels):
        alone = explain(model, pairs, analyses=[name])
    for maps in alone.maps:
        torch.testing.assert_close(alone.maps[maps], all_found.maps[maps], rtol=1e-5, atol=1e-6)
    pd.testing.assert_frame_equal(alone.scores, all_found.scores[list(alone.scores)], rtol=1e-4)


def test_layers_alignments_and_recordings_are_found_once(
    pooling: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = pooling
    calls = {"find_layer": 0, "effective_grid": 0, "_prepare": 0}

    def counting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            calls[name] += 1
            return own(*given)

        return counted

    for name, module in (("find_layer", cam), ("effective_grid", cam), ("_prepare", engine)):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    pairs = attacked(model, images)
    explain(model, pairs)
    assert calls == {"find_layer": 1, "effective_grid": 1, "_prepare": 1}
    explain(model, pairs)  # nothing is kept beyond a call: the weights may have changed
    assert calls == {"find_layer": 2, "effective_grid": 2, "_prepare": 2}


def test_an_analysis_that_adds_a_hook_sees_the_hooked_network(pooling: Made, install: Install) -> None:
    """A network with a hook that changes it is another network: nothing that was found before counts."""
    model, images = pooling
    pairs = attacked(model, images)
    conv = next(one for one in model.modules() if isinstance(one, nn.Conv2d))

    def with_and_without_hook(model: nn.Module) -> list[Tensor]:
        before = class_activation(model, pairs.clean, pairs.labels)
        handle = conv.register_forward_hook(lambda *given: given[2].tanh())
        after = class_activation(model, pairs.clean, pairs.labels)
        handle.remove()
        return [before, after]

    found: list[Tensor] = []

    def analyze(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
        found.extend(with_and_without_hook(model))
        return Analysis(pd.DataFrame(index=range(len(pairs))), {})

    install(hooking=analyze)
    explain(model, pairs, analyses=["cam", "hooking"])
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found, with_and_without_hook(model))


def test_evidence_is_shown_for_both_classes_in_both_images(any_model: Made) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    result = explain(model, pairs, analyses=["cam"])
    with torch.no_grad():
        second = model(pairs.adversarial).scatter(1, pairs.labels[:, None], -1e9).argmax(1)
    rivals = torch.where(pairs.targets == pairs.labels, second, pairs.targets)
    for role, classes in (("label", pairs.labels), ("target", rivals)):
        for when, batch in (("clean", pairs.clean), ("adversarial", pairs.adversarial)):
            expected = class_activation(model, batch, classes, alignment="effective")
            torch.testing.assert_close(result.maps[f"cam_{role}_{when}"], expected, rtol=1e-4, atol=1e-5)
    before, after = (result.maps[f"cam_label_{when}"].flatten(1).numpy() for when in ("clean", "adversarial"))
    expected_kept = [np.corrcoef(a, b)[0, 1] for a, b in zip(before, after, strict=True)]
    np.testing.assert_allclose(result.scores["evidence_kept"], expected_kept, atol=1e-4)


@pytest.mark.parametrize("name", ["pooling", "flat, gray, two classes, not square"])
def test_randomized_weights_change_every_map_that_comes_from_the_model(name: str) -> None:
    model, images = NETWORKS[name]()
    pairs = attacked(model, images)
    before = explain(model, pairs).maps
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    after = explain(model, pairs).maps
    assert torch.equal(before["ssim"], after["ssim"])  # the eye's map is no claim about the model
    for key in ("importance", "vulnerability", "cam_label_clean", "cam_target_adversarial"):
        maps = [each[key].flatten(1).numpy() for each in (before, after)]
        # Importance without any positive value is zero everywhere.
        alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(*maps, strict=True) if a.any() and b.any()]
        assert alike, key
        assert abs(np.mean(alike)) < 0.6, key


def test_analyses_run_in_a_fixed_order(pooling: Made) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    names = available_analyses()
    assert names == [*ORDER, *sorted(set(names) - set(ORDER))]
    assert list(explain(model, pairs, analyses=["overlap", "ssim"]).analyses) == ["ssim", "overlap"]


def test_progress_rises_to_one(pooling: Made) -> None:
    model, images = pooling
    message: list[float] = []
    explain(model, attacked(model, images), progress=message.append)
    assert message == sorted(message)
    assert message[-1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"analyses": ["overlp"]}, r"analysis must .* got 'overlp' \(did you mean 'overlap'\?"),
        ({"analyses": ["nothing like it"]}, r"analysis must be one of weak_spots, cam, ssim"),
        ({"names": ["one", "two"]}, "names must have one entry for each of 3 pairs, got 2"),
        (
            {"analyses": ["cam"], "reference": torch.rand(2, 3, 20, 20)},
            r"analyses must include one that compares images if there is a reference \(ssim, overlap, promotion\), got",
        ),
        (
            {"reference": torch.rand(2, 3, 9, 9)},
            r"reference must be images \(R, 3, 20, 20\), got \(2, 3, 9, 9\)",
        ),
        ({"pairs": (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))}, "pairs must be Pairs, got tuple"),
        ({"pairs": None}, "pairs must be Pairs, got NoneType"),
        ({"model": "resnet18"}, "model must be a torch.nn.Module that returns logits, got str"),
    ],
)
def test_invalid_arguments_are_errors_that_name_them(
    pooling: Made, options: dict[str, Any], message: str
) -> None:
    model, images = pooling
    arguments = {"model": model, "pairs": attacked(model, images), **options}
    with untouched(model), pytest.raises(ValueError, match=message):
        explain(**arguments)


@pytest.mark.parametrize("name", ["labels", "targets"])
def test_unknown_classes_are_errors_that_name_the_argument(pooling: Made, name: str) -> None:
    model, images = pooling
    classes: dict[str, Any] = {"labels": torch.tensor([0, 1, 2]), "targets": torch.tensor([1, 2, 3])}
    classes[name] = torch.tensor([0, 1, 9])
    with pytest.raises(ValueError, match=f"{name} must be classes .* got 9"):
        explain(model, Pairs(images, images, **classes))


def test_an_installed_analysis_runs_like_a_built_in_one(pooling: Made, install: Install) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    given: list[tuple[bool, int, int]] = []

    def brightness(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
        given.append((model.training, len(pairs), seed))
        maps = pairs.adversarial.mean(1, keepdim=True).requires_grad_() * 1
        return Analysis(
            pd.DataFrame({"brightness": pairs.adversarial.mean((1, 2, 3)).numpy()}, index=[7, 8, 9]),
            {"bright": maps},
            meanings={"brightness": "How bright it is."},
            pictures={"bright": Picture("Brightness", fixed=(0, 1))},
        )

    install(brightness=brightness)
    names = available_analyses()
    assert names == [*ORDER, *sorted(set(names) - set(ORDER))]
    assert "brightness" in names
    result = explain(model, pairs, analyses=["ssim", "brightness"], seed=5)
    assert given == [(False, 3, 5)]
    np.testing.assert_allclose(result.scores["brightness"], pairs.adversarial.mean((1, 2, 3)).numpy())
    assert len(result.scores) == 3
    assert not result.maps["bright"].requires_grad
    torch.testing.assert_close(result.maps["bright"], pairs.adversarial.mean(1, keepdim=True))
    assert result.meanings["brightness"] == "How bright it is."
    assert result.pictures["bright"].title == "Brightness"
    assert "brightness" in explain(model, pairs).scores


def test_only_an_analysis_with_the_parameters_receives_other_images(pooling: Made, install: Install) -> None:
    model, images = pooling
    others = torch.rand(20, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {}

    def older(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
        given["older"] = {}
        return Analysis(pd.DataFrame(index=range(len(pairs))), {})

    def greedy(model: nn.Module, pairs: Pairs, **options: Any) -> Analysis:
        given["greedy"] = options
        return Analysis(pd.DataFrame(index=range(len(pairs))), {})

    def newer(
        model: nn.Module, pairs: Pairs, *, seed: int = 0, compare: bool, reference: Tensor | None = None
    ) -> Analysis:
        given["newer"] = {"compare": compare, "reference": reference}
        return Analysis(pd.DataFrame(index=range(len(pairs))), {})

    install(older=older, greedy=greedy, newer=newer)
    explain(model, attacked(model, images), analyses=["older", "greedy", "newer"], reference=others)
    assert given["older"] == {}
    assert given["greedy"] == {"seed": 0}
    assert given["newer"]["compare"]
    assert torch.equal(given["newer"]["reference"], others)
    explain(model, attacked(model, images), analyses=["newer"], compare=False)
    assert given["newer"] == {"compare": False, "reference": None}


def test_references_give_p_values(pooling: Made) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    others = torch.rand(20, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    names = ["overlap", "promotion"]
    with untouched(model, others):
        result = explain(model, pairs, analyses=names, reference=others).scores
    tested = [name for name in result if str(name).endswith("_p") and "shift" not in str(name)]
    assert {"relation_p", "spearman_p", "interpretability_label_p", "interpretability_target_p"} <= set(
        tested
    )
    assert result[tested].notna().all(axis=None)
    bare = explain(model, pairs, analyses=names).scores
    assert list(bare) == list(result)
    assert bare[tested].isna().all(axis=None)
    alone = explain(model, pairs, analyses=names, compare=False)
    assert not alone.scores.filter(regex="(?<!_shift)(_null|_p|_q)$|^relation").size
    assert "p =" not in alone.verdict(0)


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (Analysis(pd.DataFrame({"x": [1.0, 2.0]}), {}), "2 rows"),
        (Analysis(pd.DataFrame({"x": [1.0] * 4}), {}), "4 rows"),
        (pd.DataFrame({"x": [1.0] * 3}), "DataFrame"),
        (None, "NoneType"),
    ],
)
def test_an_analysis_must_return_one_row_for_each_pair(
    pooling: Made, install: Install, result: Any, what: str
) -> None:
    model, images = pooling
    install(added=lambda model, pairs, *, seed: result)
    with untouched(model), pytest.raises(ValueError, match=f"'added' must return an Analysis.* got {what}"):
        explain(model, attacked(model, images), analyses=["added"])


def test_a_duplicate_column_gets_a_prefix(pooling: Made, install: Install) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    install(
        added=returning({"l2": [7.0] * 3, "ssim_windowed": [8.0] * 3, "fresh": [9.0] * 3}),
        other=returning({"fresh": [10.0] * 3}),
    )
    plain = explain(model, pairs, analyses=["ssim"]).scores
    result = explain(model, pairs, analyses=["ssim", "added", "other"]).scores
    pd.testing.assert_frame_equal(result[list(plain)], plain)
    added = {
        "added_l2": [7.0] * 3,
        "added_ssim_windowed": [8.0] * 3,
        "fresh": [9.0] * 3,
        "other_fresh": [10.0] * 3,
    }
    assert {name: result[name].tolist() for name in result if name not in plain} == added


def test_a_duplicate_map_gets_a_prefix(pooling: Made, install: Install) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    install(added=returning({"x": [1.0] * 3}, {"ssim": torch.full((3, 1, 20, 20), 7.0)}))
    result = explain(model, pairs, analyses=["ssim", "added"])
    torch.testing.assert_close(result.maps["ssim"], 1 - ssim_map(pairs.clean, pairs.adversarial))
    assert torch.equal(result.maps["added_ssim"], torch.full((3, 1, 20, 20), 7.0))
    assert set(result.pictures) == set(result.maps)
    assert result.pictures["ssim"].title == "Visible change (1 - SSIM)"


def test_the_meaning_of_a_duplicate_column_has_the_new_name(pooling: Made, install: Install) -> None:
    model, images = pooling
    install(added=returning({"ssim_windowed": [8.0] * 3}, meanings={"ssim_windowed": "Something else."}))
    result = explain(model, attacked(model, images), analyses=["ssim", "added"])
    assert result.meanings["ssim_windowed"].startswith("Mean structural similarity")
    assert result.meanings["added_ssim_windowed"] == "Something else."


@pytest.mark.filterwarnings("ignore:.*train mode")
@pytest.mark.parametrize("training", [False, True])
def test_an_exception_in_an_analysis_leaves_the_model_unchanged(
    any_model: Made, install: Install, training: bool
) -> None:
    model, images = any_model
    pairs = attacked(model, images)

    def reckless(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
        torch.rand(3)
        torch.set_grad_enabled(False)
        for module in model.modules():
            module.training = True
        raise RuntimeError("out of memory, say")

    install(reckless=reckless)
    model.train(training)
    with (
        untouched(model, pairs.clean, pairs.adversarial),
        pytest.raises(RuntimeError, match="out of memory, say"),
    ):
        explain(model, pairs, analyses=["reckless"])


def test_a_model_in_train_mode_is_explained_in_eval_mode(pooling: Made) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    expected = explain(model, pairs).scores
    model.train()
    with untouched(model), pytest.warns(ModelWarning, match="train mode"):
        result = explain(model, pairs).scores
    pd.testing.assert_frame_equal(result, expected)


def test_results_print_as_a_few_lines_without_tensors(pooling: Made) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    one_pixel = pixel_sweep(model, images, pairs.labels).pairs(images, pairs.labels)
    explanation = explain(model, pairs)
    results = [
        overlap(model, pairs),
        weakspot.promotion_suppression(model, pairs),
        weakspot.propagation(model, pairs),
        weakspot.propagation_study(model, pairs),
        weakspot.restoration(model, pairs),
        weakspot.ssim_alignment(model, pairs),
        weakspot.locality(model, one_pixel),
        explanation,
        *explanation.analyses.values(),
    ]
    for result in results:
        text = repr(result)
        assert type(result).__name__ in text
        assert "tensor(" not in text
        assert len(text.splitlines()) <= 10, text
        assert len(text) < 1500, text


def test_images_of_an_explanation_are_reached_by_name_and_by_number(pooling: Made) -> None:
    model, images = pooling
    labels = Classifier.wrap(model)(images).argmax(1)
    names = ["cat", "coffee", "coffee"]
    explanation = explain(model, pgd(model, images, labels, steps=1), analyses=[], names=names)
    assert explanation.pairs.names == tuple(names)
    assert explanation.verdict("cat") == explanation.verdict(0) == explanation.verdict(-3)
    for ask in (explanation.verdict, explanation.figure):
        with pytest.raises(IndexError, match=r"index must be from -3 to 2, got 9"):
            ask(9)
        with pytest.raises(ValueError, match="name must be one of cat, coffee, coffee, got 'caat'"):
            ask("caat")
        with pytest.raises(
            ValueError, match=r"name must be that of one pair, got 'coffee' of pairs \[1, 2\]"
        ):
            ask("coffee")
    # Names of the pairs are those of the explanation, and a part of it can be explained again.
    again = explain(model, explanation.pairs[1:], analyses=[])
    assert again.scores["image"].tolist() == ["coffee", "coffee"]


def test_classes_made_under_inference_mode_can_be_explained(pooling: Made) -> None:
    model, images = pooling
    with torch.inference_mode():
        labels = model(images).argmax(1)
    pairs = pgd(model, images, labels.clone(), budget=Linf(0.1), steps=3)
    expected = explain(model, pairs)
    for made in (Pairs.of(model, images, pairs.adversarial, labels), replace(pairs, labels=labels)):
        pd.testing.assert_frame_equal(
            explain(model, made).scores[["margin_clean"]], expected.scores[["margin_clean"]]
        )
