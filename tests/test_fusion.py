"""Fusion: the same classifier to rounding, nothing left behind, and nobody outside sees that it happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode

from tests.networks import NETWORKS, untouched
from weakspot import fusion
from weakspot.classifier import Classifier, default_batch
from weakspot.fusion import fused, measured_batch, runs_by_onednn

TOLERANCE = 1e-5  # of the largest logit, as promised


class Residual(nn.Module):
    """Two convolutions with batch-norm and a sum, as in ResNet."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2))
        self.norm_1, self.norm_2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.norm_2(self.second(F.relu(self.norm_1(self.first(x)))))
        return F.relu(x + branch)


class ReadTwice(nn.Module):
    """The convolution's output is normalized and also used as it is."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.norm, self.how = nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), how

    def forward(self, x: Tensor) -> Tensor:
        raw = self.convolution(x)
        return self.how(self.norm(raw), raw)


class CalledTwice(nn.Module):
    """One convolution, two batch-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(6, 6, 3, 1, 1)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm_2(self.convolution(F.relu(self.norm_1(self.convolution(x)))))
        return out


class SharedNorm(nn.Module):
    """Two convolutions, one batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(6, 6, 3, 1, 1) for _ in range(2))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.second(F.relu(self.norm(self.first(x)))))
        return out


class Same(nn.Conv2d):
    """TensorFlow's SAME padding, which depends on the size of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            across += [missing // 2, missing - missing // 2]
        if any(across):
            x = F.pad(x, across)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Uncopyable(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopyable:
        raise RuntimeError("one of a kind")


def doubled(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return 2 * output


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(doubled)
    return module


def pair(convolution: nn.Module, **options: Any) -> nn.Sequential:
    """A convolution from 6 maps to some multiple of 6, and its batch-norm."""
    return nn.Sequential(convolution, nn.BatchNorm2d(int(convolution.out_channels), **options))  # type: ignore[arg-type]


def network(*middle: nn.Module, channels: int = 3, width: int = 6) -> nn.Module:
    """`middle` between a first batch-norm, which no convolution precedes, and a linear head."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, 6, 3, 1, 1),
        *middle,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 5),
    )


# Per name: the network and how many batch-norms can be folded.
KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "in place": (lambda: network(nn.BatchNorm2d(6), nn.ReLU(inplace=True), pair(nn.Conv2d(6, 6, 3))), 2),
    "residual": (lambda: network(nn.ReLU(), Residual(), Residual()), 4),
    "sum of raw": (lambda: network(ReadTwice(lambda normed, raw: normed + raw)), 0),
    "raw by function": (
        lambda: network(ReadTwice(lambda normed, raw: normed * torch.sigmoid(raw.mean()))),
        0,
    ),
    "raw in a list": (lambda: network(ReadTwice(lambda normed, raw: torch.cat([normed, raw], 1)[:, 3:9])), 0),
    "raw's slice": (lambda: network(ReadTwice(lambda normed, raw: normed + raw[:, :1])), 0),
    "raw's method": (lambda: network(ReadTwice(lambda normed, raw: normed + raw.abs())), 0),
    "raw's data": (lambda: network(ReadTwice(lambda normed, raw: normed + raw.data)), 0),
    "raw's view": (lambda: network(ReadTwice(lambda normed, raw: normed + raw.mT.mT)), 0),
    "raw's shape": (lambda: network(ReadTwice(lambda normed, raw: normed / raw.shape[1] / raw.size(2))), 1),
    "convolution twice": (lambda: network(CalledTwice()), 0),
    "norm twice": (lambda: network(SharedNorm()), 0),
    "norm before": (lambda: network(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)), 0),
    "no affine": (lambda: network(nn.ReLU(), pair(nn.Conv2d(6, 6, 3), affine=False)), 1),
    "no statistics": (lambda: network(nn.ReLU(), pair(nn.Conv2d(6, 6, 3), track_running_stats=False)), 0),
    "grouped": (lambda: network(nn.ReLU(), pair(nn.Conv2d(6, 12, 3, groups=3)), nn.ReLU(), width=12), 1),
    "depthwise": (lambda: network(nn.ReLU(), pair(nn.Conv2d(6, 6, 3, groups=6, bias=False))), 1),
    "strided": (lambda: network(nn.ReLU(), pair(nn.Conv2d(6, 6, 5, 2, 2, bias=False))), 1),
    "dilated": (lambda: network(nn.ReLU(), pair(nn.Conv2d(6, 6, 3, dilation=2))), 1),
    "reflecting": (
        lambda: network(nn.ReLU(), pair(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"))),
        1,
    ),
    "own forward": (lambda: network(nn.ReLU(), pair(Same(6, 6, 3, 2)), pair(Same(6, 6, 2))), 2),
    "hooked norm": (lambda: network(nn.ReLU(), nn.Conv2d(6, 6, 3), hooked(nn.BatchNorm2d(6))), 0),
    "hooked convolution": (lambda: network(nn.ReLU(), hooked(nn.Conv2d(6, 6, 3)), nn.BatchNorm2d(6)), 0),
    "weight norm": (lambda: network(nn.ReLU(), pair(weight_norm(nn.Conv2d(6, 6, 3)))), 0),
    "not to be copied": (lambda: network(nn.ReLU(), Uncopyable(pair(nn.Conv2d(6, 6, 3)))), 0),
    "norm, dropout": (lambda: network(nn.BatchNorm2d(6), nn.Dropout2d(), pair(nn.Conv2d(6, 6, 1))), 2),
    "identity between": (lambda: network(nn.Identity(), nn.BatchNorm2d(6)), 1),
    "relu between": (lambda: network(nn.ReLU(), nn.BatchNorm2d(6)), 0),
    "no norm": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 13 * 9, 4)), 0),
    "gray": (lambda: network(nn.BatchNorm2d(6), nn.ReLU(), channels=1), 1),
    "double": (lambda: network(nn.BatchNorm2d(6), nn.ReLU(), Residual()).double(), 3),
}


def made(kind: str) -> tuple[Classifier, Tensor]:
    """The classifier in eval mode, its statistics far from trivial, and four images that are not square."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = KINDS[kind][0]().eval()
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, low, high in (("running_mean", -1, 1), ("running_var", 0.2, 3), ("weight", -2, 2)):
                    if getattr(module, name) is not None:
                        nn.init.uniform_(getattr(module, name), low, high)
                if module.affine:
                    nn.init.uniform_(module.bias, -1, 1)
        channels = 1 if kind == "gray" else 3
        return Classifier.wrap(built).eval(), torch.rand(4, channels, 15, 11)


def answers(classifier: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their weighted sum."""
    point = images.clone().requires_grad_()
    logits = classifier(point)
    weights = torch.arange(1, 1 + logits.shape[1]).to(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), point)
    return logits.detach(), gradient


def assert_equal_to_rounding(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = float(expected[0].abs().max()), float(other.abs().max())
        assert float((one - other).abs().max()) <= TOLERANCE * max(scale)


def folding(classifier: Classifier) -> list[str]:
    """The batch-norms that hand on what they are given, in this thread and just now."""
    folded = [norm for mode in fusion._active.modes for _, norm in mode.folds]
    return [name for name, module in classifier.network.named_modules() if module in folded]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_same_folded_or_not(kind: str) -> None:
    classifier, images = made(kind)
    expected = answers(classifier, images)
    parameters = dict(classifier.named_parameters())
    with untouched(classifier, images):
        with fused(classifier, images[:1]):
            found = answers(classifier, images)
            assert len(folding(classifier)) == KINDS[kind][1]
        for name, parameter in classifier.named_parameters():
            assert parameter is parameters[name]
        assert not folding(classifier)
    assert_equal_to_rounding(found, expected)
    again = answers(classifier, images)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_logits_are_equal_for_every_kind_of_network(name: str) -> None:
    model, images = NETWORKS[name]()
    classifier = model if isinstance(model, Classifier) else Classifier.wrap(model)
    expected = answers(classifier, images)
    with untouched(classifier, images), fused(classifier, images[:1]):
        found = answers(classifier, images)
    assert_equal_to_rounding(found, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_only_foldable_pairs_are_planned(kind: str) -> None:
    classifier, images = made(kind)
    modules = dict(classifier.network.named_modules())
    plan = [
        fold
        for fold in fusion._plan(classifier, images[:1])
        if not any(modules[name]._forward_hooks for name in fold)
    ]
    assert len(plan) == len({norm for _, norm in plan}) == KINDS[kind][1]
    for convolution, norm in plan:
        assert isinstance(modules[convolution], nn.Conv2d)
        assert isinstance(modules[norm], nn.BatchNorm2d)


@pytest.mark.parametrize("kind", ["residual", "double", "own forward"])
def test_fusion_ends_after_an_exception(kind: str) -> None:
    classifier, images = made(kind)
    parameters = dict(classifier.named_parameters())

    def interrupted() -> None:
        with fused(classifier, images[:1]):
            assert folding(classifier)
            raise KeyboardInterrupt

    with untouched(classifier), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not folding(classifier)
    assert all(parameter is parameters[name] for name, parameter in classifier.named_parameters())


@pytest.mark.parametrize("kind", ["residual", "own forward"])
def test_nested_fusion_is_equal_and_ends(kind: str) -> None:
    classifier, images = made(kind)
    expected = answers(classifier, images)
    parameters = dict(classifier.named_parameters())
    with untouched(classifier):
        with fused(classifier, images[:1]):
            with fused(classifier, images[:1]):
                assert_equal_to_rounding(answers(classifier, images), expected)
            assert_equal_to_rounding(answers(classifier, images), expected)
            assert folding(classifier)
        assert_equal_to_rounding(answers(classifier, images), expected)
    assert not folding(classifier)
    assert all(parameter is parameters[name] for name, parameter in classifier.named_parameters())


@pytest.mark.parametrize("first_in_fused", [True, False])
def test_hooks_and_counters_see_the_forwards_that_happen_and_none_of_the_planning(
    first_in_fused: bool,
) -> None:
    class Counting(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside, self.count = inside, 0

        def forward(self, images: Tensor) -> Tensor:
            self.count += 1
            out: Tensor = self.inside(images)
            return out

    plain, images = made("residual")
    wrapper = Counting(plain.network).eval()
    classifier, seen = Classifier.wrap(wrapper).eval(), []
    for module in (classifier, wrapper, wrapper.inside):
        module.register_forward_hook(lambda module, given, output: seen.append(module))
        module.register_forward_pre_hook(lambda module, given: seen.append(module))
    if not first_in_fused:
        classifier(images)
        assert (wrapper.count, len(seen)) == (1, 6)
        wrapper.count = 0
        seen.clear()
    with fused(classifier, images[:1]):
        assert folding(classifier)
        assert (wrapper.count, len(seen)) == (0, 0)
        classifier(images)
        classifier(images)
    assert (wrapper.count, len(seen)) == (2, 12)


@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_are_taken_up_at_the_next_entry(in_place: bool) -> None:
    classifier, images = made("residual")
    with fused(classifier, images[:1]):
        before = answers(classifier, images)
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point() and tensor is not other.mean and tensor is not other.std:
                tensor.mul_(1.3)
    if in_place:
        classifier.load_state_dict(other.state_dict())
    else:
        for (_, module), (_, replacement) in zip(
            classifier.named_modules(), other.named_modules(), strict=True
        ):
            for name, parameter in replacement.named_parameters(recurse=False):
                setattr(module, name, parameter)
            for name, buffer in replacement.named_buffers(recurse=False):
                setattr(module, name, buffer)
    expected = answers(other, images)
    with fused(classifier, images[:1]):
        found = answers(classifier, images)
    assert_equal_to_rounding(found, expected)
    assert not torch.allclose(found[0], before[0], rtol=1e-2)


def test_a_hook_added_after_the_first_use_disables_folding() -> None:
    classifier, images = made("in place")
    with fused(classifier, images[:1]):
        assert len(folding(classifier)) == 2
    norm = next(
        module
        for name, module in classifier.network.named_modules()
        if name == fusion._plan(classifier, images[:1])[0][1]
    )
    handle = norm.register_forward_hook(doubled)
    expected = answers(classifier, images)
    with fused(classifier, images[:1]):
        assert_equal_to_rounding(answers(classifier, images), expected)
        assert len(folding(classifier)) == 0
    handle.remove()
    with fused(classifier, images[:1]):
        assert len(folding(classifier)) == 2


def test_a_network_that_reads_twice_at_one_size_only_is_planned_for_each_size() -> None:
    def sometimes(normed: Tensor, raw: Tensor) -> Tensor:
        return normed + raw if raw.shape[2] > 12 else normed

    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier.wrap(network(ReadTwice(sometimes)).eval()).eval()
    for size, folds in ((15, 0), (10, 1), (15, 0)):
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        expected = answers(classifier, images)
        with fused(classifier, images[:1]):
            assert len(folding(classifier)) == folds
            assert_equal_to_rounding(answers(classifier, images), expected)


def test_few_images_go_through_in_the_usual_batches_and_none_is_measured() -> None:
    classifier, images = made("residual")
    runs: list[int] = []
    classifier.network.register_forward_hook(lambda module, given, output: runs.append(len(output)))
    with untouched(classifier, images):
        assert measured_batch(classifier, images) == default_batch(images)
    large = torch.rand(3, 3, 224, 224)
    assert measured_batch(classifier, large) == default_batch(large)
    assert not runs


def test_a_measured_batch_is_half_once_or_twice_the_usual_and_the_classifier_stays_as_it_is() -> None:
    classifier, _ = made("in place")
    images = torch.rand(64, 3, 112, 112)
    usual, runs = default_batch(images), []
    assert len(images) >= 4 * usual
    classifier.network.register_forward_hook(lambda module, given, output: runs.append(1))
    with untouched(classifier):
        found = measured_batch(classifier, images)
    assert found in {usual // 2, usual, 2 * usual}
    assert found == measured_batch(classifier, images)
    assert not runs


def test_a_classifier_that_cannot_be_copied_is_not_measured() -> None:
    classifier, _ = made("not to be copied")
    images = torch.rand(64, 3, 112, 112)
    assert measured_batch(classifier, images) == default_batch(images)


@pytest.mark.parametrize(("count", "side", "dilated"), [(1, 8, False), (2, 8, True), (1, 64, True)])
def test_a_pointwise_convolution_gives_the_same_however_it_is_called(
    count: int, side: int, dilated: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 1, stride=2)
    maps = torch.randn(count, 6, side, side)
    assert runs_by_onednn(maps, layer.weight) is dilated
    called = F.conv2d(maps, layer.weight, layer.bias, stride=2, dilation=2)
    torch.testing.assert_close(called, layer(maps))
    assert not runs_by_onednn(maps, torch.zeros(12, 6, 3, 3))
    assert not runs_by_onednn(maps.to("meta"), layer.weight)


def test_inside_fused_only_pointwise_convolutions_are_called_with_a_dilation() -> None:
    torch.manual_seed(0)
    middle = pair(nn.Conv2d(6, 6, 1)), nn.ReLU(), pair(nn.Conv2d(6, 6, 3))
    model = Classifier.wrap(network(nn.ReLU(), *middle).eval(), mean=[0.5] * 3, std=[0.5] * 3)
    images = torch.rand(3, 3, 16, 16)
    seen: list[tuple[int, object]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is F.conv2d:
                seen.append((kwargs["weight"].shape[-1], kwargs["dilation"]))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = model(images)
        with fused(model, images[:1]):
            pass  # from here on it is known what to fold
        with Watch(), fused(model, images[:1]):
            logits = model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert seen == [(3, (1, 1)), (1, 2), (3, (1, 1))]
