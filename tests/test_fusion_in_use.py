"""Fusion where it is used: in attacks, beside hooks and randomness of a user's own, with plans that have aged."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.networks import NETWORKS, Made, untouched
from weakspot import fusion
from weakspot.attacks import pgd
from weakspot.classifier import Classifier
from weakspot.fusion import fused, measured_batch
from weakspot.pairs import AttackResult


def answers(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their weighted sum."""
    point = images.clone().requires_grad_()
    logits = model(point)
    weights = torch.arange(1, 1 + logits.shape[1]).to(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), point)
    return logits.detach(), gradient


def assert_the_same_fused(classifier: Classifier, images: Tensor, *, folds: int | None = None) -> None:
    expected = answers(classifier, images)
    with untouched(classifier, images), fused(classifier, images[:1]):
        found = answers(classifier, images)
        folded = [norm for mode in fusion._active.modes for _, norm in mode.folds]
    for one, other in zip(found, expected, strict=True):
        apart, scale = (
            float((one - other).abs().max()),
            max(float(t.abs().max()) for t in (expected[0], other)),
        )
        assert apart <= 1e-5 * scale
    if folds is not None:
        assert len(folded) == folds


def pipeline(*modules: nn.Module) -> tuple[Classifier, Tensor]:
    """A first convolution, `modules` from 6 channels to 6, and a linear head; statistics far from trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), *modules, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)
        ).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.2, 3)
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.bias, -1, 1)
        return Classifier.wrap(network).eval(), torch.rand(4, 3, 15, 11)


def halved(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.clamp(min=0) / 2


HOOKED: dict[str, Callable[[], nn.Module]] = {
    "around a convolution": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 3)), nn.BatchNorm2d(6)),
    "around a norm": lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.Sequential(nn.BatchNorm2d(6))),
    "around both": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))),
    "on an identity between": lambda: nn.Sequential(
        nn.Conv2d(6, 6, 3), nn.Sequential(nn.Identity()), nn.BatchNorm2d(6)
    ),
}


@pytest.mark.parametrize("first", [True, False], ids=["hook first", "plan first"])
@pytest.mark.parametrize("place", HOOKED)
def test_a_hook_on_a_container_reads_and_changes_what_it_does_without_fusion(place: str, first: bool) -> None:
    block = HOOKED[place]()
    classifier, images = pipeline(block)
    if not first:
        assert_the_same_fused(classifier, images, folds=1)
    for container in block.modules():
        if isinstance(container, nn.Sequential) and container is not block:
            container.register_forward_hook(halved)
    assert_the_same_fused(classifier, images)


class Keeping(nn.Module):
    """Keeps what its convolution gives, for whoever asks later."""

    keeps = False

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.convolution(x)
        if self.keeps:
            self.kept = raw
        normed: Tensor = self.norm(raw)
        return normed


INDIRECT: dict[str, Callable[[Keeping], Any]] = {
    "what was kept": lambda block: block.kept.mean(),
    "a weight": lambda block: block.convolution.weight.norm(),
    "the convolution": lambda block: block.convolution(torch.ones(1, 6, 4, 4)).mean(),
    "the norm": lambda block: block.norm(torch.ones(1, 6, 4, 4)).mean(),
}


@pytest.mark.parametrize("place", ["block", "head"])
@pytest.mark.parametrize("use", INDIRECT)
def test_a_hook_that_uses_what_folding_changes_does_what_it_does_without(use: str, place: str) -> None:
    block, head = Keeping(), nn.Conv2d(6, 6, 1)
    classifier, images = pipeline(block, head)
    assert_the_same_fused(classifier, images, folds=1)
    block.keeps = True
    (block if place == "block" else head).register_forward_hook(
        lambda module, given, output: output + INDIRECT[use](block)
    )
    assert_the_same_fused(classifier, images, folds=0)


def test_hooks_on_all_modules_at_once_switch_fusion_off() -> None:
    classifier, images = pipeline(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: output.clamp(min=0) if isinstance(module, nn.Conv2d) else None
    )
    try:
        assert_the_same_fused(classifier, images, folds=0)
    finally:
        handle.remove()
    assert_the_same_fused(classifier, images, folds=1)


@pytest.mark.parametrize("first", [True, False], ids=["hook first", "plan first"])
def test_a_hook_before_a_container_of_a_norm_changes_what_it_does_without_fusion(first: bool) -> None:
    inner = nn.Sequential(nn.BatchNorm2d(6))
    classifier, images = pipeline(nn.Conv2d(6, 6, 3), inner)
    if not first:
        assert_the_same_fused(classifier, images, folds=1)
    inner.register_forward_pre_hook(lambda module, given: (given[0].clamp(min=0),))
    assert_the_same_fused(classifier, images)


def test_a_norm_that_lost_its_statistics_after_the_plan_was_made_stays_as_it_is() -> None:
    norm = nn.BatchNorm2d(6)
    classifier, images = pipeline(nn.Conv2d(6, 6, 3), norm, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    assert_the_same_fused(classifier, images, folds=2)
    norm.running_mean = norm.running_var = None  # as for adapting batch-norm to the images at hand
    assert_the_same_fused(classifier, images, folds=1)


def test_a_convolution_parametrised_after_the_plan_was_made_stays_as_it_is() -> None:
    convolution = nn.Conv2d(6, 6, 3)
    classifier, images = pipeline(convolution, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    assert_the_same_fused(classifier, images, folds=2)
    torch.nn.utils.parametrizations.weight_norm(convolution)
    assert_the_same_fused(classifier, images, folds=1)


def test_a_pruned_convolution_stays_as_it_is() -> None:
    from torch.nn.utils import prune

    convolution = nn.Conv2d(6, 6, 3)
    classifier, images = pipeline(convolution, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    assert_the_same_fused(classifier, images, folds=2)
    prune.random_unstructured(convolution, "weight", 0.5)
    assert_the_same_fused(classifier, images, folds=0)


class Standardized(nn.Conv2d):
    """Scales its own weight on the way, so that a scale folded into it is lost."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        out: Tensor = self._conv_forward(x, (self.weight - mean) / spread, self.bias)
        return out


class Flattening(nn.Module):
    """Reads its input's memory in the order it is given: channels last would be an error, or another order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)[:, :24].view(len(x), 6, 2, 2)


@pytest.mark.parametrize("module", [Standardized(6, 6, 3), nn.Sequential(nn.Conv2d(6, 6, 3), Flattening())])
def test_networks_that_folding_would_break_are_not_folded(module: nn.Module) -> None:
    classifier, images = pipeline(module, nn.BatchNorm2d(6))
    assert_the_same_fused(classifier, images, folds=0)


class Recomputing(nn.Module):
    """Runs its inside again on the way back, as checkpointing does to save memory."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inside, x, use_reentrant=False)
        return out


def test_checkpointed_modules_are_not_folded() -> None:
    inside = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    classifier, images = pipeline(Recomputing(inside))
    assert_the_same_fused(classifier, images, folds=0)


def test_a_compiled_network_is_left_to_its_compiler() -> None:
    block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    classifier, images = pipeline(block)
    assert_the_same_fused(classifier, images, folds=1)
    block.compile(backend="eager")
    with fused(classifier, images[:1]):
        assert not fusion._active.modes


def test_one_network_in_two_classifiers_is_fused_in_each_and_put_back() -> None:
    first, images = pipeline(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    second = Classifier.wrap(first.network, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25]).eval()
    expected = answers(second, images)
    assert_the_same_fused(first, images, folds=1)
    assert_the_same_fused(second, images, folds=1)
    with fused(first, images[:1]), torch.no_grad():
        found = second(images)
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(*both) for both in zip(answers(second, images), expected, strict=True))


def test_folding_in_one_network_within_another_keeps_both_apart() -> None:
    (first, images), (second, _) = (pipeline(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)) for _ in range(2))
    expected = first(images).detach(), second(images).detach()
    with fused(first, images[:1]), fused(second, images[:1]):
        torch.testing.assert_close(first(images).detach(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second(images).detach(), expected[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(first(images).detach(), expected[0])
    assert torch.equal(second(images).detach(), expected[1])


class Noisy(nn.Module):
    """Adds noise to its images, as randomized defenses do."""

    def __init__(self, inside: nn.Module, scale: float) -> None:
        super().__init__()
        self.inside, self.scale = inside, scale

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inside(images + self.scale * torch.randn_like(images))
        return logits


@pytest.mark.parametrize("scale", [0.05, 0.0], ids=["noise", "noise of no size"])
def test_planning_draws_nothing_from_the_generator_of_a_randomized_model(pooling: Made, scale: float) -> None:
    network, images = pooling
    model = Noisy(network, scale).eval()
    labels = network(images).argmax(1)

    def attacked() -> Tensor:
        torch.manual_seed(0)
        return pgd(model, images, labels, steps=3).adversarial

    with torch.random.fork_rng():
        first, *later = (attacked() for _ in range(3))  # only the first has to plan
    assert all(torch.equal(first, other) for other in later)


def test_entering_leaves_the_generator_alone_whatever_the_model_draws(pooling: Made) -> None:
    network, images = pooling
    classifier = Classifier.wrap(Noisy(network, 0.0)).eval()
    with untouched(classifier, images), fused(classifier, images[:1]):
        pass


def test_a_plan_keeps_no_network_alive() -> None:
    classifier, images = pipeline(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    with fused(classifier, images[:1]):
        pass
    watched = weakref.ref(classifier.network)
    del classifier
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("name", ["pooling", "normalized"])
def test_an_attack_is_the_same_with_and_without_fusion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = NETWORKS[name]()
    labels = model(images).argmax(1)
    with untouched(model, images, labels):
        found = pgd(model, images, labels, steps=5)
    monkeypatch.setattr(fusion, "_plan", lambda classifier, image: ())
    plain = pgd(model, images, labels, steps=5)
    torch.testing.assert_close(found.adversarial, plain.adversarial, rtol=0, atol=1e-5)
    assert torch.equal(found.success, plain.success)


def test_an_attack_within_an_attack_on_the_same_model_ends_as_it_does_alone(pooling: Made) -> None:
    model, images = pooling
    labels = model(images).argmax(1)
    expected = pgd(model, images, labels, steps=3)
    inner: list[AttackResult] = []

    def reported(fraction: float) -> None:
        if not inner:
            inner.append(pgd(model, images, labels, steps=3))

    with untouched(model, images):
        outer = pgd(model, images, labels, steps=3, progress=reported)
    for result in (outer, *inner):
        torch.testing.assert_close(result.adversarial, expected.adversarial, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_resnet_of_transformers_is_folded_whole(kind: str, channels: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ResNetConfig(**sizes, layer_type=kind, num_channels=channels, num_labels=5)
        network = transformers.ResNetForImageClassification(config).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 1.5)
        images = torch.rand(2, channels, 48, 33)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert_the_same_fused(Classifier.wrap(network).eval(), images, folds=norms)


# ---------------------------------------------------------------- batches


Seconds = Callable[[int], float]


def timed_by(monkeypatch: pytest.MonkeyPatch, seconds: Seconds) -> list[int]:
    """A clock of one's own, with eight images as the usual batch; the sizes it was asked about."""
    asked: list[int] = []

    def measured(classifier: Classifier, images: Tensor) -> float:
        asked.append(len(images))
        return seconds(len(images))

    monkeypatch.setattr(fusion, "default_batch", lambda images: 8)
    monkeypatch.setattr(fusion, "_seconds", measured)
    return asked


CLOCKS: dict[str, tuple[Seconds, int]] = {
    "all alike": (lambda size: 1.0 * size, 8),
    "small is cheap": (lambda size: 0.7 * size if size == 4 else 1.0 * size, 4),
    "large is cheap": (lambda size: 0.7 * size if size == 16 else 1.0 * size, 16),
    "large is a little cheaper": (lambda size: 0.95 * size if size == 16 else 1.0 * size, 8),
    "each has a fixed cost": (lambda size: 5.0 + size, 16),
}


@pytest.mark.parametrize(("seconds", "best"), CLOCKS.values(), ids=CLOCKS)
def test_the_batch_is_the_one_that_saves_a_tenth_or_the_usual(
    pooling: Made, monkeypatch: pytest.MonkeyPatch, seconds: Seconds, best: int
) -> None:
    asked = timed_by(monkeypatch, seconds)
    classifier, images = Classifier.wrap(pooling[0]).eval(), torch.rand(32, 3, 20, 20)
    assert measured_batch(classifier, images) == best
    assert set(asked) == {4, 8, 16}
    asked.clear()
    assert measured_batch(classifier, images) == best
    assert not asked  # once per network and shape
    measured_batch(classifier, torch.rand(32, 3, 20, 24))
    assert set(asked) == {4, 8, 16}


def test_few_images_are_not_measured(pooling: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed_by(monkeypatch, lambda size: 0.1 * size)
    classifier = Classifier.wrap(pooling[0]).eval()
    assert measured_batch(classifier, torch.rand(31, 3, 20, 20)) == 8
    assert not asked


@pytest.mark.parametrize("best", [4, 8, 16])
def test_the_batch_that_is_chosen_changes_no_result_beyond_rounding(
    pooling: Made, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    model, _ = pooling
    images = torch.rand(33, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    expected = pgd(model, images, labels, steps=3, batch_size=33)
    timed_by(monkeypatch, lambda size: 0.5 * size if size == best else 1.0 * size)
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    result = pgd(model, images, labels, steps=3)
    handle.remove()
    assert max(sizes) == best
    torch.testing.assert_close(result.adversarial, expected.adversarial, rtol=0, atol=1e-5)
    assert torch.equal(result.success, expected.success)


class Frugal(nn.Module):
    """Has memory for so many images and no more."""

    def __init__(self, inside: nn.Module, room: int) -> None:
        super().__init__()
        self.inside, self.room = inside, room

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.room:
            raise RuntimeError("out of memory")
        logits: Tensor = self.inside(images)
        return logits


def test_a_batch_that_does_not_fit_is_not_chosen_and_stops_nothing(
    pooling: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "default_batch", lambda images: 8)
    model, images = Frugal(pooling[0], room=8).eval(), torch.rand(32, 3, 20, 20)
    assert measured_batch(Classifier.wrap(model).eval(), images) <= 8
