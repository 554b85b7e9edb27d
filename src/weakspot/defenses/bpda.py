"""BPDA: gradients of a nearby model instead of the defended model's own (Athalye et al. 2018, arXiv 1802.00420).

A lead is a classifier whose gradients an attack follows, while the defended model decides which images fool it. The
defended model is one lead, the undefended model another, and a third goes straight through to the network inside.

Agreement is whether a step along a lead's gradient changes the defended model's margin as the gradient predicts.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.gradient import random_start
from weakspot.budgets import Budget
from weakspot.classifier import Classifier, as_wrapped_classifier, default_batch, evaluating
from weakspot.defenses.randomized import one_draw
from weakspot.logits import logits_of, margin

MOST = 6  # inner networks that are tried, from the outside in
FLAT = 1e-8  # variance of a channel below which no slope is fitted
STEP = 1 / 50  # of the budget, at which a prediction is checked
SMALLEST_RATIO, LARGEST_RATIO = 0.5, 2.0  # of the actual to the predicted change, at a random point
LEADING_RATIO = 0.25  # where an attack ended; less, because competing classes come near there
STREAM = 900  # of each image's random numbers; attacks use those below


def straight_through_models(defended: Classifier, images: Tensor) -> list[Classifier]:
    """A lead for each network that the defended model calls inside, from the outside in.

    Such a network takes images (a four-dimensional tensor with as many channels) and returns logits of as many classes;
    it need not be registered as a submodule. The lead records what the defended model feeds to the inner network and
    passes it on with the gradient of a straight line from the given image: one slope per image and channel, fitted
    between the two. This replaces the gradient of a preprocessing step that has none or a wrong one. If the inner
    network takes another size, the image is resized to it. If it is called several times, there is one lead that
    averages the logits of all calls and one that uses the last call.

    Args:
        defended: in eval mode.
        images: (N, C, H, W), a few to try it on.

    Returns:
        An empty list if there is no such network, for example because the layers are called one by one.
    """
    images = defended.filled(images)
    with torch.no_grad(), _watching(images) as called:
        classes = defended(images).shape[1]
    # Going straight through to the whole network would be the defended model itself.
    whole = (defended, defended.network)
    # Hooks run when a module returns, inner modules first; reversed, they come from the outside in.
    inner = [module for module, count in reversed(called) if count == classes and module not in whole]
    # Earlier calls are either draws to be averaged, or prepare the last call: both leads are tried.
    calls = {module: inner.count(module) for module in list(dict.fromkeys(inner))[:MOST]}
    variants = [
        (module, last)
        for module, count in calls.items()
        for last in ((False, True) if count > 1 else (True,))
    ]
    name = f"{defended.name} (straight-through)"
    return [
        as_wrapped_classifier(_StraightThrough(defended, module, last), defended, name)
        for module, last in variants
    ]


@contextmanager
def _watching(images: Tensor) -> Iterator[list[tuple[nn.Module, int]]]:
    """Record the modules that take images and return logits, inner before outer, with their number of classes."""
    called: list[tuple[nn.Module, int]] = []
    thread = threading.get_ident()

    def record(
        module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
    ) -> None:
        if threading.get_ident() != thread:
            return
        # The model may count its tensor operations; those of this hook must not be counted.
        with torch._C.DisableTorchFunction(), suppress(ValueError):
            if _image_argument(args, kwargs, images) is not None:
                called.append((module, logits_of(output).shape[1]))

    handle = register_module_forward_hook(record, with_kwargs=True)
    try:
        yield called
    finally:
        handle.remove()


class _Call(NamedTuple):
    """Arguments of an inner network, and which of them is the batch of images."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    place: int | str
    fed: Tensor

    def with_images(self, images: Tensor) -> tuple[list[object], dict[str, object]]:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = images
        else:
            kwargs[self.place] = images
        return args, kwargs


def _image_argument(
    args: tuple[object, ...], kwargs: Mapping[str, object], images: Tensor
) -> tuple[int | str, Tensor] | None:
    """The first argument that is a batch of images with the same channels, possibly several copies of each."""
    places: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if (
            isinstance(value, Tensor)
            and value.ndim == 4
            and value.shape[1] == images.shape[1]
            and value.is_floating_point()
            and len(value) % len(images) == 0
        ):
            return place, value
    return None


class _StraightThrough(nn.Module):
    """Logits of an inner network on what the defended model feeds to it, with gradients to the image."""

    def __init__(self, defended: Classifier, inner: nn.Module, last: bool) -> None:
        super().__init__()
        self.defended, self.last = defended, last
        # In a list, so that it is not registered twice: it usually belongs to `defended`.
        self.inner = [inner]

    def forward(self, images: Tensor) -> Tensor:
        (inner,) = self.inner
        calls: list[_Call] = []
        thread = threading.get_ident()

        def record(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
            if threading.get_ident() != thread:
                return
            with torch._C.DisableTorchFunction():
                argument = _image_argument(args, kwargs, images)
                if argument is not None:
                    place, fed = argument
                    calls.append(_Call(args, kwargs, place, fed.detach().clone()))

        handle = inner.register_forward_pre_hook(record, with_kwargs=True)
        try:
            with torch.no_grad():
                logits: Tensor = self.defended(images)
        finally:
            handle.remove()
        if not calls:  # these images did not reach the inner network, so there is no gradient
            return logits
        # Logits are a mean over the calls, so the gradient is too: each copy of the image contributes.
        used = calls[-1:] if self.last else calls
        return torch.stack([self._call_logits(inner, call, images) for call in used]).mean(0)

    def _call_logits(self, inner: nn.Module, call: _Call, images: Tensor) -> Tensor:
        """(N, K) logits of one call, averaged over the copies of each image in its batch."""
        fed = call.fed
        times = len(fed) // len(images)
        resized = _resized(images, fed)
        # Copies come either batch after batch (`repeat`) or image by image (`repeat_interleave`).
        orders = (resized.repeat(times, 1, 1, 1), resized.repeat_interleave(times, 0))
        distances = [float((fed - copies.detach()).abs().mean()) for copies in orders]
        by_batch = distances[0] <= distances[1]
        args, kwargs = call.with_images(_with_straight_gradient(fed, orders[0 if by_batch else 1]))
        logits = logits_of(inner(*args, **kwargs))
        sizes, copies = ((times, len(images)), 0) if by_batch else ((len(images), times), 1)
        mean: Tensor = logits.unflatten(0, sizes).mean(copies)
        return mean


def _resized(images: Tensor, fed: Tensor) -> Tensor:
    if images.shape[2:] == fed.shape[2:]:
        return images.to(fed)
    return F.interpolate(images.to(fed), size=fed.shape[2:], mode="bilinear", align_corners=False)


def _with_straight_gradient(fed: Tensor, images: Tensor) -> Tensor:
    """`fed`, bit for bit, with the gradient of slope * images, where the slope is fitted by least squares."""
    with torch.no_grad():
        # slope = cov(image, fed) / var(image) for each image and channel, 1 where the channel is constant.
        centered = images - images.mean((2, 3), keepdim=True)
        variance = centered.square().mean((2, 3), keepdim=True)
        # The centered image sums to zero, so `fed` need not be centered for their covariance.
        slope = (centered * fed).mean((2, 3), keepdim=True) / variance.clamp(min=FLAT)
        slope = torch.where(variance > FLAT, slope, 1)
    return fed + slope * (images - images.detach())


def agreement(
    defended: Classifier, lead: Classifier, images: Tensor, labels: Tensor, *, budget: Budget, seed: int
) -> Tensor:
    """(N,) bool: a short step down the lead's gradient changes the defended margin by .5 to 2 times the prediction.

    The step is a fiftieth of the budget from a random point of the ball. A random defense uses one draw throughout.
    Masked gradients, which are zero or wrong, do not agree.

    Args:
        defended: whose margin is measured.
        lead: whose gradient predicts; `defended` itself for its own gradients.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        budget: of the attacks that are evaluated.
        seed: of points and draws.
    """
    with attack_context(defended, images, labels, AttackOptions(budget, seed=seed)) as problem:
        points = problem.apply(random_start(problem, STREAM))
    # A ratio of 1 is a margin that is linear along the step; masked gradients give 0, NaN or any number.
    ratio = _change_ratio(defended, lead, points, labels, budget=budget, seed=seed)
    return (ratio >= SMALLEST_RATIO) & (ratio <= LARGEST_RATIO)


def leads_on(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, *, budget: Budget, seed: int
) -> Tensor:
    """(N,) bool: a short step from these points (N, C, H, W) lowers the margin by at least a quarter of the prediction.

    At the points where an attack ended, a model whose slope vanishes near its decision boundary does not lead on,
    although its gradients agree elsewhere. Kinks between competing classes are common there in any model, so the
    threshold is lower than that of `agreement`.
    """
    return _change_ratio(defended, lead, points, labels, budget=budget, seed=seed) >= LEADING_RATIO


def _change_ratio(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, *, budget: Budget, seed: int
) -> Tensor:
    """(N,) actual change of the defended margin over the predicted one; NaN where no decrease is predicted."""
    size = default_batch(points)
    ratios = []
    with evaluating(defended), evaluating(lead):
        for batch, classes in zip(points.split(size), labels.split(size), strict=True):
            start = batch.detach().clone().requires_grad_()
            with one_draw(lead, seed):
                predicting = margin(lead(start), classes)
            if not predicting.requires_grad:
                ratios.append(torch.full_like(predicting, torch.nan))
                continue
            (gradient,) = torch.autograd.grad(
                predicting.sum(), start, allow_unused=True, materialize_grads=True
            )
            # steepest_step ascends, so the negative gradient lowers the margin.
            step = STEP * budget.steepest_step(-gradient, torch.zeros_like(batch), batch)
            moved = (batch + step).clamp(0, 1)
            # First-order change of the margin over the step as clipped to [0, 1].
            predicted = (gradient * (moved - batch)).flatten(1).sum(1)
            with torch.no_grad():
                with one_draw(defended, seed):
                    before = margin(defended(batch), classes)
                with one_draw(defended, seed):  # the same draw again
                    after = margin(defended(moved), classes)
            ratios.append(torch.where(predicted < 0, (after - before) / predicted, torch.nan))
    return torch.cat(ratios)
