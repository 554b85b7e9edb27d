"""Alignment against brute force: which pixels, when poisoned with NaN, poison a cell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import NETWORKS, untouched
from weakspot.attribution import class_activation
from weakspot.attribution.alignment import Axis, Grid, effective_grid, place, receptive_grid
from weakspot.attribution.layers import find_layer
from weakspot.classifier import evaluating


class Padded(nn.Module):
    def __init__(self, *padding: int, mode: str = "constant") -> None:
        super().__init__()
        self.padding = padding
        self.mode = mode

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images, self.padding, mode=self.mode)


class Indexed(nn.Module):
    def __init__(self, rows: slice, columns: slice) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, self.rows, self.columns]


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.branch(images) + self.shortcut(images))


class Joined(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([branch(images) for branch in self.branches], 1).sum(1, keepdim=True)


def conv(
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int = 1,
) -> nn.Conv2d:
    return nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "3 s2 p1": lambda: conv(3, 2, 1),
    "5 d2 p2": lambda: conv(5, 1, 2, 2),
    "even kernel": lambda: conv(4, 2, 1),
    "two even kernels": lambda: nn.Sequential(conv(2, 2), conv(4, 2, 1)),
    "no padding": lambda: nn.Sequential(conv(5), conv(3, 2), conv(3)),
    "sides differ": lambda: nn.Sequential(conv((3, 5), (1, 2), (0, 2)), conv((5, 1), (2, 1), (1, 0))),
    "same, odd": lambda: conv(5, 1, "same", 2),
    "same, even": lambda: conv(4, 1, "same"),
    "padded as TensorFlow does": lambda: nn.Sequential(
        Padded(0, 1, 0, 1), conv(3, 2), Padded(1, 2, 1, 2), conv(5, 2)
    ),
    "padded on one side": lambda: nn.Sequential(Padded(3, 0, 0, 2), conv(3, 2)),
    "cropped by padding": lambda: nn.Sequential(Padded(-2, 0, -3, -1), conv(3)),
    "reflected": lambda: nn.Sequential(Padded(2, 1, 1, 2, mode="reflect"), conv(3, 2)),
    "replicated": lambda: nn.Sequential(Padded(2, 1, 1, 2, mode="replicate"), conv(3, 2)),
    "max pool": lambda: nn.Sequential(conv(3, 1, 1), nn.MaxPool2d(3, 2, 1), conv(3, 1, 1)),
    "max pool, stride left out": lambda: nn.Sequential(nn.MaxPool2d(3), conv(3, 1, 1)),
    "max pool, up to the border": lambda: nn.Sequential(nn.MaxPool2d(2, 2, ceil_mode=True), conv(3)),
    "max pool, dilated": lambda: nn.Sequential(nn.MaxPool2d(3, 1, dilation=2), conv(3)),
    "average pool": lambda: nn.Sequential(nn.AvgPool2d(2), conv(3, 1, 1), nn.AvgPool2d(3, 2, 1)),
    "every other": lambda: nn.Sequential(conv(3, 1, 1), Indexed(slice(None, None, 2), slice(1, None, 2))),
    "cropped": lambda: nn.Sequential(conv(3), Indexed(slice(4, -3), slice(2, None))),
    "cropped from the far side": lambda: nn.Sequential(Indexed(slice(-14, None), slice(-16, -1)), conv(3)),
    "residual": lambda: Residual(nn.Sequential(conv(3, 1, 1), nn.ReLU(), conv(3, 1, 1))),
    "residual with a strided shortcut": lambda: nn.Sequential(
        conv(3, 2, 1),
        Residual(nn.Sequential(conv(3, 2, 1), nn.ReLU(inplace=True), conv(3, 1, 1)), conv(1, 2)),
    ),
    "branches joined": lambda: Joined(conv(1), conv(3, 1, 1), nn.Sequential(conv(3, 1, 1), conv(5, 1, 2))),
    "norms and activations": lambda: nn.Sequential(
        conv(3, 2, 1),
        nn.BatchNorm2d(1),
        nn.GELU(),
        Residual(conv(1), nn.Identity()),
        nn.Hardswish(inplace=True),
        conv(3),
    ),
    "enlarged": lambda: nn.Sequential(conv(3, 2, 1), nn.Upsample(scale_factor=2), conv(3, 1, 1)),
    "transposed": lambda: nn.Sequential(conv(3, 2, 1), nn.ConvTranspose2d(1, 1, 4, 2, 1, bias=False)),
}


def positive(module: nn.Module) -> nn.Module:
    """All weights one, so that no two paths cancel."""
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    return module.eval()


def poisoned_by(body: nn.Module, size: tuple[int, int], axis: int) -> Tensor:
    """Bool (pixels, cells): whether NaN in a row (axis 0) or column (1) of the image reaches a row or column."""
    images = torch.rand(size[axis], 1, *size, generator=torch.Generator().manual_seed(0))
    for line, image in enumerate(images):
        image[0].select(axis, line).fill_(torch.nan)
    with torch.no_grad():
        made = body(images)[:, 0].isnan()
    reached: Tensor = made.any(2 - axis)
    return reached


def centers(body: nn.Module, size: tuple[int, int], axis: int) -> dict[int, float]:
    """Center of the pixels that reach each cell, of the cells whose pixels all lie well inside the image."""
    reached = poisoned_by(body, size, axis)
    found, most = {}, int(reached.sum(0).max())
    for cell in range(reached.shape[1]):
        pixels = reached[:, cell].nonzero()[:, 0]
        if len(pixels) == most and pixels[0] > 0 and pixels[-1] < size[axis] - 1:
            found[cell] = float(pixels[0] + pixels[-1]) / 2
    return found


def grid_of(body: nn.Module, size: tuple[int, int], measure: Callable[..., Grid | None]) -> Grid | None:
    """The grid of the map that `body` makes of one-channel images, read as its users read it."""
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).eval()
    image = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    with untouched(model, image), evaluating(model) as classifier:
        layer = find_layer(classifier, image, "0")
        assert layer is not None
        return measure(classifier, image, layer)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [name for name in BODIES if name not in {"enlarged", "transposed"}])
def test_a_cell_is_centered_on_the_pixels_that_reach_it(name: str, frozen: bool) -> None:
    body, size = positive(BODIES[name]()).requires_grad_(not frozen), (40, 43)
    grid = grid_of(body, size, receptive_grid)
    assert grid is not None
    for axis in (0, 1):
        expected = centers(body, size, axis)
        assert len(expected) >= 3
        for cell, center in expected.items():
            assert grid[axis].offset + grid[axis].stride * cell == pytest.approx(center, abs=1e-6)


@pytest.mark.parametrize("name", ["enlarged", "transposed"])
def test_where_enlarged_cells_share_their_pixels_the_grid_is_off_by_less_than_one_of_them_or_unknown(
    name: str,
) -> None:
    body, size = positive(BODIES[name]()), (40, 43)
    grid = grid_of(body, size, receptive_grid)
    for axis in (0, 1):
        for cell, center in centers(body, size, axis).items():
            assert grid is None or abs(grid[axis].offset + grid[axis].stride * cell - center) <= 1


def resnet_stem(channels: int = 1) -> nn.Sequential:
    """The strides, kernels and paddings of ResNet-18 up to its last map."""
    body = nn.Sequential(
        nn.Conv2d(1, channels, 7, 2, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )
    for _ in range(3):
        body.append(nn.Conv2d(channels, channels, 3, 2, 1, bias=False))
        body.append(nn.ReLU(inplace=True))
    return body


def test_resnets_cells_lie_on_multiples_of_32_which_is_15_and_a_half_pixels_from_plain_resizing() -> None:
    body = positive(resnet_stem())
    grid = grid_of(body, (224, 224), receptive_grid)
    assert grid == (Axis(0, 32), Axis(0, 32))
    for cell, center in centers(body, (224, 33), 0).items():
        assert center == 32 * cell
    tiled = 32 * torch.arange(7) + (32 - 1) / 2  # where resizing 7 cells to 224 pixels puts their centers
    assert (tiled - torch.tensor([grid[0].offset + grid[0].stride * cell for cell in range(7)])).tolist() == [
        15.5
    ] * 7


def test_a_registered_map_peaks_on_the_only_thing_in_the_image() -> None:
    body = positive(resnet_stem())
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).eval()
    nn.init.ones_(model.get_submodule("3").weight)  # type: ignore[arg-type]
    images = torch.zeros(1, 1, 224, 160)
    images[..., 126:131, 62:67] = 1  # around (128, 64)
    for alignment, off in (("receptive_field", 0), ("effective", 0), ("resize", 15.5)):
        found = class_activation(model, images, torch.tensor([0]), alignment=alignment)[0, 0]
        peak = (found >= found.max() * (1 - 1e-4)).nonzero().float().mean(0)
        assert (peak - torch.tensor([128.0, 64.0])).tolist() == pytest.approx([off, off], abs=1)


def test_networks_without_channels_first_maps_have_no_grid() -> None:
    model, images = NETWORKS["tokens, not square"]()
    with evaluating(model) as classifier:
        layer = find_layer(classifier, images[:1])
        assert layer is not None
        assert receptive_grid(classifier, images[:1], layer) is None
        assert effective_grid(classifier, images[:1], layer) is None
    classes = torch.tensor([0, 1, 2])
    resized, registered = (
        class_activation(model, images, classes, alignment=alignment)
        for alignment in ("resize", "receptive_field")
    )
    assert torch.equal(resized, registered)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("body", "size"),
    [
        (lambda: resnet_stem(8), (224, 160)),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 8, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, 1, 1),
                nn.ReLU(),
                nn.Conv2d(8, 8, 5, 2, 2),
            ),
            (48, 40),
        ),
        (lambda: nn.Sequential(nn.Conv2d(1, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)), (48, 40)),
    ],
    ids=["ResNet", "plain", "patches"],
)
def test_random_symmetric_networks_look_where_their_receptive_fields_are(
    body: Callable[[], nn.Module], size: tuple[int, int], seed: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = body()
    for weight in built.parameters():
        if weight.ndim == 4:  # a kernel that equals its mirror images prefers no direction
            flips = (weight.flip(2), weight.flip(3), weight.flip(2, 3))
            weight.data = (weight + sum(flips)).detach() / 4
    model = nn.Sequential(built, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    image = torch.zeros(1, 1, *size)
    with evaluating(model) as classifier:
        layer = find_layer(classifier, image, "0")
        assert layer is not None
        theory, measured = receptive_grid(classifier, image, layer), effective_grid(classifier, image, layer)
    assert theory is not None
    assert measured is not None
    for expected, found in zip(theory, measured, strict=True):
        assert found.stride == expected.stride
        assert abs(found.offset - expected.offset) < 2


@pytest.mark.parametrize(("down", "across"), [(0, 0), (0, 6), (6, 1), (3, 3)])
def test_a_network_that_uses_one_tap_of_its_kernel_looks_through_that_tap(down: int, across: int) -> None:
    body = nn.Conv2d(1, 1, 7, 4, 3, bias=False)
    nn.init.zeros_(body.weight)
    body.weight.data[0, 0, down, across] = 1
    grid = grid_of(body, (48, 40), effective_grid)
    assert grid is not None
    assert [axis.stride for axis in grid] == [4, 4]
    assert [axis.offset for axis in grid] == pytest.approx([down - 3, across - 3], abs=1)


def test_what_a_cell_looks_at_does_not_depend_on_the_picture(pooling: tuple[nn.Module, Tensor]) -> None:
    model, images = pooling
    with evaluating(model) as classifier:
        layer = find_layer(classifier, images[:1])
        assert layer is not None
        grids = [effective_grid(classifier, image, layer) for image in (*images.split(1), 0 * images[:1])]
    assert all(grid == grids[0] for grid in grids)


@pytest.mark.parametrize(
    ("rows", "columns"), [(Axis(3, 8), Axis(0, 5)), (Axis(-2, 4), Axis(7, 1)), (Axis(0, 1), Axis(1, 2))]
)
def test_each_cells_own_value_lies_at_its_center(rows: Axis, columns: Axis) -> None:
    size = (40, 30)
    maps = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    placed = place(maps, size, (rows, columns))
    checked = 0
    for i in range(6):
        for j in range(5):
            y, x = int(rows.offset + rows.stride * i), int(columns.offset + columns.stride * j)
            if 0 <= y < size[0] and 0 <= x < size[1]:
                torch.testing.assert_close(placed[:, :, y, x], maps[:, :, i, j], rtol=0, atol=1e-4)
                checked += 1
    assert checked >= 20


def test_placed_maps_are_straight_between_centers_and_flat_beyond_them() -> None:
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 11.0]]]])
    placed = place(maps, (20, 12), (Axis(4.5, 8, reach=99), Axis(2, 4, reach=99)))[0, 0]
    down = ((torch.arange(20.0) - 4.5) / 8).clamp(0, 1)[:, None]
    across = ((torch.arange(12.0) - 2) / 4).clamp(0, 1)[None]
    expected = (1 - down) * (1 + 2 * across) + down * (5 + 6 * across)
    torch.testing.assert_close(placed, expected, rtol=0, atol=1e-5)


def test_nothing_is_claimed_of_pixels_that_no_cell_can_see() -> None:
    placed = place(torch.ones(1, 1, 2, 2), (40, 6), (Axis(10, 4, reach=7), Axis(1, 2, reach=7)))[0, 0]
    assert placed[:, 0].nonzero()[:, 0].tolist() == list(range(3, 22))
    assert bool((placed[3:22] == 1).all())


def test_a_single_cell_fills_the_image() -> None:
    assert torch.equal(
        place(torch.full((1, 1, 1, 1), 2.5), (5, 4), (Axis(2, 8), Axis(1, 8))), torch.full((1, 1, 5, 4), 2.5)
    )


def test_without_a_grid_cells_tile_the_image() -> None:
    maps = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps, (24, 30), mode="bilinear", align_corners=False)
    assert torch.equal(place(maps, (24, 30), None), expected)
    # The grid that stands for tiling gives the same within a cell of the border.
    tiled = place(maps, (24, 30), (Axis(1.5, 4), Axis(2.5, 6)))
    torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-5)
