"""Pixel sweep: every pixel in every color of a list, exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weakspot._checks import unknown_choice
from weakspot._progress import Progress, ProgressOption, part
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.pixel_search import color_grid, in_gradient_order, paint
from weakspot.edits import Edits, Prepared, prepare
from weakspot.logits import margin as margin_of
from weakspot.pairs import Pairs
from weakspot.statistics.number_format import counted, percent

BLOCK = 8192  # edits whose logits are in memory at once
EARLY_BLOCK = 256  # candidates of each image between two checks which images are fooled
GROUP_SITES = 64 * 32 * 32  # sites of the images whose maps are in memory at once
# Best sites of an image that are tried in a grid of so many levels per channel.
REFINED_SITES, REFINED_LEVELS = 8, 5
COLORS = ("corners", "refined")


@dataclass(frozen=True, eq=False, repr=False)
class PixelSweep:
    """What one changed pixel can do, at every pixel.

    Attributes:
        margin: (N, H, W) smallest logit margin z_label - max other z over colors; below 0 where one pixel is enough,
            infinite where no color was tried.
        color: (N, C, H, W) the color with that margin; the image's own where none was tried.
        predicted: (N, H, W) class predicted under that color; where none was tried, the class of the image itself.
        n_forward: (N,) edits evaluated.
    """

    margin: Tensor
    color: Tensor
    predicted: Tensor
    n_forward: Tensor

    def __repr__(self) -> str:
        weak = (self.margin < 0).flatten(1).double().mean(1)
        return (
            f"PixelSweep({counted(len(weak))}, margin {tuple(self.margin.shape)}, {int(self.success.sum())} fooled by "
            f"one pixel, {percent(float(weak.mean()))} of pixels enough, {int(self.n_forward.sum())} edits)"
        )

    @property
    def success(self) -> Tensor:
        """(N,) bool, whether one pixel is enough anywhere."""
        return (self.margin < 0).flatten(1).any(1)

    def pairs(self, images: Tensor, labels: Tensor) -> Pairs:
        """The images (N, C, H, W) and each with its most harmful pixel; targets are the classes predicted then."""
        best = self.margin.flatten(1).argmin(1)[:, None]
        colors = (
            self.color.flatten(2).gather(2, best[:, None].expand(-1, images.shape[1], -1)).transpose(1, 2)
        )
        targets = self.predicted.flatten(1).gather(1, best)[:, 0]
        clean = images.detach().to(colors).clamp(0, 1)
        return Pairs(clean, paint(clean, best, colors), labels, targets)


def pixel_sweep(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    colors: str | Tensor = "corners",
    region: Tensor | None = None,
    stop_early: bool = False,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> PixelSweep:
    """Change every pixel to every color, one at a time, and record the smallest margin.

    Among the given colors this finds everything that a search for one pixel (`few_pixel`) may miss. Edits go through
    `LocalEdits`, which recomputes only what a pixel reaches. Shared arguments are described in `AttackOptions`.

    Args:
        colors: "corners" of the color cube, 2^C of them; "refined", which continues with a grid of 5^C colors at the 8
            best pixels of each image that no corner fools; or colors (K, C) in [0, 1].
        stop_early: whether an image leaves as soon as a pixel fools the model; candidates then come in the order that
            the gradient suggests, and most of a fooled image's map stays untried.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).eval()
    >>> images = torch.full((1, 3, 4, 4), 0.5)
    >>> sweep = pixel_sweep(model, images, torch.tensor([0]))
    >>> sweep.margin.shape, sweep.color.shape, int(sweep.n_forward)
    (torch.Size([1, 4, 4]), torch.Size([1, 3, 4, 4]), 128)
    """
    with attack_context(
        model, images, labels, AttackOptions(region=region, batch_size=batch_size, progress=progress)
    ) as problem:
        palette = _palette(colors, problem.clean)
        group = max(1, GROUP_SITES // (images.shape[2] * images.shape[3]))
        parts = torch.arange(len(problem), device=problem.clean.device).split(group)
        with problem.fused_model():
            logits = problem.logits(problem.clean)[1]
            prepared = prepare(problem.classifier, problem.clean[:1])
            sweeps = []
            for number, rows in enumerate(parts):
                search = _Search(problem.select(rows), logits[rows], prepared, batch_size)
                own_progress = part(problem.progress, number, number + 1, len(parts))
                search.sweep(palette, own_progress, stop_early=stop_early)
                if colors == "refined":
                    search.refine()
                sweeps.append(search.maps())
    return PixelSweep(*(torch.cat(fields) for fields in zip(*sweeps, strict=True)))


def _palette(colors: str | Tensor, images: Tensor) -> Tensor:
    """(K, C) colors, on the images' device."""
    channels = images.shape[1]
    if isinstance(colors, str):
        if colors not in COLORS:
            raise ValueError(unknown_choice("colors", colors, COLORS, remedy=f"or a tensor (K, {channels})"))
        return color_grid(2, images)
    if not isinstance(colors, Tensor) or colors.ndim != 2 or colors.shape[1] != channels or not len(colors):
        got = tuple(colors.shape) if isinstance(colors, Tensor) else type(colors).__name__
        raise ValueError(f"colors must be corners, refined or a float tensor (K, {channels}), got {got}")
    if not bool(((colors >= 0) & (colors <= 1)).all()):
        raise ValueError(
            f"colors must be between 0 and 1, like the images, got {float(colors.min()):g} to {float(colors.max()):g}"
        )
    return colors.detach().to(images)


class _Search:
    """The best color so far of every pixel of some images."""

    def __init__(self, problem: Problem, logits: Tensor, prepared: Prepared, batch_size: int | None) -> None:
        count, channels, self.height, self.width = problem.clean.shape
        self.problem = problem
        self.edits = Edits(problem.classifier, problem.clean, prepared, batch_size=batch_size)
        sites = self.height * self.width
        self.margin = torch.full((count * sites,), torch.inf, device=logits.device, dtype=problem.clean.dtype)
        self.color = problem.clean.flatten(2).transpose(1, 2).reshape(-1, channels).clone()
        self.predicted = logits.argmax(1).repeat_interleave(sites)
        self.n_forward = torch.zeros_like(problem.labels)

    def sweep(self, palette: Tensor, progress: Progress | None, *, stop_early: bool) -> None:
        """Try every color at every pixel of the region."""
        allowed = self.problem.region.flatten(1)
        if stop_early:
            order, inside = in_gradient_order(self.problem, self.problem.clean, palette)
            count, block = inside.sum(1), EARLY_BLOCK
        else:
            inside = allowed.repeat_interleave(len(palette), 1)
            # A stable sort puts the candidates of the region first and leaves them in reading order.
            order = (~inside).byte().argsort(dim=1, stable=True)
            count, block = inside.sum(1), max(1, BLOCK // len(order))
        total = int(count.max())
        active = torch.arange(len(order), device=order.device)
        for start in range(0, total, block):
            chosen = order[active, start : start + block]
            places = torch.arange(start, start + chosen.shape[1], device=order.device)
            rows, columns = (places < count[active][:, None]).nonzero().unbind(1)
            candidates = chosen[rows, columns]
            self._try(active[rows], candidates // len(palette), palette[candidates % len(palette)])
            if stop_early:
                active = active[~self._fooled()[active]]
                if not len(active):
                    break
            if progress is not None:
                progress(min(1.0, (start + block) / total))

    def refine(self) -> None:
        """Try a grid of colors at the best pixels of images that are not fooled yet."""
        palette = color_grid(REFINED_LEVELS, self.problem.clean)
        active = (~self._fooled()).nonzero()[:, 0]
        margins = self.margin.view(-1, self.height * self.width)[active]
        best = margins.topk(min(REFINED_SITES, margins.shape[1]), largest=False)
        rows, ranks = best.values.isfinite().nonzero().unbind(1)
        owners, sites = active[rows], best.indices[rows, ranks]
        for tried in torch.arange(len(owners), device=owners.device).split(max(1, BLOCK // len(palette))):
            self._try(
                owners[tried].repeat_interleave(len(palette)),
                sites[tried].repeat_interleave(len(palette)),
                palette.repeat(len(tried), 1),
            )

    def _fooled(self) -> Tensor:
        return (self.margin.view(-1, self.height * self.width) < 0).any(1)

    def _try(self, owners: Tensor, sites: Tensor, colors: Tensor) -> None:
        """Try one pixel each (M,), in colors (M, C), and store what lowers a pixel's margin, the first among equals."""
        if not len(owners):
            return
        patches = colors[:, :, None, None]
        logits = self.edits.logits(owners, sites // self.width, sites % self.width, patches)
        margins = margin_of(logits, self.problem.labels[owners]).to(self.margin)
        self.n_forward.index_add_(0, owners, torch.ones_like(owners))
        # Several edits of one call may share a pixel: the lowest margin wins, then the first edit.
        keys = owners * self.height * self.width + sites
        lowest = self.margin.scatter_reduce(0, keys, margins, "amin")
        winners = ((margins == lowest[keys]) & (margins < self.margin[keys])).nonzero()[:, 0]
        first = torch.full_like(self.predicted, len(keys)).scatter_reduce(0, keys[winners], winners, "amin")
        changed = (first < len(keys)).nonzero()[:, 0]
        chosen = first[changed]
        self.margin = lowest
        self.color[changed], self.predicted[changed] = colors[chosen], logits.argmax(1)[chosen]

    def maps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (len(self.problem), self.height, self.width)
        color = self.color.view(*shape, -1).permute(0, 3, 1, 2).contiguous()
        return self.margin.view(shape), color, self.predicted.view(shape), self.n_forward
