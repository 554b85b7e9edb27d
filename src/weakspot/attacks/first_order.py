"""How much must change inside a place, estimated from gradients alone.

To first order, a change d lowers the margin z_label - z_t by minus the sum of G * d, where G is the margin's gradient.
A value can only move until it is black or white, so a change of at most e lowers the margin by at most
sum |G| min(e, room), where room is the distance to the end of the box in the direction that lowers the margin. The
estimate is the smallest e for which this reaches the margin, the minimum over several competing classes t. It is exact
for a linear network, and costs one gradient per class whatever the number of places.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weakspot._checks import check_choice
from weakspot.attacks.context import Problem
from weakspot.logits import margin

CLASSES = 5  # competing classes whose gradients are taken, those with the largest logits
NORMS = ("linf", "l2")
ELEMENTS = 2**22  # values that are solved at once, which bounds the memory
REACHED = 1e-9  # relative: a sum this near to the margin has reached it
ROUNDS = 200  # of Newton's method, which needs about ten


@dataclass(frozen=True, eq=False)
class Linearization:
    """A classifier to first order around images.

    Attributes:
        clean: (N, C, H, W) the images.
        classes: (N, T) the competing classes, largest logit first.
        margins: (N, T) z_label - z_class at the images; at most zero if the class wins already.
        directions: (N, T, C, H, W) minus the gradient of each margin, zero outside the region.
    """

    clean: Tensor
    classes: Tensor
    margins: Tensor
    directions: Tensor

    def __repr__(self) -> str:
        return f"Linearization({len(self.clean)} images, {self.classes.shape[1]} competing classes)"

    @property
    def correct(self) -> Tensor:
        """(N,) bool, whether the image needs a change to fool."""
        return self.margins[:, 0] >= 0

    @property
    def moving(self) -> Tensor:
        """(N,) bool, whether any gradient is other than zero."""
        return self.directions.flatten(1).any(1)

    @property
    def room(self) -> Tensor:
        """(N, T, C, H, W) how far each value can move along its direction before it leaves [0, 1]."""
        clean = self.clean[:, None]
        return torch.where(self.directions > 0, 1 - clean, clean)


def linearize(problem: Problem, classes: int = CLASSES) -> Linearization:
    """Take the gradients of the margins against the competing classes with the largest logits, or against the target.

    Args:
        problem: the images, and the region in which they may change.
        classes: how many competing classes; all others if the classifier has fewer.
    """
    logits = problem.logits(problem.clean)[1]
    others = logits.scatter(1, problem.labels[:, None], -torch.inf)
    highest = others.topk(min(classes, logits.shape[1] - 1), 1).indices
    if problem.targets is not None:
        highest = problem.targets[:, None]
    margins, directions = [], []
    for targets in highest.unbind(1):
        # `margin` with a class is z_label - z_class; the attacks' own targeted loss compares with every class.
        descent = replace(problem, loss_targets=targets).loss_and_gradient(problem.clean, margin)
        margins.append(descent.values)
        directions.append(descent.direction)
    return Linearization(problem.clean, highest, torch.stack(margins, 1), torch.stack(directions, 1))


def cell_numbers(size: tuple[int, int], grid: int) -> tuple[Tensor, tuple[int, int]]:
    """Cells of nearly equal size that cover an image of (height, width).

    Returns:
        The number (H, W) of each site's cell, row by row, and the numbers (gh, gw) of rows and columns: `grid`, or the
        image's own if that is smaller.

    >>> cell_numbers((2, 5), 2)[0]
    tensor([[0, 0, 0, 1, 1],
            [2, 2, 2, 3, 3]])
    """
    # Where a length is not divisible, cells differ by one pixel.
    rows, columns = (torch.arange(length) * min(grid, length) // length for length in size)
    across = int(columns[-1]) + 1
    return rows[:, None] * across + columns, (int(rows[-1]) + 1, across)


def estimate_cells(linear: Linearization, grid: int, norm: str = "linf") -> Tensor:
    """(N, gh, gw) the estimate for each cell of a grid; infinite where no change inside the cell is enough."""
    clean = linear.clean
    numbers, shape = cell_numbers((clean.shape[2], clean.shape[3]), grid)
    # Sites cell by cell, as `_estimate` needs them.
    owners, sites = numbers.flatten().to(clean.device).sort(stable=True)
    images = torch.arange(len(clean), device=clean.device)
    count = shape[0] * shape[1]
    sizes = _estimate(
        linear,
        images.repeat_interleave(len(sites)),
        sites.repeat(len(clean)),
        (images[:, None] * count + owners).flatten(),
        images.repeat_interleave(count),
        norm,
    )
    return sizes.amin(1).view(-1, *shape)


def estimate_places(linear: Linearization, masks: Tensor, norm: str = "linf") -> Tensor:
    """The estimate for any places.

    Args:
        linear: of N images.
        masks: bool (N, M, 1, H, W) or (1, M, 1, H, W), the sites of each place; places may overlap.
        norm: "linf" or "l2".

    Returns:
        (N, M, T) one size per competing class, infinite where no change inside the place is enough to first order.
    """
    masks = masks.expand(len(linear.clean), -1, -1, -1, -1).flatten(2)
    # Image by image and place by place, as `_estimate` needs them.
    images, places, sites = masks.nonzero(as_tuple=True)
    count = masks.shape[1]
    of_places = torch.arange(len(masks), device=masks.device).repeat_interleave(count)
    sizes = _estimate(linear, images, sites, images * count + places, of_places, norm)
    return sizes.view(len(masks), count, -1)


def _estimate(
    linear: Linearization, images: Tensor, sites: Tensor, owners: Tensor, of_places: Tensor, norm: str
) -> Tensor:
    """(P, T) sizes of places that hold sites (S,) of images (S,), sorted by place.

    Args:
        linear: of all images.
        images: (S,) the image of each site.
        sites: (S,) its place in the flat image.
        owners: (S,) the number of the place that holds it, ascending.
        of_places: (P,) the image of each place.
        norm: "linf" or "l2".
    """
    check_choice("norm", norm, NORMS)
    strength, room = linear.directions.abs().flatten(3), linear.room.flatten(3)
    margins = linear.margins[of_places]
    sizes = torch.zeros_like(margins)
    per_site = strength.shape[1] * strength.shape[2]
    for part, places in _parts(owners, len(of_places), max(1, ELEMENTS // per_site)):
        # Advanced indices on both sides of slices come first: (S, T, C).
        chosen = (images[part], slice(None), slice(None), sites[part])
        sizes[places] = _solve(
            strength[chosen], room[chosen], owners[part] - places.start, margins[places], norm
        )
    return sizes


def _parts(owners: Tensor, count: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Slices of sites and of the places that they make up, of about `limit` sites each."""
    ends = torch.bincount(owners, minlength=count).cumsum(0).tolist()
    first = start = 0
    for place, end in enumerate(ends):
        # A part ends before the place that would make it too long, so that a place is never divided.
        if place + 1 == count or ends[place + 1] - start > limit:
            yield slice(start, end), slice(first, place + 1)
            first, start = place + 1, end


def _solve(strength: Tensor, room: Tensor, owners: Tensor, margins: Tensor, norm: str) -> Tensor:
    """Solve sum |G| min(r e, room) = margin for e in each place, then measure that change.

    The best change of L-infinity size e moves each value by min(e, room); that of least L2 length moves it by
    min(e |G|, room), by the Lagrange condition. Either sum is concave and piecewise linear in e, so Newton's steps from
    zero never pass the solution and end on the piece that contains it: the result is exact, without sorting the rooms.

    Args:
        strength: (S, T, C) |G|.
        room: (S, T, C).
        owners: (S,) place of each site.
        margins: (P, T).
        norm: "linf" or "l2".

    Returns:
        (P, T) sizes: zero where the margin is not positive, infinite where the sum never reaches it.
    """
    # The sums are over up to 150,000 values; MPS has no float64.
    precise = torch.float32 if strength.device.type == "mps" else torch.float64
    strength, room, needed = strength.to(precise), room.to(precise), margins.to(precise)
    rate = strength if norm == "l2" else torch.ones_like(strength)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(needed).index_add_(0, owners, values.sum(2))

    size = torch.zeros_like(needed)
    for _ in range(ROUNDS):
        wanted = size[owners][:, :, None] * rate
        missing = needed - total(strength * torch.minimum(wanted, room))
        # Values that have used their room no longer move.
        slope = total(strength * rate * (wanted < room))
        moving = (missing > REACHED * needed.abs()) & (slope > 0)
        if not bool(moving.any()):
            break
        size = torch.where(moving, size + missing / slope.clamp(min=torch.finfo(precise).tiny), size)
    change = torch.minimum(size[owners][:, :, None] * rate, room)
    if norm == "l2":
        size = total(change.square()).sqrt()
    beyond = (missing > REACHED * needed.abs()) & (slope == 0)  # all values have used their room
    return torch.where(beyond, torch.inf, size).to(margins)
