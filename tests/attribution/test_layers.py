"""Layers: how an activation is recognized as a map of the image, and which map is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import NETWORKS, Made, TokenNetwork, untouched
from weakspot.attribution.layers import Layer, find_layer
from weakspot.attribution.layout import Layout
from weakspot.classifier import as_classifier

LAW = settings(deadline=None, derandomize=True)  # the same cases in every run


def found_in(model: nn.Module, images: Tensor) -> Layer:
    layer = find_layer(as_classifier(model), images[:1])
    assert layer is not None
    return layer


def numbered(height: int, width: int) -> Tensor:
    """A map (1, 1, h, w) in which every cell holds its own number."""
    return torch.arange(float(height * width)).view(1, 1, height, width)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@LAW
@given(
    height=st.integers(9, 40), width=st.integers(9, 40), patch=st.integers(4, 16), channels=st.integers(2, 9)
)
def test_tokens_are_laid_out_as_the_grid_of_patches_behind_their_prefix(
    prefix: int, height: int, width: int, patch: int, channels: int
) -> None:
    assume(0.25 < height / width < 4)
    image = torch.zeros(1, 3, 1, 1).expand(1, 3, height * patch, width * patch)
    cells = numbered(height, width).expand(1, channels, -1, -1)
    tokens = torch.cat([torch.full((1, prefix, channels), -1.0), cells.flatten(2).transpose(1, 2)], 1)
    layout = Layout.of(tokens, image)
    assert layout == Layout("tokens", height, width, prefix)
    assert torch.equal(layout.maps(tokens), cells)


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (197, (224, 224), (14, 14, 1)),  # ViT-B/16
        (198, (224, 224), (14, 14, 2)),  # DeiT, with a distillation token
        (50, (224, 224), (7, 7, 1)),  # ViT-B/32
        (257, (224, 224), (16, 16, 1)),  # DINOv2
        (261, (224, 224), (16, 16, 5)),  # DINOv2 with registers
        (1374, (518, 518), (37, 37, 5)),  # the same at its training size
        (49, (224, 224), (7, 7, 0)),  # Swin, last stage
        (1 + 24 * 8, (384, 128), (24, 8, 1)),  # people, three times as high as wide
        (1 + 4 * 6, (16, 24), (4, 6, 1)),
    ],
)
def test_tokens_of_well_known_networks_are_laid_out_correctly(
    tokens: int, size: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    layout = Layout.of(torch.zeros(1, tokens, 8), torch.zeros(1, 3, *size))
    assert layout == Layout("tokens", *expected)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(("height", "width", "stride"), [(7, 9, 8), (12, 5, 4), (1, 3, 32), (56, 56, 4)])
def test_maps_are_recognized_with_channels_first_and_last(
    height: int, width: int, stride: int, last: bool
) -> None:
    image = torch.zeros(1, 3, height * stride, width * stride)
    cells = numbered(height, width).expand(1, 64, -1, -1)
    activation = cells.permute(0, 2, 3, 1) if last else cells
    layout = Layout.of(activation, image)
    assert layout == Layout("channels_last" if last else "channels_first", height, width)
    assert torch.equal(layout.maps(activation), cells)


@pytest.mark.parametrize(
    "shape",
    [(1, 64), (1, 64, 1, 1), (1, 401, 64), (1, 8, 30, 8), (1, 2, 3, 4, 5), (64,), ()],
    ids=str,
)
def test_another_aspect_ratio_is_not_a_map(shape: tuple[int, ...]) -> None:
    assert Layout.of(torch.zeros(shape), torch.zeros(1, 3, 64, 160)) is None


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride", "padding"),
    [((48, 64), 16, 7, 2, 0), ((128, 171), 48, 3, 2, 1), ((144, 256), 40, 3, 2, 0), ((32, 40), 24, 3, 1, 0)],
)
def test_a_number_of_channels_near_the_aspect_ratio_is_not_taken_for_a_side(
    size: tuple[int, int], channels: int, kernel: int, stride: int, padding: int
) -> None:
    image = torch.zeros(1, 3, *size)
    activation = nn.Conv2d(3, channels, kernel, stride, padding)(image)
    assert Layout.of(activation, image) == Layout("channels_first", *activation.shape[2:])


def test_two_pooled_units_are_no_map_of_a_portrait() -> None:
    assert Layout.of(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 64, 48)) is None


class ExplicitAttention(nn.Module):
    """A transformer block with its attention written out: softmax(q k) is square, as maps of square images are."""

    def __init__(self, size: int = 16, patch: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.before, self.after, self.last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1)
        queries, keys, values = (
            part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.mix(self.before(tokens)).chunk(3, 2)
        )
        attention = ((queries @ keys.transpose(2, 3)) / 2).softmax(3)
        assert attention.shape[2] == attention.shape[3]
        tokens = tokens + (attention @ values).transpose(1, 2).flatten(2)
        tokens = tokens + F.gelu(self.inner(self.after(tokens)))
        logits: Tensor = self.head(self.last(tokens)[:, 0])
        return logits


@pytest.mark.parametrize(
    "build", [ExplicitAttention, lambda: TokenNetwork((16, 16))], ids=["written out", "torch's"]
)
def test_attention_is_not_mistaken_for_a_map(build: type[nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    layer = found_in(model, torch.rand(1, 3, 16, 16))
    assert layer.layout == Layout("tokens", 4, 4, 1)
    assert layer.name in {"before", "encoder.layers.1.norm1"}


@pytest.mark.parametrize(
    ("network", "layout", "has_pooling_head"),
    [
        ("pooling", Layout("channels_first", 10, 10), True),
        ("normalized", Layout("channels_first", 9, 13), True),
        ("flat, gray, two classes, not square", Layout("channels_first", 8, 6), False),
        ("tokens, not square", Layout("tokens", 4, 6, 1), False),
    ],
)
def test_the_last_map_of_each_network_is_found(network: str, layout: Layout, has_pooling_head: bool) -> None:
    model, images = NETWORKS[network]()
    with untouched(model, images):
        layer = found_in(model, images)
    assert layer.layout == layout
    assert (layer.head is not None) == has_pooling_head


def test_a_network_without_a_map_has_no_layer() -> None:
    model, images = NETWORKS["linear"]()
    assert find_layer(as_classifier(model), images[:1]) is None


def test_a_layer_is_called_by_its_outermost_module_or_by_its_function(pooling: Made) -> None:
    model, images = pooling
    assert found_in(model, images).name.startswith("relu (call ")
    body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    named = nn.Sequential(body, nn.Linear(4, 2)).eval()
    assert found_in(named, images).name == "0.0"


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(5)], ids=repr)
def test_the_map_before_the_last_pooling_is_read(pool: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(3)).eval()
    images = torch.rand(1, 3, 12, 12)
    model(images)
    assert found_in(model, images).layout == Layout("channels_first", 12, 12)


def test_a_flattened_view_of_a_map_is_not_mistaken_for_tokens() -> None:
    """Twelve channels of an image of 24 x 32, flattened, look like a grid of 3 x 4 tokens."""

    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 12, 4, 4)
            self.head = nn.Linear(12, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(F.relu(self.convolution(images)).flatten(2).mean(2))
            return logits

    layer = found_in(Flattening().eval(), torch.rand(1, 3, 24, 32))
    assert layer.layout == Layout("channels_first", 6, 8)
    assert layer.head is not None


def test_scalars_on_the_way_are_no_maps() -> None:
    """As the learned temperature of CLIP: exp() of a parameter without dimensions."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)
            self.temperature = nn.Parameter(torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            pooled = F.relu(self.convolution(images)).mean((2, 3))
            return pooled * self.temperature.exp()

    assert found_in(Tempered().eval(), torch.rand(1, 3, 9, 9)).layout == Layout("channels_first", 7, 7)


@pytest.mark.parametrize("by_name", [False, True], ids=["by call", "by module"])
def test_watching_reads_each_pass_changes_no_logit_and_ends(pooling: Made, by_name: bool) -> None:
    model, images = pooling
    classifier = as_classifier(model)
    expected = classifier(images)
    layer = find_layer(classifier, images[:1], "stem.1" if by_name else None)
    assert layer is not None
    with layer.watched() as seen:
        torch.testing.assert_close(classifier(images), expected, rtol=0, atol=0)
        classifier(images[:2])
    assert [len(output) for output in seen] == [3, 2]
    classifier(images)
    assert len(seen) == 2
    # stem.1 is followed by an in-place ReLU; what was read is from before it.
    assert (float(seen[0].detach().min()) < 0) == by_name
