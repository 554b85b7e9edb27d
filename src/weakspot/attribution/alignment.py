"""Alignment: where the cells of a layer's map lie in the image.

Resizing a map as if its cells tiled the image can misplace them, because padding shifts them. In ResNet-18 the last map
at 224 pixels is drawn 15.5 pixels down and right of the centers of its receptive fields. Those centers follow from
stride, kernel, padding and dilation of each operation on the way (Araujo et al. 2019, "Computing receptive fields of
convolutional neural networks", doi 10.23915/distill.00021). But a trained network can undo the shift with its weights,
and networks padded like TensorFlow's have undone most of it. There the center of the effective receptive field (Luo et
al. 2016, arXiv 1701.04128), measured from gradients, is the better place.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils.weak import WeakIdKeyDictionary

from weakspot._random import float32_noise
from weakspot._state import DispatchMode
from weakspot.attribution.layers import Layer
from weakspot.classifier import Classifier, default_batch
from weakspot.edits.steps import Arguments, pair


@dataclass(frozen=True)
class Axis:
    """Along one axis, cell i is centered on pixel `offset + stride * i` (pixel centers at 0, 1, 2, ...).

    `reach` is how far from its center a cell can see, in pixels.
    """

    offset: float = 0.0
    stride: float = 1.0
    reach: float = field(default=0.5, compare=False)

    def windowed(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Axis:
        """After a sliding kernel, whose center is half its extent behind its first site; that begins in the padding."""
        half = self.stride * (kernel - 1) * dilation / 2
        return Axis(self.offset + half - self.stride * padding, self.stride * stride, self.reach + half)

    def transposed(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Axis:
        """After a transposed convolution: the inverse of `windowed`, on a finer grid."""
        before = self.stride / stride
        half = before * (kernel - 1) * dilation / 2
        return Axis(self.offset - half + before * padding, before, self.reach + half)

    def sliced(self, start: int, step: int) -> Axis:
        """After a slice; a negative start is padding."""
        return Axis(self.offset + self.stride * start, self.stride * step, self.reach)

    def resized(self, before: int, after: int) -> Axis:
        """After resizing from so many cells to so many, both covering the same pixels."""
        stride = self.stride * before / after
        # Both grids begin at the same border, so the first center moves by half of what a cell grows.
        return Axis(self.offset + (stride - self.stride) / 2, stride, self.reach + max(stride, self.stride))


Grid = tuple[Axis, Axis]


def receptive_grid(classifier: Classifier, image: Tensor, layer: Layer) -> Grid | None:
    """Centers of the receptive fields of the layer's cells, vertical and horizontal; None if they cannot be derived.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W).
        layer: where the map is made.
    """
    if layer.layout.kind != "channels_first":
        return None
    image = classifier.filled(image)
    grids = _Grids(image)
    with layer.watched() as seen, grids:
        classifier(image)
    grid: Grid | None = grids.known.get(seen[-1])
    return grid


def effective_grid(classifier: Classifier, image: Tensor, layer: Layer) -> Grid | None:
    """Centers of the effective receptive fields: the strides of `receptive_grid`, the offsets measured.

    The energy of the gradient of the map's central cells is averaged over fixed noise images, coarse and fine, so that
    the result depends only on the network and the image's size; its centroid is where those cells look.

    Args:
        classifier: in eval mode, gradients on.
        image: (1, C, H, W), of which only the size matters.
        layer: where the map is made.
    """
    if layer.layout.kind != "channels_first":
        return None
    size, cells = image.shape[2:], (layer.layout.height, layer.layout.width)
    known = receptive_grid(classifier, image, layer)
    # Without known receptive fields, cells that tile the image.
    strides = [axis.stride for axis in known] if known else [a / b for a, b in zip(size, cells, strict=True)]
    # The middle cell or two with a neighbor on each side, as far as there are any: far from the padding.
    central = [slice((count - 1) // 2 - (count > 2), count // 2 + 1 + (count > 2)) for count in cells]
    energy = torch.zeros(size, device=image.device)
    probes = _probes(image)
    for batch in probes.split(classifier.fixed_batch or default_batch(image)):
        point = classifier.filled(batch).clone().requires_grad_()
        with layer.watched() as seen:
            classifier(point)
        cells_seen = seen[-1][: len(batch), :, central[0], central[1]]
        # Lengths instead of squares: a cell of high activation counts no more than its neighbors.
        looked_at = (cells_seen.square().sum(1) + 1e-12).sqrt().sum()
        (gradient,) = torch.autograd.grad(looked_at, point)
        # As fractions: a probe that excites the cells more counts no more than the others.
        each = gradient[: len(batch)].square().sum(1)
        energy += (each / each.sum((1, 2), keepdim=True).clamp(min=1e-30)).sum(0)
    if not bool(energy.any()):
        return known
    axes = []
    reaches = [axis.reach for axis in known] if known else [float("inf")] * 2
    for along, stride, cell, reach in zip(
        (energy.sum(1), energy.sum(0)), strides, central, reaches, strict=True
    ):
        pixels = torch.arange(len(along), device=along.device)
        centroid = float((along * pixels).sum() / along.sum())
        # The centroid belongs to the middle of the central cells; the first cell lies that many strides before it.
        axes.append(Axis(centroid - stride * (cell.start + cell.stop - 1) / 2, stride, reach))
    return axes[0], axes[1]


def _probes(image: Tensor) -> Tensor:
    """Noise images of the image's size, two of each grain; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    height, width = image.shape[2:]
    grains = [grain for grain in (1, 4, 16) if grain == 1 or min(height, width) >= 2 * grain]
    shapes = [(2, image.shape[1], -(-height // grain), -(-width // grain)) for grain in grains]
    noise = [float32_noise(generator, *shape) for shape in shapes]
    return torch.cat([F.interpolate(n, (height, width), mode="bilinear") for n in noise]).to(image)


def place(maps: Tensor, size: tuple[int, int], grid: Grid | None, *, unseen: float = 0.0) -> Tensor:
    """Draw maps (N, M, h, w) over the image by bilinear interpolation: (N, M, height, width).

    With a grid, each cell's value lies at the center of its receptive field. The outermost values extend as far as
    their cells can see, and `unseen` fills the rest. Without a grid, cells tile the image.
    """
    if grid is None:
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)
    positions, seen = [], []
    for axis, pixels, cells in zip(grid, size, maps.shape[2:], strict=True):
        pixel = torch.arange(pixels, device=maps.device, dtype=maps.dtype)
        cell = (pixel - axis.offset) / axis.stride
        positions.append(2 * cell / max(cells - 1, 1) - 1)  # for grid_sample: -1 the first cell, 1 the last
        # Negative between the first and the last center, otherwise the distance to the nearer of the two.
        beyond = torch.maximum(axis.offset - pixel, pixel - axis.offset - axis.stride * (cells - 1))
        seen.append(beyond <= max(axis.reach, axis.stride))
    # grid_sample takes (x, y): across first.
    down, across = torch.meshgrid(*positions, indexing="ij")
    where = torch.stack([across, down], -1).expand(len(maps), -1, -1, -1)
    placed = F.grid_sample(maps, where, mode="bilinear", padding_mode="border", align_corners=True)
    return placed.masked_fill(~(seen[0][:, None] & seen[1][None]), unseen)


class _Grids(DispatchMode):
    """Follows the image's grid through every operation of a forward pass."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        # By identity, because tensors compare value by value; weakly, so that activations can be freed.
        self.known: MutableMapping[Tensor, Grid] = WeakIdKeyDictionary({image: (Axis(), Axis())})

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        # Max pooling and batch norm return several tensors, of which the map is the first.
        made = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(made, Tensor) and made.ndim == 4:
            leaves = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            sources = [tensor for tensor in leaves if tensor in self.known]
            if sources:
                grid = self._after(func.overloadpacket.__name__, args, sources, made)
                if grid is not None:
                    self.known[made] = grid
        return output

    def _after(self, name: str, args: Arguments, sources: list[Tensor], made: Tensor) -> Grid | None:
        rows, columns = self.known[sources[0]]
        sizes = sources[0].shape[2:], made.shape[2:]
        # args[6] of aten::convolution says whether it is transposed.
        if name == "convolution" and args[6]:
            return rows.transposed(*_convolution(args)[0]), columns.transposed(*_convolution(args)[1])
        if name in _WINDOWS:
            vertical, horizontal = _WINDOWS[name](args)
            return rows.windowed(*vertical), columns.windowed(*horizontal)
        if name.endswith(("_pad_nd", "_pad2d")):
            padding = [*args[1], 0, 0]  # the last axis first
            left, top = padding[0], padding[2]
            return rows.sliced(-top, 1), columns.sliced(-left, 1)
        if name == "slice" and args[1] in {2, 3, -1, -2}:
            # aten::slice(input, dim, start, end, step); the last arguments may be missing.
            start, _, step = (*args[2:], None, None, None)[:3]
            size = sources[0].shape[args[1]]
            move = (max(start + size, 0) if start and start < 0 else start or 0, step or 1)
            return (rows.sliced(*move), columns) if args[1] in {2, -2} else (rows, columns.sliced(*move))
        if "adaptive" in name or "upsample" in name:
            return rows.resized(sizes[0][0], sizes[1][0]), columns.resized(sizes[0][1], sizes[1][1])
        # Anything else that leaves height and width as they are works site by site.
        same_size = [self.known[tensor] for tensor in sources if tensor.shape[2:] == made.shape[2:]]
        return _mean(same_size) if same_size else None


def _mean(grids: list[Grid]) -> Grid | None:
    """The grid where branches meet: the mean of their offsets, if their strides agree."""
    strides = {(rows.stride, columns.stride) for rows, columns in grids}
    if len(strides) != 1:
        return None
    ((down, across),) = strides
    count = len(grids)
    return (
        Axis(sum(rows.offset for rows, _ in grids) / count, down, max(rows.reach for rows, _ in grids)),
        Axis(sum(columns.offset for _, columns in grids) / count, across, max(c.reach for _, c in grids)),
    )


Window = tuple[int, int, int, int]  # kernel, stride, padding, dilation


def _convolution(args: Arguments) -> list[Window]:
    # aten::convolution(input, weight, bias, stride, padding, dilation, transposed, ...)
    kernel, stride, padding, dilation = args[1].shape[2:], *(pair(args[i]) for i in (3, 4, 5))
    return list(zip(kernel, stride, padding, dilation, strict=True))


def _pool(args: Arguments) -> list[Window]:
    """By default the stride is the kernel, and there is no padding and no dilation."""
    kernel = pair(args[1])
    stride = pair(args[2]) if len(args) > 2 and args[2] else kernel
    padding = pair(args[3]) if len(args) > 3 else (0, 0)
    return list(zip(kernel, stride, padding, (1, 1), strict=True))


def _max_pool(args: Arguments) -> list[Window]:
    dilation = pair(args[4]) if len(args) > 4 else (1, 1)
    return [(*window[:3], step) for window, step in zip(_pool(args), dilation, strict=True)]


_WINDOWS = {"convolution": _convolution, "max_pool2d_with_indices": _max_pool, "avg_pool2d": _pool}
