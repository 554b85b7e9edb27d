"""Propagation against a brute-force reading of hooks, on networks of every kind, and the study's controls."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import FlatNetwork, PoolingNetwork, TokenNetwork, untouched
from weakspot import Pairs, attacks
from weakspot.attribution.hooks import reading, spatial_layers
from weakspot.classifier import as_classifier
from weakspot.explanations import PropagationStudy, propagation, propagation_study, random_edits
from weakspot.explanations.feature_propagation import TILE, activation_change
from weakspot.explanations.propagation_controls import _table
from weakspot.statistics import mean_interval


class Shared(nn.Module):
    """One in-place ReLU called twice, and a residual sum by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.first(images))
        maps = maps + self.relu(self.norm(self.second(maps)))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


def drawn(build: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(*arguments)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        return network.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "convolutions": (lambda: drawn(PoolingNetwork), (3, 20, 16)),
    "gray": (lambda: drawn(FlatNetwork), (1, 16, 12)),
    "tokens": (lambda: drawn(TokenNetwork), (3, 16, 24)),
    "shared": (lambda: drawn(Shared), (3, 11, 13)),
    "channels last": (
        lambda: drawn(Shared).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        (3, 11, 13),
    ),
}
each_network = pytest.mark.parametrize("kind", NETWORKS)


def made(kind: str, count: int = 5) -> tuple[nn.Module, Pairs]:
    build, shape = NETWORKS[kind]
    model, generator = build(), torch.Generator().manual_seed(1)
    clean = torch.rand(count, *shape, generator=generator)
    change = 0.2 * torch.randn(count, *shape, generator=generator)
    labels = model(clean).argmax(1)
    return model, Pairs(clean, (clean + change).clamp(0, 1), labels, labels)


def by_hooks(model: nn.Module, name: str, turn: int, images: Tensor) -> Tensor:
    """What the module's call returned, copied before anything else could change it."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _m, _i, output: seen.append(
            (output[0] if isinstance(output, tuple) else output).detach().clone()
        )
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[turn - 1]


def as_maps(activation: Tensor, cells: torch.Size) -> Tensor:
    if activation.ndim == 4:
        return activation
    patches = activation[:, activation.shape[1] - cells.numel() :]
    return patches.transpose(1, 2).reshape(len(patches), -1, *cells)


@each_network
def test_propagation_equals_brute_force_in_every_layer(kind: str) -> None:
    model, pairs = made(kind)
    result = propagation(model, pairs)
    assert result.layers
    for layer in result.layers:
        name, _, call = layer.partition(" (call ")
        turn = int(call.rstrip(")")) if call else 1
        cells = result.maximum[layer].shape[1:]
        first, second = (
            as_maps(by_hooks(model, name, turn, images), cells) for images in (pairs.clean, pairs.adversarial)
        )
        expected = (first - second).abs()
        torch.testing.assert_close(result.maximum[layer], expected.amax(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.mean[layer], expected.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.peak[layer], first.abs().flatten(1).amax(1), rtol=1e-4, atol=1e-5)


def test_named_layers_are_recorded_without_fusion() -> None:
    model, pairs = made("shared")
    result = propagation(model, pairs, layers=["second", "norm", "relu (call 2)"])
    assert list(result.layers) == ["second", "norm", "relu (call 2)"]
    for layer, (name, turn) in {
        "second": ("second", 1),
        "norm": ("norm", 1),
        "relu (call 2)": ("relu", 2),
    }.items():
        first, second = (by_hooks(model, name, turn, images) for images in (pairs.clean, pairs.adversarial))
        torch.testing.assert_close(
            result.maximum[layer], (first - second).abs().amax(1), rtol=1e-4, atol=1e-5
        )


def test_default_layers_are_ends_of_chains_and_blocks() -> None:
    assert list(propagation(*made("shared")).layers) == ["relu", "relu (call 2)"]
    assert list(propagation(*made("convolutions")).layers) == ["stem", "branch"]
    tokens = propagation(*made("tokens")).layers
    assert tokens[0] == "embed"
    assert "encoder.layers.0" in tokens
    assert not any("norm1" in name for name in tokens)


@each_network
def test_no_perturbation_changes_nothing(kind: str) -> None:
    model, pairs = made(kind)
    result = propagation(model, Pairs(pairs.clean, pairs.clean, pairs.labels, pairs.labels))
    for layer in result.layers:
        assert not result.maximum[layer].any()
        assert not result.mean[layer].any()
        assert not result.spread[layer].any()
        assert not result.reach[layer].any()


@each_network
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_no_result_depends_on_the_batch_size(kind: str, batch_size: int) -> None:
    model, pairs = made(kind)
    one, other = propagation(model, pairs), propagation(model, pairs, batch_size=batch_size)
    for layer in one.layers:
        torch.testing.assert_close(one.maximum[layer], other.maximum[layer], rtol=1e-5, atol=1e-6)


@each_network
def test_the_model_is_unchanged(kind: str) -> None:
    model, pairs = made(kind)
    with untouched(model, pairs.clean, pairs.adversarial):
        propagation(model, pairs)
        propagation_study(model, pairs)


def test_hooks_are_removed_after_an_exception() -> None:
    model, pairs = made("convolutions")
    classifier = as_classifier(model)
    places = spatial_layers(classifier, pairs.clean[:1])

    def refuse(name: str, maps: Tensor) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="stem"), reading(classifier, places, refuse):
        classifier(pairs.clean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())


class OneSize(nn.Module):
    """Takes batches of one size only, as exported networks may."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.fixed_batch = network, size

    def forward(self, images: Tensor) -> Tensor:
        missing = -len(images) % self.fixed_batch
        filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        return torch.cat([self.network(part) for part in filled.split(self.fixed_batch)])[: len(images)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_networks_with_a_fixed_batch_size(size: int) -> None:
    model, pairs = made("shared")
    plain = propagation(model, pairs)
    fixed = propagation(OneSize(model, size).eval(), pairs, layers=["network.relu", "network.relu (call 2)"])
    for one, other in zip(plain.layers, fixed.layers, strict=True):
        torch.testing.assert_close(plain.maximum[one], fixed.maximum[other], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (3, 7, 4, 4), (2, 700, 9, 31), (2, 3, 300, 500)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_activation_change_equals_brute_force_in_any_memory_layout(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator).to(memory_format=layout) for _ in range(2))
    result, difference = activation_change(first, second), (first - second).abs()
    assert torch.equal(result.maximum, difference.amax(1))
    torch.testing.assert_close(result.mean, difference.mean(1))
    assert torch.equal(result.peak, first.abs().flatten(1).amax(1))
    assert shape[1] * shape[2] * shape[3] < TILE or shape[0] > 1


def one_pixel_pairs(model: nn.Module, clean: Tensor, row: int, column: int) -> Pairs:
    adversarial = clean.clone()
    adversarial[:, :, row, column] = 1 - adversarial[:, :, row, column].round()
    return Pairs.of(model, clean, adversarial)


def test_one_pixel_reaches_exactly_the_sites_that_see_it() -> None:
    model, _ = made("shared")
    clean = torch.rand(3, 3, 11, 13, generator=torch.Generator().manual_seed(2))
    result = propagation(model, one_pixel_pairs(model, clean, 4, 6))
    for layer, radius in (("relu", 1), ("relu (call 2)", 2)):
        touched = torch.zeros(11, 13, dtype=torch.bool)
        touched[4 - radius : 5 + radius, 6 - radius : 7 + radius] = True
        assert not result.maximum[layer][:, ~touched].any()
        assert result.maximum[layer][:, touched].any()


def test_random_edits_have_the_size_of_the_change_and_depend_only_on_image_and_seed() -> None:
    _, pairs = made("convolutions")
    pairs = Pairs(
        pairs.clean, pairs.clean + 0.4 * (pairs.adversarial - pairs.clean), pairs.labels, pairs.targets
    )
    edits = random_edits(pairs, seed=3)
    assert float(edits.min()) >= 0
    assert float(edits.max()) <= 1
    sizes = [change.flatten(1).abs().sort(1).values for change in (pairs.perturbation, edits - pairs.clean)]
    torch.testing.assert_close(*sizes)
    alone = Pairs(*(part[2:3] for part in (pairs.clean, pairs.adversarial, pairs.labels, pairs.targets)))
    assert torch.equal(random_edits(alone, seed=3), edits[2:3])
    assert not torch.equal(random_edits(pairs, seed=4), edits)
    one = one_pixel_pairs(made("shared")[0], pairs.clean, 3, 3)
    assert ((random_edits(one) - one.clean).abs().amax(1) > 0).flatten(1).sum(1).tolist() == [1] * len(one)


def attacked(count: int = 12) -> tuple[nn.Module, Pairs]:
    """Pairs of which some succeed and some fail."""
    model, pairs = made("shared", count)
    with torch.no_grad():
        model.get_submodule("head").bias.sub_(model(pairs.clean).mean(0))  # type: ignore[operator]
    labels = model(pairs.clean).argmax(1)
    return model, attacks.pgd(model, pairs.clean, labels, steps=3)


def rows_of(study: PropagationStudy, layer: str) -> dict[str, dict[str, float]]:
    rows = study.table[study.table["layer"] == layer].set_index("group").drop(columns="layer")
    return {
        str(group): {str(name): float(row[name]) for name in rows.columns} for group, row in rows.iterrows()
    }


def test_the_study_has_the_means_of_each_group() -> None:
    model, pairs = attacked(60)
    fooled = model(pairs.adversarial).argmax(1) != pairs.labels
    assert 0 < int((~fooled).sum()) < 20 < int(fooled.sum())  # of one group there is an interval
    study, result = propagation_study(model, pairs), propagation(model, pairs)
    for layer in result.layers:
        rows = rows_of(study, layer)
        for group, chosen in (("successes", fooled), ("failures", ~fooled)):
            assert rows[group]["images"] == int(chosen.sum())
            assert rows[group]["spread"] == pytest.approx(float(result.spread[layer][chosen].mean()))
            assert rows[group]["reach"] == pytest.approx(float(result.reach[layer][chosen].mean()))
            low, high = rows[group]["reach_low"], rows[group]["reach_high"]
            assert (
                (low <= rows[group]["reach"] <= high) if group == "successes" else np.isnan([low, high]).all()
            )
            torch.testing.assert_close(
                study.maximum[group][layer], result.maximum[layer][chosen].mean(0), rtol=1e-4, atol=1e-6
            )
        assert rows["random edits"]["images"] == int(fooled.sum())


def test_several_batches_equal_one_batch() -> None:
    model, pairs = made("shared", 7)
    whole = propagation_study(model, pairs)
    lots = (
        Pairs(*(part[rows] for part in (pairs.clean, pairs.adversarial, pairs.labels, pairs.targets)))
        for rows in torch.arange(7).split(3)
    )
    streamed = propagation_study(model, lots, batch_size=2)
    numbers = whole.table.columns.difference(["layer", "group"])
    assert whole.table[numbers].to_numpy() == pytest.approx(
        streamed.table[numbers].to_numpy(), abs=1e-6, nan_ok=True
    )


def test_a_study_without_successes_has_random_edits_of_all_pairs() -> None:
    model, pairs = made("convolutions")
    none = Pairs(pairs.clean, pairs.clean, pairs.labels, pairs.labels)
    study = propagation_study(model, none)
    for layer in study.layers:
        rows = rows_of(study, layer)
        assert rows["successes"]["images"] == 0
        assert math.isnan(rows["successes"]["spread"])
        assert rows["random edits"]["images"] == len(pairs)


def test_the_figure_draws_a_line_for_each_group_that_has_pairs() -> None:
    figure = propagation_study(*attacked()).figure()
    assert [len(axis.lines) for axis in figure.axes] == [3, 3]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["stam"], "layer must .* got 'stam' .did you mean 'stem'"),
        (["head"], "layer must .* got 'head' .head has no feature map"),
        ("stem", "layers must be a list of layer names"),
        ([], "layers must be a list of layer names"),
    ],
)
def test_invalid_layers_are_errors_that_name_them(layers: Any, message: str) -> None:
    model, pairs = made("convolutions")
    with pytest.raises(ValueError, match=message):
        propagation(model, pairs, layers=layers)


def test_a_network_without_maps_is_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    with pytest.raises(ValueError, match="must have a map of the image"):
        propagation(model, Pairs.of(model, torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)))


def test_exported_networks_are_recorded_by_their_function_calls() -> None:
    model, pairs = made("convolutions", 4)
    program = torch.export.export(
        model, (pairs.clean[:2],), dynamic_shapes=({0: torch.export.Dim("images", min=1)},)
    )
    exported = program.module()
    for module in exported.modules():
        module.training = False
    result = propagation(exported, pairs)
    plain = propagation(model, pairs, layers=["stem.0", "branch"])
    assert len(result.layers) == 2
    for one, other in zip(plain.layers, result.layers, strict=True):
        torch.testing.assert_close(plain.maximum[one], result.maximum[other], rtol=1e-4, atol=1e-5)


class Wrapped(nn.Module):
    """Hands on what its convolution made; the norm behind it lies outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.inner(images)
        return maps


def test_a_layer_that_returns_a_folded_convolution_is_recorded_without_folding() -> None:
    model = nn.Sequential(
        Wrapped(), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    ).eval()
    with torch.no_grad():
        model[1].running_var.fill_(4)  # type: ignore[operator]
    clean = torch.rand(2, 3, 9, 9)
    pairs = Pairs.of(model, clean, 1 - clean)
    for layer in ("0", "0.inner"):
        result = propagation(model, pairs, layers=[layer])
        expected = (model[0](clean) - model[0](1 - clean)).abs().amax(1)
        torch.testing.assert_close(result.maximum[layer], expected, rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Modules that return a scalar, nothing, and one map for all images."""

    class Scale(nn.Module):
        def forward(self) -> Tensor:
            return torch.tensor(2.0)

    class Place(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Parameter(torch.rand(1, 4, 8, 8))

        def forward(self, _images: Tensor) -> Tensor:
            return self.map * 1

    class Silent(nn.Module):
        def forward(self, _images: Tensor) -> None:
            return None

    def __init__(self) -> None:
        super().__init__()
        self.look, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.scale, self.place, self.silent = self.Scale(), self.Place(), self.Silent()

    def forward(self, images: Tensor) -> Tensor:
        self.silent(images)
        maps = self.look(images) * self.scale() + self.place(images)
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


def test_modules_without_a_map_are_skipped() -> None:
    model = Odd().eval()
    clean = torch.rand(3, 3, 8, 8)
    result = propagation(model, Pairs.of(model, clean, 1 - clean))
    assert list(result.layers) == ["look"]


def test_layers_of_exported_networks_can_be_named() -> None:
    model, pairs = made("convolutions", 4)
    exported = torch.export.export(
        model, (pairs.clean[:2],), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)
    ).module()
    for module in exported.modules():
        module.training = False
    every = propagation(exported, pairs)
    last = propagation(exported, pairs, layers=every.layers[-1:])
    assert torch.equal(last.maximum[every.layers[-1]], every.maximum[every.layers[-1]])


def test_a_duplicate_layer_is_an_error() -> None:
    model, pairs = made("convolutions")
    with pytest.raises(ValueError, match="layers must name each layer once"):
        propagation(model, pairs, layers=["stem", "network.stem"])


def test_random_edits_of_one_pixel_are_as_large_as_the_attack() -> None:
    clean = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    adversarial = clean.clone()
    adversarial[:, :, 8, 8] = torch.where(clean[:, :, 8, 8] < 0.5, 1.0, 0.0)
    zeros = torch.zeros(60, dtype=torch.long)
    pairs = Pairs(clean, adversarial, zeros, zeros)
    sizes = [(images - clean).abs().flatten(1).sum(1) for images in (adversarial, random_edits(pairs))]
    assert float((sizes[1] / sizes[0]).mean()) > 0.97


def test_silent_layers_and_nan_do_not_count_as_unchanged() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    ).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # type: ignore[operator]
        model[0].bias.fill_(-1.0)  # type: ignore[operator]
    clean = torch.zeros(2, 3, 4, 4)
    result = propagation(model, Pairs.of(model, clean, clean + 1))
    assert result.reach["1"].isnan().all()
    assert (result.spread["1"] == 1).all()
    table = propagation_study(model, Pairs.of(model, clean, clean + 1)).table
    assert not np.isinf(table["reach"]).any()


def test_an_interval_of_a_fraction_of_sites_is_within_0_and_1() -> None:
    values = np.append(np.linspace(0.97, 1, 23), 0.3)
    assert mean_interval(values)[2] > 1
    layer: Any = SimpleNamespace(values=lambda _: {"spread": values, "reach": values})
    row = _table({"last": layer}).iloc[0]
    assert row["spread"] == pytest.approx(values.mean())
    assert 0 <= row["spread_low"] < row["spread"] < row["spread_high"] <= 1 < row["reach_high"]
