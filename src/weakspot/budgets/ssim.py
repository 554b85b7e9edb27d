"""The perceptual budget: balls of structural similarity."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot._checks import check_choice, is_number
from weakspot.budgets.base import MEMO

C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, doi 10.1109/TIP.2003.819861, for images in [0, 1]
MODES = ("global", "local")
TINY = 1e-20
CLOSE = 1e-6  # points nearer to each other than this are one
ROUNDS = 10  # of alternating projections
MARGIN = 1 - 4e-6  # what rounding in float32 may add to a size is left free


@dataclass(frozen=True)
class SSIM:
    """How much structure may change, measured where the eye does: against each patch's own mean and contrast.

    The quality ball of Pochimireddy et al. 2021 (arXiv 2106.12731), re-specified from its abstract with the normalized
    distances of Brunet et al. 2012 (doi 10.1109/TIP.2011.2173206); patch size, ragged borders and both modes
    are this project's own. On every non-overlapping patch of n pixels of every channel, x = mean + centered part:

        d1^2 = (change of mean)^2 / (mean^2 + changed mean^2 + c1)
        d2^2 = |change of centered part|^2 / (|centered part|^2 + |changed centered part|^2 + (n - 1) c2)
        SSIM = (1 - d1^2) (1 - d2^2)

    Attributes:
        eps: 0 to below 1. In mode "global" the mean of d1^2 + d2^2 over patches and channels is at most `eps`, so
            that the mean SSIM of patches is at least 1 - eps; in mode "local" both are, in every patch.
        patch: side of a patch in pixels. Patches at the right and lower border are cut where it does not divide.
        level: share of their own best step that patches' means take in mode "global"; 1 is the steepest step for the
            distances above. These do not see the edge that a change of mean leaves between two patches; the eye
            and sliding windows do.
        mode: "global" or "local". Locally every patch ends on its bound and the map of change is flat: an
            attack, but no evidence of where a network is weak.
    """

    eps: float
    patch: int = field(default=8, kw_only=True)
    mode: str = field(default="global", kw_only=True)
    level: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        if not is_number(self.eps) or not 0 <= self.eps < 1:
            raise ValueError(f"SSIM eps is {self.eps!r}; accepted is 0 to below 1, what may be lost of 1")
        if not isinstance(self.patch, int) or self.patch < 2:
            raise ValueError(f"SSIM patch is {self.patch}; accepted is a whole number of pixels, at least 2")
        check_choice("SSIM mode", self.mode, MODES)
        if not is_number(self.level) or not 0 < self.level <= 1:
            raise ValueError(f"SSIM level is {self.level!r}; accepted is a share above 0, up to 1")

    @property
    def steps_to_optimum(self) -> bool:
        """Whether `ascend` gives the way from the perturbation to the best one, no step of the budget's size."""
        return self.mode == "local"

    def project(self, perturbation: Tensor, images: Tensor, *, region: Tensor | None = None) -> Tensor:
        """Into region and box, then straight toward the image until the true budget is met, exactly.

        In mode "local" projections on the patches' balls alternate with region and box before that; where neither
        cuts the ball the result is the nearest point.
        """
        if self.eps == 0:
            return torch.zeros_like(perturbation)
        patches = _patches(images, self.patch)
        if self.mode == "global":
            inside = _in_box(perturbation, images, region)
            return inside.mul_(self._share_within(patches, inside))
        # Where the box does not cut the ball's nearest point, that is the answer; elsewhere they alternate.
        nearest = self._nearest(patches, patches.split(perturbation))
        inside = patches.split(_in_box(patches.join(nearest), images, region))
        cut = (inside - nearest).abs_().amax((3, 5)) >= CLOSE
        if bool(cut.any()):
            start = patches.split(_in_box(perturbation, images, region))
            allowed = None if region is None else patches.split(region.expand_as(images))
            by_patch(inside)[cut] = self._alternated(patches, start, allowed, cut)
        return patches.join(inside * self._shares_within(patches, inside))

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:
        """Steepest step; sites without gradient are not to change.

        Mode "local": from where we are to the exact maximizer of the linear objective. Mode "global": the gradient
        preconditioned by each patch's denominators, which are taken where the perturbed image now is, the part of the
        patches' means times `level`, scaled to spend the whole budget under them.
        """
        patches = _patches(images, self.patch)
        largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        slope, changed = patches.split(gradient / largest), patches.split(perturbation)
        step = (self._step_locally if self.mode == "local" else self._step_globally)(patches, slope, changed)
        return patches.join(step)

    def _step_locally(self, patches: _Patches, slope: Tensor, changed: Tensor) -> Tensor:
        ball, interval = _Ball(patches, self.eps), _Interval(patches, self.eps)
        slope_sum = patches.total(slope)
        centered = patches.within(slope - slope_sum / patches.count)
        length = patches.total(centered.square()).sqrt()
        mean = patches.total(changed) / patches.count
        centered *= ball.radius / length.clamp(min=TINY)
        centered += ball.middle
        centered -= patches.within(changed - mean)
        mean = torch.where(slope_sum != 0, interval.middle + interval.radius * slope_sum.sign() - mean, 0)
        return centered.mul_((length > 0).to(centered)).add_(patches.within(mean.expand_as(centered)))

    def _step_globally(self, patches: _Patches, slope: Tensor, changed: Tensor) -> Tensor:
        """Inverse of the patch's quadratic form on the sites with gradient (Sherman and Morrison 1950) times it."""
        mean = patches.total(changed) / patches.count
        energy = patches.total(patches.within(changed - mean).add_(patches.centered).square_())
        structure = patches.energy + energy + patches.steady
        level = patches.mean.square() + (patches.mean + mean).square() + C1
        movable = slope.sign().abs_()
        moved = patches.total(movable)
        slope_mean = patches.total(slope) / moved.clamp(min=1)
        # Written so that nothing cancels: the deviation from the mean slope, and the mean slope's own step.
        common = 1 - moved / patches.count + moved * structure / (level * patches.count.square())
        of_mean = slope_mean / common.clamp(min=TINY)
        step = (slope - slope_mean).add_(self.level * of_mean).mul_(structure).mul_(movable)
        spent_on_means = patches.total(slope) * of_mean * structure
        if patches.has_single:  # one pixel has no structure
            step = torch.where(patches.count == 1, self.level * level * slope, step)
            spent_on_means = torch.where(
                patches.count == 1, level * patches.total(slope).square(), spent_on_means
            )
        # What the two parts spend adds up, and the means' goes with the square of their share.
        spent = (slope * step).sum((1, 2, 3, 4, 5), keepdim=True)
        spent -= self.level * (1 - self.level) * spent_on_means.sum((1, 2, 3, 4, 5), keepdim=True)
        spent = spent / patches.mean.shape[1:].numel()
        return step.mul_(torch.where(spent > 0, (self.eps / spent.clamp(min=TINY)).sqrt(), 0))

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:
        patches = _patches(images, self.patch)
        level, structure = patches.distances(patches.split(perturbation))
        if self.mode == "local":
            return torch.maximum(level, structure).amax((1, 2, 3, 4, 5))
        return (level + structure).mean((1, 2, 3, 4, 5))

    def _alternated(self, patches: _Patches, start: Tensor, allowed: Tensor | None, cut: Tensor) -> Tensor:
        """(M, patch, patch) changes of the M patches that `cut` (N, C, rows, columns) marks, on box and region."""
        ball, interval = _Ball(patches, self.eps), _Interval(patches, self.eps)
        images, valid = patches.split(patches.images), patches.valid.expand_as(start)
        pixels, inside, valid, middle = (by_patch(t)[cut] for t in (images, start, valid, ball.middle))
        count = by_patch(patches.count.expand_as(ball.radius))[cut]
        radius, center, width = (by_patch(t)[cut] for t in (ball.radius, interval.middle, interval.radius))
        locked = None if allowed is None else ~by_patch(allowed)[cut]
        done = torch.zeros_like(radius, dtype=torch.bool)
        for _ in range(ROUNDS):
            mean = inside.sum((1, 2), keepdim=True) / count
            centered = (inside - mean) * valid - middle
            length = centered.square().sum((1, 2), keepdim=True).sqrt()
            centered = middle + centered * (radius / length.clamp(min=TINY)).clamp(max=1)
            mean = center + (mean - center).clamp(-width, width)
            nearest = centered + mean * valid
            after = (pixels + nearest).clamp_(0, 1).sub_(pixels)
            if locked is not None:
                after.masked_fill_(locked, 0)
            inside = torch.where(done, inside, after)
            done |= (after - nearest).abs().amax((1, 2), keepdim=True) < CLOSE
            if bool(done.all()):
                break
        return inside

    def _nearest(self, patches: _Patches, changed: Tensor) -> Tensor:
        """Each patch's change on its ball and interval, or inside."""
        ball, interval = _Ball(patches, self.eps), _Interval(patches, self.eps)
        mean = patches.total(changed) / patches.count
        centered = patches.within(changed - mean).sub_(ball.middle)
        length = patches.total(centered.square()).sqrt()
        centered.mul_((ball.radius / length.clamp(min=TINY)).clamp(max=1)).add_(ball.middle)
        mean = interval.middle + (mean - interval.middle).clamp(-interval.radius, interval.radius)
        return centered.add_(patches.within(mean.expand_as(centered)))

    def _shares_within(self, patches: _Patches, changed: Tensor) -> Tensor:
        """The largest share of each patch's change that is within its bounds: the root of t^2 a + 2 t b = c."""
        mean = patches.total(changed) / patches.count
        centered = patches.within(changed - mean)
        eps = self.eps * MARGIN
        fraction = torch.ones_like(mean)
        for square, product, bound in (
            (
                patches.total(centered.square()),
                patches.total(patches.centered * centered),
                2 * patches.energy + patches.steady,
            ),
            (mean.square(), patches.mean * mean, 2 * patches.mean.square() + C1),
        ):
            a, b, c = (1 - eps) * square, -eps * product, eps * bound
            root = c / (b + (b.square() + a * c).sqrt()).clamp(min=TINY)
            fraction = torch.minimum(fraction, torch.where(a + 2 * b <= c, 1, root))
        return fraction.clamp(0, 1)

    def _share_within(self, patches: _Patches, perturbation: Tensor) -> Tensor:
        """(N, 1, 1, 1) the largest share of the perturbation found within the budget.

        What is spent grows nearly with the square of the share: steps of that law alternate with bisection.
        """
        precision = torch.float32 if perturbation.device.type == "mps" else torch.float64
        changed = patches.split(perturbation)
        mean = patches.total(changed) / patches.count
        centered = patches.within(changed - mean)
        product = patches.total(patches.centered * centered).to(precision)
        square = patches.total(centered.square_()).to(precision)
        bound = (2 * patches.energy + patches.steady).to(precision)
        mean, level = mean.to(precision), patches.mean.to(precision)

        def spent(fraction: Tensor) -> Tensor:
            structure = (
                fraction.square()
                * square
                / (bound + fraction * (2 * product + fraction * square)).clamp(min=TINY)
            )
            levels = (fraction * mean).square() / (level.square() + (level + fraction * mean).square() + C1)
            return (structure + levels).mean((1, 2, 3, 4, 5), keepdim=True)

        limit = self.eps * MARGIN
        fraction = torch.ones_like(mean[:, :1, :1, :, :1]).view(-1, 1, 1, 1, 1, 1)
        low, high = torch.zeros_like(fraction), fraction
        for number in range(80):
            now = spent(fraction)
            low, high = torch.where(now <= limit, fraction, low), torch.where(now > limit, fraction, high)
            if bool((low >= high * (1 - 1e-6)).all()):
                break
            guess = fraction * (limit * (1 - 1e-7) / now.clamp(min=TINY)).sqrt()
            lawful = (guess > low) & (guess < high) & (number % 2 == 0)
            fraction = torch.where(lawful, guess, (low + high) / 2)
            fraction = torch.where(low >= high * (1 - 1e-6), low, fraction)
        return low.to(perturbation.dtype).view(-1, 1, 1, 1)

    def __str__(self) -> str:
        return f"{self.eps:g} SSIM ({self.mode}, patches of {self.patch})"


def _patches(images: Tensor, patch: int) -> _Patches:
    """The images' patches, kept with images that an attack has marked as staying what they are."""
    memo: dict[int, _Patches] | None = getattr(images, MEMO, None)
    if memo is None:
        return _Patches(images, patch)
    if patch not in memo:
        memo[patch] = _Patches(images.detach(), patch)
    return memo[patch]


class _Patches:
    """Images (N, C, H, W) as patches (N, C, rows, patch, columns, patch), zeros beyond the border, and their moments.

    Attributes:
        valid: 1 where there are pixels, broadcasting over patches.
        count: pixels in each patch.
        steady: (count - 1) c2.
        whole: whether no patch is cut at the border.
        has_single: whether a patch of one pixel is left in the corner.
    """

    def __init__(self, images: Tensor, patch: int) -> None:
        self.patch = patch
        self.height, self.width = images.shape[2:]
        self.rows, self.columns = -(-self.height // patch), -(-self.width // patch)
        self.whole = not (self.height % patch or self.width % patch)
        self.has_single = self.height % patch == self.width % patch == 1
        self.valid = self.split(torch.ones_like(images[:1, :1]))
        self.count = self.total(self.valid)
        self.steady = (self.count - 1) * C2
        self.images = images

    @cached_property
    def mean(self) -> Tensor:
        return self.total(self.split(self.images)) / self.count

    @cached_property
    def centered(self) -> Tensor:
        return self.within(self.split(self.images) - self.mean)

    @cached_property
    def energy(self) -> Tensor:
        return self.total(self.centered.square())

    def split(self, images: Tensor) -> Tensor:
        below, beside = self.rows * self.patch - self.height, self.columns * self.patch - self.width
        if below or beside:
            images = F.pad(images, (0, beside, 0, below))
        return images.reshape(*images.shape[:2], self.rows, self.patch, self.columns, self.patch)

    def join(self, patches: Tensor) -> Tensor:
        whole = patches.reshape(*patches.shape[:2], self.rows * self.patch, self.columns * self.patch)
        return whole[:, :, : self.height, : self.width]

    def total(self, patches: Tensor) -> Tensor:
        return patches.sum(5, keepdim=True).sum(3, keepdim=True)

    def within(self, patches: Tensor) -> Tensor:
        """Zero beyond the border."""
        return patches if self.whole else patches * self.valid

    def distances(self, changed: Tensor) -> tuple[Tensor, Tensor]:
        """d1^2 and d2^2 of every patch and channel."""
        mean = self.total(changed) / self.count
        centered = self.within(changed - mean)
        energy = self.total((self.centered + centered).square())
        level = mean.square() / (self.mean.square() + (self.mean + mean).square() + C1)
        bound = (self.energy + energy + self.steady).clamp(min=TINY)
        return level, self.total(centered.square()) / bound


def by_patch(patches: Tensor) -> Tensor:
    """(N, C, rows, columns, patch, patch), a view of (N, C, rows, patch, columns, patch)."""
    return patches.permute(0, 1, 2, 4, 3, 5)


class _Ball:
    """d2^2 <= eps, as middle and radius of the changes of the centered part."""

    def __init__(self, patches: _Patches, eps: float) -> None:
        self.middle = patches.centered * (eps / (1 - eps))
        square = patches.energy * (eps * (2 - eps) / (1 - eps) ** 2) + patches.steady * (eps / (1 - eps))
        self.radius = square.sqrt()


class _Interval:
    """d1^2 <= eps, as middle and half width of the changes of the mean."""

    def __init__(self, patches: _Patches, eps: float) -> None:
        self.middle = patches.mean * (eps / (1 - eps))
        square = patches.mean.square() * (eps * (2 - eps) / (1 - eps) ** 2) + C1 * (eps / (1 - eps))
        self.radius = square.sqrt()


def _in_box(perturbation: Tensor, images: Tensor, region: Tensor | None) -> Tensor:
    inside = (images + perturbation).clamp_(0, 1).sub_(images)
    return inside if region is None else torch.where(region, inside, 0)
