"""LocalEdits against its brute-force twin: the whole pasted image through the network."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot import Classifier, ImageWarning, LocalEdits, ModelWarning
from weakspot.classifier import evaluating
from weakspot.edits import Edits, prepare
from weakspot.edits.local import WORTH
from weakspot.edits.steps import _pointwise

TOLERANCE = 1e-4  # of the range of the logits


def pasted(images: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
    edited = images.expand(len(tops), -1, -1, -1).clone()
    height, width = patches.shape[2:]
    for number, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        edited[number, :, top : top + height, left : left + width] = patches[number]
    return edited


def everywhere(image: Tensor, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Edits of this size at every corner, along all edges and at some places within."""
    generator = torch.Generator().manual_seed(seed)
    down, along = image.shape[2] - size[0], image.shape[3] - size[1]
    places = {(0, 0), (0, along), (down, 0), (down, along)}
    places |= {(top, 0) for top in range(0, down + 1, 3)} | {(top, along) for top in range(0, down + 1, 3)}
    places |= {(0, left) for left in range(0, along + 1, 3)} | {
        (down, left) for left in range(0, along + 1, 3)
    }
    places |= {(top, left) for top in range(1, down, 4) for left in range(2, along, 5)}
    tops, lefts = torch.tensor(sorted(places)).T
    return tops, lefts, torch.rand(len(tops), image.shape[1], *size, generator=generator)


def largest_error(model: nn.Module, image: Tensor, size: tuple[int, int], windows: bool = True) -> float:
    """Of windows against the brute force, over the range of the logits."""
    tops, lefts, patches = everywhere(image, size)
    with evaluating(model) as classifier:
        prepared = prepare(classifier, image)
        assert prepared.recording is not None, prepared.reason
        edits = Edits(classifier, image, prepared, windows=windows)
        found = edits.logits(torch.zeros_like(tops), tops, lefts, patches)
    with torch.no_grad():
        expected = classifier(pasted(image, tops, lefts, patches))
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut or nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        out = self.inner(maps)
        out += self.shortcut(maps)
        summed: Tensor = F.relu_(out)
        return summed


class Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self.branches], 1)


class Gate(nn.Module):
    """Squeeze and excitation: what an edit does to the mean reaches every site."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.SiLU(), nn.Conv2d(2, channels, 1)
        )

    def forward(self, maps: Tensor) -> Tensor:
        gated: Tensor = maps * self.gate(maps).sigmoid()
        return gated


class ShapedPad(nn.Module):
    """Asymmetric padding, as TensorFlow's "same" with stride two."""

    def forward(self, maps: Tensor) -> Tensor:
        return F.pad(maps, (0, 1, 0, 1))


class Subsampled(nn.Module):
    """The shortcut of the first residual networks: every second site, and more channels of zeros."""

    def forward(self, maps: Tensor) -> Tensor:
        return F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3))


class SiteNorm(nn.Module):
    """A block that sees channels last, as ConvNeXt does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.up, self.down = (
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.Linear(2 * channels, channels),
        )
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, maps: Tensor) -> Tensor:
        sites = self.norm(self.mix(maps).permute(0, 2, 3, 1))
        found: Tensor = maps + (self.scale * self.down(F.gelu(self.up(sites)))).permute(0, 3, 1, 2)
        return found


class RowNorm(nn.Module):
    """Batch normalization of rows, one for each site."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        count, channels, height, width = maps.shape
        rows: Tensor = self.norm(maps.permute(0, 2, 3, 1).reshape(-1, channels))
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def ended(*layers: nn.Module, channels: int, classes: int = 5) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)).eval()


def batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    return norm


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: ended(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), channels=6),
    "batch-norm": lambda: ended(
        nn.Conv2d(3, 4, 3, padding=1), batch_norm(4), nn.ReLU(inplace=True), batch_norm(4), nn.Tanh(), channels=4
    ),
    "residual": lambda: ended(
        nn.Conv2d(3, 4, 3, padding=1),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1))),
        Residual(nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 8, 1, 2)),
        Residual(nn.Conv2d(8, 12, 3, 2, 1), Subsampled()),
        channels=12,
    ),
    "branches": lambda: ended(
        Branches(
            nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 5, padding=2), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)
        ),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        channels=11,
    ),
    "even kernels, uneven strides": lambda: ended(
        nn.Conv2d(3, 4, (2, 4), (2, 1), (0, 2)), nn.ReLU(), nn.Conv2d(4, 4, (1, 3), (3, 2), (0, 1), (1, 2)), channels=4
    ),
    "dilated, grouped": lambda: ended(
        nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3), nn.SiLU(), nn.Conv2d(6, 6, 5, 2, 2, groups=6), channels=6
    ),
    "stride beyond the kernel": lambda: ended(
        nn.Conv2d(3, 4, 1, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, 3, 1), channels=4
    ),
    "asymmetric padding": lambda: ended(ShapedPad(), nn.Conv2d(3, 4, 3, 2), nn.ReLU6(), channels=4),
    "gate": lambda: ended(
        nn.Conv2d(3, 4, 3, padding=1), Gate(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), channels=4
    ),
    "channels last": lambda: ended(nn.Conv2d(3, 4, 3, padding=1), SiteNorm(4), SiteNorm(4), channels=4),
    "batch-norm of rows": lambda: ended(nn.Conv2d(3, 4, 3, padding=1), RowNorm(4), nn.ReLU(), channels=4),
    "group norm, upsampling, prelu": lambda: ended(
        nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(4), nn.GroupNorm(2, 4), nn.Upsample(scale_factor=2), channels=4
    ),
    "transposed": lambda: ended(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, 2), nn.ReLU(), channels=4
    ),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 19 * 23, 5)).eval(),
    "reflected border": lambda: ended(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), channels=4),
}  # fmt: skip


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 19, 23, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (16, 4), (19, 23)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_those_of_the_whole_network(name: str, size: tuple[int, int], image: Tensor) -> None:
    torch.manual_seed(3)
    assert largest_error(NETWORKS[name](), image, size) < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_windows_equal_the_network_for_normalized_gray_and_double(name: str) -> None:
    torch.manual_seed(4)
    network = NETWORKS[name]().double()
    model = Classifier.wrap(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    assert largest_error(model, torch.rand(1, 3, 19, 23), (3, 2)) < 1e-9


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor, tuple[int, int]]:
    """A random network of up to five layers with branches, an image and the size of an edit."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    start = channels = draw(st.sampled_from([1, 3]))
    height, width = draw(st.integers(9, 24)), draw(st.integers(9, 24))

    def convolution(given: int, stride: int | None = None) -> tuple[nn.Module, int]:
        groups = draw(st.sampled_from([1, given]))
        wanted = groups * draw(st.integers(1, 4))
        kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        return (
            nn.Conv2d(
                given,
                wanted,
                kernel,
                stride or (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
                (draw(st.integers(0, 3)), draw(st.integers(0, 3))),
                (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
                groups,
                bias=draw(st.booleans()),
            ),
            wanted,
        )

    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from(["convolution", "max", "average", "norm", "active", "residual", "branch", "pad"])
        )
        if kind == "convolution":
            layer, channels = convolution(channels)
            layers.append(layer)
        elif kind in {"max", "average"}:
            kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
            padding = draw(st.integers(0, kernel // 2))
            pool = nn.MaxPool2d if kind == "max" else nn.AvgPool2d
            layers.append(pool(kernel, stride, padding, ceil_mode=draw(st.booleans())))
        elif kind == "norm":
            layers.append(batch_norm(channels))
        elif kind == "active":
            layers.append(draw(st.sampled_from([nn.ReLU(True), nn.GELU(), nn.Hardswish(), nn.ELU()])))
        elif kind == "residual":
            side = 2 * draw(st.integers(0, 2)) + 1
            layers.append(Residual(nn.Conv2d(channels, channels, side, padding=side // 2)))
        elif kind == "branch":
            layers.append(Branches(nn.Conv2d(channels, 2, 3, padding=1), nn.Identity()))
            channels += 2
        else:
            widths = draw(st.tuples(*[st.integers(0, 2)] * 4))
            layers.append(nn.ZeroPad2d(widths))
    if draw(st.booleans()):
        layers.append(Gate(channels))
    model = ended(*layers, channels=channels, classes=draw(st.integers(2, 4)))
    size = draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    image = torch.rand(1, start, height, width)
    return model, image, size


@given(networks())
@settings(max_examples=60, deadline=None)
def test_any_network_any_edit(case: tuple[nn.Module, Tensor, tuple[int, int]]) -> None:
    model, image, size = case
    try:
        with torch.no_grad():
            logits = model(image)
    except RuntimeError:  # a kernel larger than what is left of the image
        return
    if float(logits.max() - logits.min()) < 1e-3:
        return
    assert largest_error(model, image, size) < TOLERANCE


def test_edits_that_change_nothing_give_the_clean_logits(image: Tensor) -> None:
    model = NETWORKS["residual"]()
    tops, lefts, patches = everywhere(image, (4, 3))
    same = torch.stack(
        [image[0, :, top : top + 4, left : left + 3] for top, left in zip(tops, lefts, strict=True)]
    )
    assert same.shape == patches.shape
    found = LocalEdits(model, image).logits(tops, lefts, same)
    with torch.no_grad():
        torch.testing.assert_close(found, model(image).expand_as(found))


def test_several_images_each_keep_their_own(image: Tensor) -> None:
    torch.manual_seed(0)
    model, images = NETWORKS["residual"](), torch.cat([image, 1 - image, image.flip(3)])
    tops, lefts, patches = everywhere(image, (2, 2))
    owners = torch.arange(len(tops)) % 3
    with evaluating(model) as classifier:
        found = Edits(classifier, images, windows=True).logits(owners, tops, lefts, patches)
    with torch.no_grad():
        for number in range(3):
            ours = owners == number
            alone = model(pasted(images[number : number + 1], tops[ours], lefts[ours], patches[ours]))
            torch.testing.assert_close(found[ours], alone)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("windows", [True, False, None])
def test_batch_size_and_way_change_no_result(batch_size: int, windows: bool | None, image: Tensor) -> None:
    torch.manual_seed(0)
    model = NETWORKS["residual"]()
    tops, lefts, patches = everywhere(image, (1, 1))
    with evaluating(model) as classifier:
        edits = Edits(classifier, image, windows=windows, batch_size=batch_size)
        found = edits.logits(torch.zeros_like(tops), tops, lefts, patches)
        with torch.no_grad():
            torch.testing.assert_close(found, classifier(pasted(image, tops, lefts, patches)))


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_the_way_is_chosen_by_counting_multiplications(
    name: str, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows where they save work; a network of tokens, where they save almost none, takes whole images from the
    first edit on. No clock decides."""
    torch.manual_seed(0)
    model = Tokens().eval() if name == "tokens" else NETWORKS[name]()
    went = []
    own = Edits._part

    def part(self: Edits, by_windows: bool, *rest: Tensor) -> Tensor:
        went.append(by_windows)
        return own(self, by_windows, *rest)

    monkeypatch.setattr(Edits, "_part", part)
    places = torch.arange(16 * 16)
    tops, lefts = places // 16, places % 16
    with evaluating(model) as classifier:
        edits = Edits(classifier, image[:, :, :16, :16], batch_size=4)
        edits.logits(torch.zeros_like(tops), tops, lefts, torch.rand(len(tops), 3, 1, 1))
        recording = edits.prepared.recording
        assert recording is not None
        assert (recording.work_saved[1, 1] >= WORTH) == (name != "tokens")
    assert set(went) == {name != "tokens"}


class Tokens(nn.Module):
    """Eight layers of plain attention over patches of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.values = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        for values in self.values:
            tokens = tokens + values((tokens @ tokens.transpose(1, 2)).softmax(2) @ tokens)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class Choosing(nn.Module):
    """Takes one of two ways by what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = NETWORKS["plain"](), NETWORKS["plain"]()

    def forward(self, images: Tensor) -> Tensor:
        way = self.one if float(images.mean()) > 0.5 else self.other
        found: Tensor = way(images)
        return found


class MapView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = NETWORKS["plain"]()

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.inner(images + 0 * torch.rand_like(images))
        return found


class Overwriting(nn.Module):
    """Writes into a part of a tensor and reads the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NETWORKS["plain"]()

    def forward(self, images: Tensor) -> Tensor:
        copy = images * 1
        copy[:, :, ::2] *= 0.5
        found: Tensor = self.inner(copy)
        return found


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Choosing(), "values of an image"), (MapView(), "random"), (Overwriting(), "part of a tensor")],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_networks_that_cannot_be_recorded_run_themselves(
    model: nn.Module, reason: str, image: Tensor
) -> None:
    edits = LocalEdits(model.eval(), image, batch_size=1)
    assert reason in edits.reason
    tops, lefts, patches = everywhere(image, (3, 3))
    found = edits.logits(tops, lefts, patches)
    with torch.no_grad():
        one_by_one = [model(edited[None]) for edited in pasted(image, tops, lefts, patches)]
    torch.testing.assert_close(found, torch.cat(one_by_one))


def test_statistics_of_a_batch_are_why_edits_run_whole(image: Tensor) -> None:
    """Other images in a batch change the logits, and the reason says so."""
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    edits = LocalEdits(ended(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), channels=4), image)
    assert edits.reason == "its batch normalization takes its statistics from the images of a batch"


def test_hooks_see_every_edit(image: Tensor) -> None:
    model, seen = NETWORKS["plain"](), []
    model[0].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[index]
    edits = LocalEdits(model, image, batch_size=1)
    assert "hooks" in edits.reason
    seen.clear()
    edits.logits(*everywhere(image, (1, 1)))
    assert len(seen) == len(everywhere(image, (1, 1))[0])


def test_the_model_and_the_tensors_come_back_untouched(image: Tensor) -> None:
    torch.manual_seed(0)
    model = NETWORKS["batch-norm"]()
    model[1].train()  # type: ignore[index]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, random = image.clone(), torch.get_rng_state()
    tops, lefts, patches = everywhere(image, (2, 2))
    kept = patches.clone()
    with pytest.warns(ModelWarning, match="parts of .* were in train mode"):
        edits = LocalEdits(model, image[0])
    edits.logits(tops, lefts, patches)
    assert torch.equal(image, before)
    assert torch.equal(patches, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert model[1].training  # type: ignore[index]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    image.zero_()  # a later change of the caller's tensor changes nothing either
    again = edits.logits(tops, lefts, patches)
    torch.testing.assert_close(again, LocalEdits(model, before).logits(tops, lefts, patches))


def test_bad_input_gets_one_sentence(image: Tensor) -> None:
    edits = LocalEdits(NETWORKS["plain"](), image)
    one, patch = torch.zeros(1, dtype=torch.long), torch.rand(1, 3, 2, 2)
    for arguments, words in {
        (one + 18, one, patch): "tops must be between 0 and 17 for these patches, got 18",
        (one, one - 1, patch): "lefts must be between 0 and 21 for these patches, got -1",
        (
            one.float(),
            one,
            patch,
        ): "tops must be an integer tensor (1,), one for each patch, got (1,) torch.float32",
        (one, one, patch[:, :2]): "patches must be a float tensor (M, 3, h, w), got (1, 2, 2, 2)",
        (
            one,
            one,
            torch.rand(1, 3, 20, 2),
        ): "patches must be between 1 x 1 and 19 x 23, the image, got 20 x 2",
        (one, one, patch * torch.nan): "patches must be finite floats",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            edits.logits(*arguments)
    with pytest.warns(ImageWarning, match="patches span"):
        edits.logits(one, one, patch + 3)
    with pytest.raises(ValueError, match=r"image must be one image, .* got 2 images"):
        LocalEdits(NETWORKS["plain"](), torch.rand(2, 3, 8, 8))
    assert edits.logits(one[:0], one[:0], patch[:0]).shape == (0, 5)


def test_a_model_left_in_train_mode_is_evaluated_with_a_warning(image: Tensor) -> None:
    model = NETWORKS["batch-norm"]().train()
    with pytest.warns(ModelWarning, match="train mode"):
        edits = LocalEdits(model, image)
    assert model.training
    found = edits.logits(*everywhere(image, (1, 1)))  # a second warning would be an error here
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(pasted(image, *everywhere(image, (1, 1)))))


def test_progress_ends_with_one(image: Tensor) -> None:
    shares: list[float] = []
    LocalEdits(NETWORKS["plain"](), image).logits(*everywhere(image, (1, 1)), progress=shares.append)
    assert shares[-1] == 1
    assert shares == sorted(shares)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_channel_in_many_edits_at_once(channels: int) -> None:
    """Torch's convolution is wrong for one channel with channels-last strides, in large batches only."""
    torch.manual_seed(0)
    model = ended(nn.Conv2d(channels, 1, 2, (1, 2)), nn.Conv2d(1, 1, 2, (1, 2)), channels=1)
    assert largest_error(model, torch.rand(1, channels, 29, 31), (1, 1)) < TOLERANCE


class Built(nn.Module):
    """A convolution, then whatever the test is about."""

    def __init__(
        self, ending: Callable[[nn.Module, Tensor, Tensor], Tensor], features: int = 4 * 19 * 23
    ) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(features, 3)
        self.ending = ending

    def forward(self, images: Tensor) -> Tensor:
        return self.ending(self.head, self.convolution(images), images)


ENDINGS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Tensor], int]] = {
    "generalized mean pooling": (lambda h, y, x: h(y.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)), 4),
    "root of a sum of squares": (lambda h, y, x: h(y.relu().pow(2).sum((2, 3)).sqrt()), 4),
    "a constant of the batch's size": (lambda h, y, x: h(y.flatten(1)) + torch.zeros(len(y), 3), 4 * 19 * 23),
    "a slice of the batch": (lambda h, y, x: h(y[: len(x)].flatten(1)), 4 * 19 * 23),
    "a map broadcast along rows": (
        lambda h, y, x: h((y * torch.sigmoid(99 * F.avg_pool2d(y, (1, 23)))).flatten(1)), 4 * 19 * 23
    ),
    "padding channels last": (
        lambda h, y, x: h(F.pad(y.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1)).mean((1, 2))), 4
    ),
    "counting": (lambda h, y, x: h((y > 0).sum((2, 3)).float()), 4),
    "a count of bright values decides": (
        lambda h, y, x: h((2 * y if len((x > 0.99).nonzero()) else y).flatten(1)), 4 * 19 * 23
    ),
    "a mask decides": (lambda h, y, x: h((2 * y if x[x > 0.99].numel() else y).flatten(1)), 4 * 19 * 23),
    "numpy decides": (
        lambda h, y, x: h((2 * y if x.detach().numpy().max() > 0.99 else y).flatten(1)), 4 * 19 * 23
    ),
    "a list decides": (
        lambda h, y, x: h((2 * y if max(x.flatten().tolist()) > 0.99 else y).flatten(1)), 4 * 19 * 23
    ),
    "an argument is written into": (
        lambda h, y, x: torch.mul(h(y.mean((2, 3))), 2.0, out=torch.empty(0)), 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (8, 9)], ids=str)
@pytest.mark.parametrize("name", ENDINGS)
def test_whatever_the_ending_the_answer_is_the_networks(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(5)
    ending, features = ENDINGS[name]
    model = Built(ending, features).eval().requires_grad_(False)
    image = torch.rand(1, 3, 19, 23) * 0.02
    image[:, :, 6:12, 8:14] = torch.rand(1, 3, 6, 6)  # what the logits rest on, and edits take away
    tops, lefts, patches = everywhere(image, size)
    patches[::3], patches[1::3] = 0, 1
    with torch.no_grad():
        expected = torch.cat([model(one[None]) for one in pasted(image, tops, lefts, patches)])
    with evaluating(model) as classifier:
        edits = Edits(classifier, image, windows=True, batch_size=None if "decides" not in name else 1)
        found = edits.logits(torch.zeros_like(tops), tops, lefts, patches)
    assert "decides" not in name or "values of an image" in edits.prepared.reason
    assert float((found - expected).abs().max() / (expected.max() - expected.min())) < TOLERANCE


def test_maps_of_one_column_do_not_end_the_interpreter() -> None:
    model = nn.Sequential(
        nn.AvgPool2d(5, 3), nn.Conv2d(6, 2, 2, (1, 2), (0, 3), 2), nn.Flatten(), nn.Linear(6, 3)
    )
    assert largest_error(model.eval(), torch.rand(1, 6, 11, 7), (1, 1)) < TOLERANCE


def test_a_recording_keeps_the_weights_of_its_time(image: Tensor) -> None:
    torch.manual_seed(6)
    model = NETWORKS["flat"]()
    with evaluating(model) as classifier:
        edits = Edits(classifier, image, windows=True)
    tops, lefts, patches = everywhere(image, (2, 2))
    before = edits.logits(torch.zeros_like(tops), tops, lefts, patches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(edits.logits(torch.zeros_like(tops), tops, lefts, patches), before)


class RowByRow(nn.Module):
    """A recurrent network that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(9, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rows(images[:, 0])[0][:, -1])
        return logits


def test_a_recurrent_network_gets_whole_passes() -> None:
    """Replaying its layer with another number of images ended the process."""
    model, image = RowByRow().eval(), torch.rand(1, 1, 7, 9)
    places, patches = torch.arange(5), torch.rand(5, 1, 2, 2)
    edited = image.repeat(5, 1, 1, 1)
    for number in range(5):
        edited[number, :, number : number + 2, number : number + 2] = patches[number]
    found = LocalEdits(model, image).logits(places, places, patches)
    torch.testing.assert_close(found, model(edited).detach())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits_and_the_recorder_is_not_compiled() -> None:
    code = (
        "import torch, weakspot\n"
        "from weakspot.zoo import build\n"
        "model = build('two_conv', classes=3, channels=3, size=(32, 32), seed=0).eval()\n"
        "image, places, patches = torch.rand(3, 32, 32), torch.arange(5), torch.rand(5, 3, 2, 2)\n"
        "expected = weakspot.LocalEdits(model, image).logits(places, places, patches)\n"
        "compiled = torch.compile(model, backend='eager')\n"
        "compiled(image[None])\n"
        "logits = weakspot.LocalEdits(compiled, image).logits(places, places, patches)\n"
        "assert torch.equal(logits, expected)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "recording.py" not in result.stderr


@pytest.mark.parametrize(("count", "dilation"), [(1, [1, 1]), (2, [2, 2])])
def test_a_pointwise_convolution_is_dilated_only_where_that_is_faster(
    count: int, dilation: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(torch, "convolution", lambda *arguments: given.append(arguments[5]))
    # Recorded with more images than there are now, or fewer.
    for recorded in ([1, 1], [2, 2]):
        _pointwise(torch.ones(count, 2, 3, 3), torch.ones(4, 2, 1, 1), None, [1, 1], [0, 0], recorded)
    assert given == [dilation, dilation]
