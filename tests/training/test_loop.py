"""A training obeys its recipe, leaves everything else as it was, and stops if robustness is lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import FlatNetwork, PoolingNetwork, TokenNetwork, untouched
from tests.training.tiny import QUICK, fresh, halves, quick_train, weights
from weakspot import Linf, attacks
from weakspot._checks import ModelWarning
from weakspot.classifier import Classifier
from weakspot.datasets import from_tensors
from weakspot.training import RECIPES, loop
from weakspot.training.config import ResolvedConfig
from weakspot.training.data import Backgrounds, find_backgrounds
from weakspot.training.fit import make_fabric
from weakspot.training.robust_accuracy import HeldOut, held_out_images, split

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore:.*lightning.*")]
MASKED = {name for name, recipe in RECIPES.items() if recipe.region != "everywhere"}


def test_attacking_no_images_is_standard_training_bit_for_bit() -> None:
    data = halves()
    standard = weights(quick_train(fresh(), data, recipe="standard", epochs=1))
    for recipe in RECIPES:
        nothing = quick_train(fresh(), data, recipe=recipe, attacked_fraction=0.0, epochs=1)
        assert torch.equal(standard, weights(nothing)), recipe
        some = quick_train(fresh(), data, recipe=recipe, attacked_fraction=0.5, epochs=1)
        assert torch.equal(standard, weights(some)) == (recipe == "standard"), recipe


@pytest.mark.parametrize("build", [FlatNetwork, PoolingNetwork, TokenNetwork], ids=lambda b: b.__name__)
def test_network_data_and_generators_are_unchanged_and_a_seed_gives_one_result(
    build: Callable[[], nn.Module],
) -> None:
    channels = 1 if build is FlatNetwork else 3
    images, labels = halves(60, channels, (16, 24) if build is TokenNetwork else (16, 12))
    model = fresh(build)
    model.train()
    trained = []
    for seed, draws in ((0, 0), (0, 5), (1, 0)):
        torch.rand(draws)  # numbers drawn before a training do not matter
        with untouched(model, images, labels):
            trained.append(
                quick_train(model, (images, labels), budget=Linf(0.1), seed=seed, held_out=0, epochs=1)
            )
    assert torch.equal(weights(trained[0]), weights(trained[1]))
    assert not torch.equal(weights(trained[0]), weights(trained[2]))
    assert type(trained[0]) is type(model)
    assert trained[0].training


def test_updates_are_those_of_sgd_with_decay_along_the_cosine() -> None:
    images, labels = halves(60)
    trained = quick_train(
        fresh(), (images, labels), recipe="standard", batch_size=60, held_out=0, weight_decay=0.3
    )
    twin = fresh()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)
    for rate in (0.05, 0.025):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(trained.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["localized", "foreground", "random_mask"])
def test_each_image_meets_its_own_mask(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through split, shuffle, crop and flip: the adversary gets the mask of the image that it gets."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(80, 1, 16, 24)
    # Ink in the middle, which crops never cut.
    images[..., 5:11, 7:17] = (torch.rand(80, 1, 6, 10, generator=generator) > 0.7).float()
    seen: list[tuple[Tensor, Tensor]] = []

    def record(network: Any, images: Tensor, *rest: Any, region: Tensor) -> Tensor:
        seen.append((images.clone(), region.clone()))
        return images

    monkeypatch.setattr(loop, "perturbed", record)
    model, data = fresh(lambda: FlatNetwork((16, 24))), (images, torch.arange(80) % 2)
    quick_train(model, data, recipe=recipe, augment="crop,flip", held_out=8)
    assert len(seen) == 2 * 3
    for shown, region in seen:
        background = F.max_pool2d((shown > 0.1).float(), 3, 1, 1) == 0
        if recipe == "random_mask":
            assert torch.equal(region.sum((2, 3)), background.sum((2, 3)))
            assert not torch.equal(region, background)
        else:
            assert torch.equal(region, background if recipe == "localized" else ~background)
    assert not torch.equal(seen[0][1], seen[3][1])


def test_held_out_images_are_never_trained_on_and_are_attacked_in_the_recipe_s_region() -> None:
    rows, held = split(100, 30)
    assert sorted([*rows.tolist(), *held.tolist()]) == list(range(100))
    assert len(held) == 10, "at most a tenth"
    data = from_tensors(*halves(100))
    backgrounds = find_backgrounds(data)
    masks = backgrounds.masks(held)

    def region(recipe: str) -> Tensor | None:
        needed = backgrounds if recipe in MASKED else None
        images = held_out_images(data, held, needed, ResolvedConfig(recipe=recipe))
        assert images is not None
        assert torch.equal(images.labels, data.labels[held])
        return images.region

    assert region("full") is None
    scattered = region("random_mask")
    assert scattered is not None
    assert torch.equal(scattered.sum((2, 3)), masks.sum((2, 3)))
    torch.testing.assert_close([region("localized"), region("foreground")], [masks, ~masks])
    assert held_out_images(data, held[:0], backgrounds, ResolvedConfig()) is None


class Watched(nn.Module):
    """Records every batch, and in which mode it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.flat = nn.BatchNorm2d(1), nn.Flatten()
        self.head = nn.Linear(16 * 12, 2)
        self.seen: list[tuple[bool, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((self.training, len(images)))
        logits: Tensor = self.head(self.flat(self.norm(images)))
        return logits


def loop_of(model: nn.Module, recipe: str, masks: Tensor, **changes: Any) -> loop.Loop:
    config = ResolvedConfig(
        **{"recipe": recipe, "budget": Linf(0.1), "batch_size": 20, "steps": 3, "step_size": 0.03, **changes}
    )
    bits = np.packbits(masks.flatten(1).numpy(), axis=1)
    backgrounds = Backgrounds(bits, (16, 12)) if recipe in MASKED else None
    with torch.random.fork_rng():
        fabric = make_fabric("cpu", "32-true")
        data = from_tensors(*halves(40))
        return loop.Loop(fabric, Classifier(model), data, config, backgrounds=backgrounds)


@pytest.mark.parametrize("recipe", ["localized", "foreground", "random_mask", "full", "fast"])
def test_the_adversary_costs_its_steps_moves_no_statistics_and_changes_only_its_region(recipe: str) -> None:
    masks = torch.zeros(40, 1, 16, 12, dtype=torch.bool)
    masks[..., :5, :] = True
    model = Watched()
    training = loop_of(model, recipe, masks)
    with torch.random.fork_rng():
        batch = next(training._batches())
        before = {name: tensor.clone() for name, tensor in model.norm.state_dict().items()}
        clean = batch.pixels[:10]
        adversarial = training._attack(batch, clean, training.data.labels[batch.rows[:10]])
    steps = 1 if recipe == "fast" else 3
    assert model.seen == [(False, 10)] * steps
    assert model.training
    assert model.norm.training
    torch.testing.assert_close(model.norm.state_dict(), before, rtol=0, atol=0)
    changed = (adversarial != clean).any(1, keepdim=True)
    allowed = {"localized": masks[:10], "foreground": ~masks[:10]}.get(recipe)
    if allowed is not None:
        assert not bool((changed & ~allowed).any())
        assert float((changed & allowed).float().sum() / allowed.float().sum()) > 0.9
    if recipe == "random_mask":
        area = int(masks[0].sum())
        assert int(changed.flatten(1).sum(1).max()) <= area
        assert int(changed.flatten(1).sum(1).min()) >= 0.9 * area
        assert float((changed & masks[:10]).float().sum() / changed.float().sum()) < 0.6, "scattered"
    if recipe in {"full", "fast"}:
        assert float(changed.float().mean()) > 0.9


def test_trades_is_its_formula_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16 * 12, 2))
    data = halves(40)
    recorded: list[tuple[Tensor, Tensor]] = []
    training = loop_of(model, "trades", torch.zeros(40, 1, 16, 12, dtype=torch.bool), beta=4.0)
    attack = training._attack

    def record(batch: loop.Batch, images: Tensor, labels: Tensor) -> Tensor:
        adversarial = attack(batch, images, labels)
        recorded.append((images, adversarial))
        return adversarial

    training._attack = record  # type: ignore[method-assign]
    with torch.random.fork_rng():
        batch = next(training._batches())
        log_p = model(data[0][batch.rows]).log_softmax(1).detach()
        weight, bias = (tensor.detach().clone() for tensor in model[1].parameters())
        loss = training._step(batch)
    clean, adversarial = recorded[0]
    p = (clean.flatten(1) @ weight.T + bias).softmax(1)
    q = (adversarial.flatten(1) @ weight.T + bias).softmax(1)
    divergence = (p * (p / q).log()).sum() / 20
    cross_entropy = -log_p.gather(1, data[1][batch.rows][:, None]).mean()
    assert loss == pytest.approx(float(cross_entropy + 4.0 * divergence), rel=1e-4)
    assert float(divergence) > 1e-4


# A network that has learned to ignore the background has no gradient there, of which an attack warns.
@pytest.mark.filterwarnings("ignore:.*is zero everywhere")
def test_training_helps_against_a_planted_weakness_and_only_there() -> None:
    """Object and background both show the class: attacks on the background fool a network that uses it."""
    generator = torch.Generator().manual_seed(0)
    count = 400
    labels = torch.arange(count) % 2
    sign = (labels * 2 - 1)[:, None, None, None]
    images = torch.full((count, 1, 16, 12), 0.05)
    images[..., 4:12, 3:9] = 0.5 + sign * 0.06 + 0.3 * torch.randn(count, 1, 8, 6, generator=generator)
    images[..., :3, :] = 0.05 + 0.08 * (sign > 0)
    images = images.clamp(0, 1)
    accuracy = {}
    region = images.new_zeros(count, 1, 16, 12, dtype=torch.bool)
    region[..., :3, :] = region[..., 13:, :] = True
    for recipe in ("standard", "localized"):
        options: dict[str, Any] = {"budget": Linf(0.1), "epochs": 16, "learning_rate": 0.03}
        model = quick_train(fresh(), (images, labels), recipe=recipe, **options).eval()
        attacked = attacks.pgd(model, images, labels, budget=Linf(0.1), region=region).adversarial
        accuracy[recipe] = float((model(attacked).argmax(1) == labels).float().mean())
    assert accuracy["localized"] > 0.8
    assert accuracy["standard"] < 0.5


def planned(robust: list[float], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Make held-out images give these robust accuracies; returns the weights at each evaluation."""
    seen: list[Tensor] = []
    values = iter(robust)

    def evaluate(self: Any, classifier: Classifier, config: ResolvedConfig) -> dict[str, float]:
        seen.append(weights(classifier.network))
        return {"clean": 0.9, "robust": next(values)}

    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    monkeypatch.setattr(loop, "ENOUGH", 20)
    return seen


def test_training_stops_if_robustness_is_lost_and_returns_the_best_weights_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = planned([0.6, 0.85, 0.02], monkeypatch)
    with pytest.warns(ModelWarning, match="fell to 2% in epoch 3"):
        trained = quick_train(fresh(), halves(), recipe="fast", epochs=5)
    assert len(seen) == 3
    assert torch.equal(weights(trained), seen[1])


def test_a_rest_of_robustness_is_not_called_none(monkeypatch: pytest.MonkeyPatch) -> None:
    planned([0.6, 0.85, 0.004], monkeypatch)
    with pytest.warns(ModelWarning, match=r"fell to 0\.4% in epoch 3"):
        quick_train(fresh(), halves(), recipe="fast", epochs=5)


def test_the_best_weights_survive_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = planned([0.6, 0.85, 0.8, 0.02], monkeypatch)

    def crash(row: dict[str, float]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick_train(fresh(), halves(), recipe="fast", epochs=6, out=tmp_path, on_epoch=crash)
    for _ in range(2):  # trained to its end, and loaded
        with pytest.warns(ModelWarning, match="fell to 2% in epoch 4"):
            trained = quick_train(fresh(), halves(), recipe="fast", epochs=6, out=tmp_path)
        assert torch.equal(weights(trained), seen[1])


class Sharing(nn.Module):
    """Weights that two modules share, a frozen batch-norm and a module that computes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.one = nn.Linear(16 * 12, 16 * 12)
        self.two = self.one
        self.rectify = nn.ReLU(inplace=True)
        self.head = nn.Linear(16 * 12, 2)

    def forward(self, images: Tensor) -> Tensor:
        flat = self.norm(images).flatten(1)
        logits: Tensor = self.head(self.rectify(self.two(self.rectify(self.one(flat)))))
        return logits


def test_shared_weights_are_written_and_frozen_norms_stay_frozen(tmp_path: Path) -> None:
    model = fresh(Sharing).train()
    model.norm.eval()  # type: ignore[union-attr]
    images, labels = halves(60)
    images.requires_grad_()
    options: dict[str, Any] = {"out": tmp_path, "held_out": 0, "learning_rate": 0.01}
    trained = [quick_train(model, (images, labels), **options) for _ in range(2)]
    assert torch.equal(weights(trained[0]), weights(trained[1]))
    for copy in trained:
        assert copy.one is copy.two
        assert copy.training
        assert not copy.norm.training  # type: ignore[union-attr]
        assert torch.equal(copy.norm.running_mean, model.norm.running_mean)  # type: ignore[union-attr, arg-type]
    assert images.grad is None


def test_half_precision_learns_too() -> None:
    images, labels = halves(400)
    options: dict[str, Any] = {"budget": Linf(0.02), "epochs": 6}
    trained = quick_train(fresh(), (images, labels), precision="bf16-mixed", **options).eval()
    assert next(trained.parameters()).dtype == torch.float32
    assert not torch.equal(weights(trained), weights(quick_train(fresh(), (images, labels), **options)))
    assert float((trained(images).argmax(1) == labels).float().mean()) > 0.95


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FlatNetwork((20, 20)), r"data must be images that FlatNetwork takes, got 1 x 16 x 12"),
        (lambda: FlatNetwork().requires_grad_(False), "model must have weights that require gradients"),
        (nn.Flatten, "model must have weights that require gradients, got Flatten"),
    ],
)
def test_networks_that_cannot_be_trained_on_the_data_are_refused(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quick_train(build(), halves())


def test_labels_beyond_the_logits_are_refused_and_inference_mode_does_no_harm() -> None:
    images, labels = halves(60)
    with pytest.raises(ValueError, match=r"labels .*2"):
        quick_train(fresh(), (images, labels + 1))
    options: dict[str, Any] = {"held_out": 0, "epochs": 1}
    with torch.inference_mode():
        trained = quick_train(fresh(), (images.clone(), labels), **options)
    assert torch.equal(weights(trained), weights(quick_train(fresh(), (images, labels), **options)))


def test_other_arguments_are_refused_and_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from weakspot.training import train

    for model, config, message in (
        (len, QUICK, "model must be a torch.nn.Module"),
        (fresh(), "full", "config must be a TrainConfig, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, halves(), config)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ValueError, match=r"pip install 'weakspot\[train\]'"):
        train(fresh(), halves(), replace(QUICK, epochs=1))
