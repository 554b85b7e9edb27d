"""The perceptual budget: balls of structural similarity, in closed form for each patch."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from weakspot._checks import check_choice, check_count, is_number, with_plain_numbers
from weakspot.budgets.base import PreparedBudget
from weakspot.budgets.patches import C1, TINY, Patches, by_patch

MODES = ("global", "local")
CLOSE = 1e-6  # points nearer to each other than this count as equal
ROUNDS = 10  # of alternating projections
MARGIN = 1 - 4e-6  # room for what rounding in float32 may add to a distance
ALL_BUT_IMAGES = (1, 2, 3, 4, 5)  # axes of split images


@dataclass(frozen=True)
class SSIM:
    """How much structure may change, measured against each patch's own mean and contrast.

    The quality ball of Pochimireddy et al. 2021 (arXiv 2106.12731), re-specified from its abstract with the normalized
    distances of Brunet et al. 2012 (doi 10.1109/TIP.2011.2173206); patch size, ragged borders and both modes are this
    project's own. On every non-overlapping patch of n pixels of every channel, x = mean + centered part:

        d1^2 = (change of mean)^2 / (mean^2 + changed mean^2 + c1)
        d2^2 = |change of centered part|^2 / (|centered part|^2 + |changed centered part|^2 + (n - 1) c2)
        SSIM = (1 - d1^2) (1 - d2^2)

    Attributes:
        eps: from 0 to below 1. In mode "global" the mean of d1^2 + d2^2 over patches and channels is at most `eps`, so
            the mean SSIM of patches is at least 1 - eps. In mode "local" each of d1^2 and d2^2 is, in every patch.
        patch: side of a patch in pixels. Patches at the right and lower border are smaller if it does not divide them.
        level: in mode "global", the fraction of their own best step that the patches' means take; 1 is the steepest
            step for the distances above. Those do not see the edge that a change of mean leaves between two patches;
            the eye and sliding windows do.
        mode: "global" or "local". In mode "local" every patch ends on its bound and the map of change is flat: an
            attack, but no evidence of where a network is weak.
    """

    eps: float
    patch: int = field(default=8, kw_only=True)
    mode: str = field(default="global", kw_only=True)
    level: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        if not is_number(self.eps) or not 0 <= self.eps < 1:
            raise ValueError(f"eps must be at least 0 and below 1, the loss of SSIM, got {self.eps!r}")
        check_count("patch", self.patch, least=2)
        check_choice("mode", self.mode, MODES)
        if not is_number(self.level) or not 0 < self.level <= 1:
            raise ValueError(f"level must be a fraction above 0 and at most 1, got {self.level!r}")

    def prepare(self, images: Tensor) -> PreparedBudget:
        """Bind the budget to images; the moments of their patches are then computed once."""
        patches = Patches(images, self.patch)
        return _LocalSSIM(self, patches) if self.mode == "local" else _GlobalSSIM(self, patches)

    def project(self, perturbation: Tensor, images: Tensor, *, region: Tensor | None = None) -> Tensor:
        """Bring into region and box, then straight toward the image until the budget is met exactly.

        In mode "local", projections on the patches' balls first alternate with region and box; if neither cuts the
        ball, the result is the nearest point.
        """
        return self.prepare(images).project(perturbation, region)

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:
        """Return the steepest step.

        Mode "local": from the perturbation to the exact maximizer of the linear objective, which may move sites without
        gradient. Mode "global": the gradient preconditioned by each patch's denominators at the perturbed image, with
        the part of the patches' means multiplied by `level`, scaled to spend the whole budget under them; sites without
        gradient do not change.
        """
        return self.prepare(images).steepest_step(gradient, perturbation)

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:
        return self.prepare(images).distance(perturbation)

    def __str__(self) -> str:
        return f"{self.eps:g} SSIM ({self.mode}, patches of {self.patch})"


class _GlobalSSIM:
    """SSIM in mode "global": one bound for the mean of d1^2 + d2^2 over all patches of an image."""

    steps_to_optimum = False

    def __init__(self, budget: SSIM, patches: Patches) -> None:
        self.eps, self.level, self.patches = budget.eps, budget.level, patches

    def project(self, perturbation: Tensor, region: Tensor | None = None) -> Tensor:
        if self.eps == 0:
            return torch.zeros_like(perturbation)
        inside = self.patches.in_box(perturbation, region)
        return inside.mul_(self._fraction_within(inside))

    def steepest_step(self, gradient: Tensor, perturbation: Tensor) -> Tensor:
        """Multiply the gradient by the inverse of the patch's quadratic form, on the sites with gradient.

        With denominators frozen where the image is, d1^2 + d2^2 is quadratic in the change; its matrix is a multiple of
        the identity plus a multiple of the all-ones matrix, inverted after Sherman and Morrison 1950.
        """
        patches = self.patches
        slope = patches.slope(gradient)
        level, structure = patches.denominators(*patches.parts(patches.split(perturbation)))
        movable = slope.sign().abs_()
        moved = patches.total(movable)
        slope_mean = patches.total(slope) / moved.clamp(min=1)
        # Written so that nothing cancels: the deviation from the mean slope, and the mean slope's own step.
        # The matrix is I / S + a 11^T with S = structure, L = level, n = count and a = 1 / (n^2 L) - 1 / (n S). On the
        # k = moved sites that may change, Sherman and Morrison divide by 1 + k S a, which is `common`.
        common = 1 - moved / patches.count + moved * structure / (level * patches.count.square())
        of_mean = slope_mean / common.clamp(min=TINY)
        step = (slope - slope_mean).add_(self.level * of_mean).mul_(structure).mul_(movable)
        spent_on_means = patches.total(slope) * of_mean * structure
        if patches.has_single:  # one pixel has no structure
            single = patches.count == 1
            step = torch.where(single, self.level * level * slope, step)
            spent_on_means = torch.where(single, level * patches.total(slope).square(), spent_on_means)
        # What the means spend is quadratic in `level`, but slope * step contains `level` only once.
        spent = (slope * step).sum(ALL_BUT_IMAGES, keepdim=True)
        spent -= self.level * (1 - self.level) * spent_on_means.sum(ALL_BUT_IMAGES, keepdim=True)
        spent = spent / patches.mean.shape[1:].numel()
        return patches.join(step.mul_(torch.where(spent > 0, (self.eps / spent.clamp(min=TINY)).sqrt(), 0)))

    def distance(self, perturbation: Tensor) -> Tensor:
        level, structure = self.patches.distances(self.patches.split(perturbation))
        return (level + structure).mean(ALL_BUT_IMAGES)

    def _fraction_within(self, perturbation: Tensor) -> Tensor:
        """(N, 1, 1, 1) the largest fraction of the perturbation that is within the budget.

        The distance grows nearly with the square of the fraction: steps by that law alternate with bisection.
        """
        precision = torch.float32 if perturbation.device.type == "mps" else torch.float64
        patches = self.patches
        mean, centered = patches.parts(patches.split(perturbation))
        # At fraction t, the denominator of d2^2 is bound + t (2 product + t square).
        product = patches.total(patches.centered * centered).to(precision)
        square = patches.total(centered.square_()).to(precision)
        bound = (2 * patches.energy + patches.steady).to(precision)
        mean, level = mean.to(precision), patches.mean.to(precision)

        def distance(fraction: Tensor) -> Tensor:
            below = (bound + fraction * (2 * product + fraction * square)).clamp(min=TINY)
            structure = fraction.square() * square / below
            levels = (fraction * mean).square() / (level.square() + (level + fraction * mean).square() + C1)
            return (structure + levels).mean(ALL_BUT_IMAGES, keepdim=True)

        limit = self.eps * MARGIN
        # The whole perturbation first: if it is within the budget, the search ends at once.
        fraction = torch.ones_like(mean[:, :1, :1, :, :1]).view(-1, 1, 1, 1, 1, 1)
        low, high = torch.zeros_like(fraction), fraction
        for number in range(80):
            spent = distance(fraction)
            low, high = torch.where(spent <= limit, fraction, low), torch.where(spent > limit, fraction, high)
            if bool((low >= high * (1 - 1e-6)).all()):
                break
            # Aimed a little below the limit: a guess on it would end on either side.
            guess = fraction * (limit * (1 - 1e-7) / spent.clamp(min=TINY)).sqrt()
            bracketed = (guess > low) & (guess < high) & (number % 2 == 0)
            fraction = torch.where(bracketed, guess, (low + high) / 2)
            # Images that are done stay where they are while others of the batch go on.
            fraction = torch.where(low >= high * (1 - 1e-6), low, fraction)
        # The end of the bracket that is within the budget.
        return low.to(perturbation.dtype).view(-1, 1, 1, 1)


class _LocalSSIM:
    """SSIM in mode "local": in every patch, d2^2 <= eps is a ball and d1^2 <= eps an interval of changes.

    Completing the square in d2^2 <= eps (Brunet et al. 2012) gives a ball of middle eps / (1 - eps) * centered and of
    squared radius eps (2 - eps) / (1 - eps)^2 * energy + eps / (1 - eps) * steady. The interval follows from d1^2.
    """

    steps_to_optimum = True

    def __init__(self, budget: SSIM, patches: Patches) -> None:
        self.eps, self.patches = budget.eps, patches

    @cached_property
    def ball(self) -> tuple[Tensor, Tensor]:
        """Middle and radius, of the changes of the centered part."""
        eps, patches = self.eps, self.patches
        square = patches.energy * (eps * (2 - eps) / (1 - eps) ** 2) + patches.steady * (eps / (1 - eps))
        return patches.centered * (eps / (1 - eps)), square.sqrt()

    @cached_property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Middle and half width, of the changes of the mean."""
        eps, mean = self.eps, self.patches.mean
        square = mean.square() * (eps * (2 - eps) / (1 - eps) ** 2) + C1 * (eps / (1 - eps))
        return mean * (eps / (1 - eps)), square.sqrt()

    def project(self, perturbation: Tensor, region: Tensor | None = None) -> Tensor:
        if self.eps == 0:
            return torch.zeros_like(perturbation)
        patches = self.patches
        nearest = self._nearest(patches.split(perturbation))
        inside = patches.split(patches.in_box(patches.join(nearest), region))
        # Where the box does not cut the ball's nearest point, that is the answer; elsewhere projections alternate.
        cut = (inside - nearest).abs_().amax((3, 5)) >= CLOSE
        if bool(cut.any()):
            start = patches.split(patches.in_box(perturbation, region))
            allowed = None if region is None else patches.split(region.expand_as(patches.images))
            # Through the view that `by_patch` returns, this writes into `inside`.
            by_patch(inside)[cut] = self._alternated(start, allowed, cut)
        return patches.join(inside * self._fractions_within(inside))

    def steepest_step(self, gradient: Tensor, perturbation: Tensor) -> Tensor:
        patches = self.patches
        slope = patches.slope(gradient)
        (middle, radius), (center, width) = self.ball, self.interval
        slope_sum = patches.total(slope)
        direction = patches.within(slope - slope_sum / patches.count)
        length = patches.total(direction.square()).sqrt()
        mean, centered = patches.parts(patches.split(perturbation))
        # The maximizer of a linear objective on a ball is its middle plus the radius along the gradient.
        step = direction.mul_(radius / length.clamp(min=TINY)).add_(middle).sub_(centered)
        mean = torch.where(slope_sum != 0, center + width * slope_sum.sign() - mean, 0)
        return patches.join(step.mul_((length > 0).to(step)).add_(patches.within(mean.expand_as(step))))

    def distance(self, perturbation: Tensor) -> Tensor:
        level, structure = self.patches.distances(self.patches.split(perturbation))
        return torch.maximum(level, structure).amax(ALL_BUT_IMAGES)

    def _nearest(self, changed: Tensor) -> Tensor:
        """Each patch's change projected on its ball and interval."""
        (middle, radius), (center, width) = self.ball, self.interval
        mean, centered = self.patches.parts(changed)
        centered.sub_(middle)
        length = self.patches.total(centered.square()).sqrt()
        centered.mul_((radius / length.clamp(min=TINY)).clamp(max=1)).add_(middle)
        mean = center + (mean - center).clamp(-width, width)
        return centered.add_(self.patches.within(mean.expand_as(centered)))

    def _alternated(self, start: Tensor, allowed: Tensor | None, cut: Tensor) -> Tensor:
        """(M, patch, patch) changes of the M patches that `cut` (N, C, rows, columns) marks, on box and region."""
        patches = self.patches
        images, valid = patches.split(patches.images), patches.valid.expand_as(start)
        bounds = (*self.ball, *self.interval)
        pixels, inside, valid = (by_patch(t)[cut] for t in (images, start, valid))
        middle, radius, center, width = (by_patch(t)[cut] for t in bounds)
        count = by_patch(patches.count.expand_as(bounds[1]))[cut]
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

    def _fractions_within(self, changed: Tensor) -> Tensor:
        """The largest fraction t of each patch's change that is within its bounds: the root of t^2 a + 2 t b = c."""
        patches, eps = self.patches, self.eps * MARGIN
        mean, centered = patches.parts(changed)
        square, product = patches.total(centered.square()), patches.total(patches.centered * centered)
        structure = (square, product, 2 * patches.energy + patches.steady)
        level = (mean.square(), patches.mean * mean, 2 * patches.mean.square() + C1)
        fraction = torch.ones_like(mean)
        for square, product, bound in (structure, level):
            # From t^2 square <= eps (bound + 2 t product + t^2 square), sorted by powers of t.
            a, b, c = (1 - eps) * square, -eps * product, eps * bound
            # This form of the root does not cancel where b is positive.
            root = c / (b + (b.square() + a * c).sqrt()).clamp(min=TINY)
            fraction = torch.minimum(fraction, torch.where(a + 2 * b <= c, 1, root))
        return fraction.clamp(0, 1)
