"""BPDA: gradients of something near a defended model in place of its own (Athalye et al. 2018, arXiv 1802.00420).

A lead is a classifier whose gradients an attack follows, while the defended model's answers decide what fools. Its own
gradients are one lead; the undefended model is another; a third goes straight through to the network inside.

Agreement: whether a step along a lead's gradient changes the defended model's margin as the gradient predicts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

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

MOST = 6  # inner networks that are looked at, from the outside
FLAT = 1e-8  # variance of a channel below which no slope can be fitted


def straight_through_models(defended: Classifier, images: Tensor) -> list[Classifier]:
    """For each network that the defended model calls inside, from the outside in: a classifier that is led by it.

    Such a network takes a picture (a four-dimensional tensor with the images' channels) and returns logits of as many
    classes; it need not be registered as a submodule. The classifier takes the image that is given, records what the
    defended model feeds to the inner network, and passes that on with the gradient of a straight line from the image:
    one slope per image and channel, fitted between the two. So preprocessing without a gradient, or with a wrong one,
    is passed through. Where the inner network takes another size, the image is resized to it; where it is called
    several times, there is one classifier that averages the calls' logits and one that takes the last call.

    Args:
        defended: in eval mode.
        images: (N, C, H, W), a few to try it on.

    Returns:
        An empty list where the network cannot be seen from outside, as when its layers are called one by one.
    """
    images = defended.filled(images)
    with torch.no_grad(), _watching(images) as called:
        classes = defended(images).shape[1]
    # The whole network is no inner one: its gradients are the defended model's own.
    whole = (defended, defended.network)
    inner = [module for module, found in reversed(called) if found == classes and module not in whole]
    # Earlier calls may be draws to be averaged, or only prepare the last one: both are worth trying.
    times = {module: inner.count(module) for module in list(dict.fromkeys(inner))[:MOST]}
    ways = [
        (module, last)
        for module, count in times.items()
        for last in ((False, True) if count > 1 else (True,))
    ]
    return [
        as_wrapped_classifier(
            _StraightThrough(defended, module, last), defended, f"{defended.name} (straight-through)"
        )
        for module, last in ways
    ]


@contextmanager
def _watching(images: Tensor) -> Iterator[list[tuple[nn.Module, int]]]:
    """Every module of this thread that took a picture and returned logits, inner before outer, with its classes."""
    called: list[tuple[nn.Module, int]] = []
    here = threading.get_ident()

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if threading.get_ident() != here:
            return
        # The model may itself be counting its tensor operations; these are not among them.
        with torch._C.DisableTorchFunction(), suppress(ValueError):
            if _picture(args, kwargs, images) is not None:
                called.append((module, logits_of(output).shape[1]))

    handle = register_module_forward_hook(seen, with_kwargs=True)
    try:
        yield called
    finally:
        handle.remove()


def _picture(args: tuple[Any, ...], kwargs: Mapping[str, Any], images: Tensor) -> int | str | None:
    """Where among its arguments a module was given pictures of as many channels as the images."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if (
            isinstance(value, Tensor)
            and value.ndim == 4
            and value.shape[1] == images.shape[1]
            and value.is_floating_point()
            and len(value) % len(images) == 0
        ):
            return place
    return None


class _Call(NamedTuple):
    """Arguments of an inner network, the picture among them, and where it is."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str
    picture: Tensor

    def with_picture(self, picture: Tensor) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = picture
        else:
            kwargs[self.place] = picture
        return args, kwargs


class _StraightThrough(nn.Module):
    """Logits of an inner network on what the defended model feeds to it, with gradients to the image."""

    def __init__(self, defended: Classifier, inner: nn.Module, last: bool) -> None:
        super().__init__()
        self.defended, self.last = defended, last
        self.inner = [inner]  # not registered a second time: it usually is a part of the defended model

    def forward(self, images: Tensor) -> Tensor:
        (inner,) = self.inner
        calls: list[_Call] = []
        here = threading.get_ident()

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if threading.get_ident() != here:
                return
            with torch._C.DisableTorchFunction():
                place = _picture(args, kwargs, images)
                if place is not None:
                    picture = args[place] if isinstance(place, int) else kwargs[place]
                    calls.append(_Call(args, kwargs, place, picture.detach().clone()))

        handle = inner.register_forward_pre_hook(record, with_kwargs=True)
        try:
            with torch.no_grad():
                answer: Tensor = self.defended(images)
        finally:
            handle.remove()
        if not calls:  # it took another way for these images: there is nothing to lead
            return answer
        used = calls[-1:] if self.last else calls
        return torch.stack([self._led(inner, call, images) for call in used]).mean(0)

    def _led(self, inner: nn.Module, call: _Call, images: Tensor) -> Tensor:
        """(N, K) logits of one call, averaged over the copies of each image in its batch."""
        picture = call.picture
        times = len(picture) // len(images)
        shown = _resized(images, picture)
        # Copies come batch after batch (`repeat`) or image by image (`repeat_interleave`).
        arranged = (shown.repeat(times, 1, 1, 1), shown.repeat_interleave(times, 0))
        distances = [float((picture - copies.detach()).abs().mean()) for copies in arranged]
        tiled = distances[0] <= distances[1]
        args, kwargs = call.with_picture(_straight(picture, arranged[0 if tiled else 1]))
        logits = logits_of(inner(*args, **kwargs))
        sizes, copies = ((times, len(images)), 0) if tiled else ((len(images), times), 1)
        led: Tensor = logits.unflatten(0, sizes).mean(copies)
        return led


def _resized(images: Tensor, picture: Tensor) -> Tensor:
    if images.shape[2:] == picture.shape[2:]:
        return images.to(picture)
    return F.interpolate(images.to(picture), size=picture.shape[2:], mode="bilinear", align_corners=False)


def _straight(picture: Tensor, shown: Tensor) -> Tensor:
    """The picture to the last bit, with the gradient of a straight line from the image, fitted by least squares."""
    with torch.no_grad():
        centered = shown - shown.mean((2, 3), keepdim=True)
        variance = centered.square().mean((2, 3), keepdim=True)
        slope = (centered * picture).mean((2, 3), keepdim=True) / variance.clamp(min=FLAT)
        slope = torch.where(variance > FLAT, slope, 1)
    return picture + slope * (shown - shown.detach())


STEP = 1 / 50  # of the budget
SMALLEST_RATIO, LARGEST_RATIO = 0.5, 2.0  # times the predicted change, at a random point
LEADING = 0.25  # times the predicted change, where an attack ended: competing classes come near there
STREAM = 900  # of each image's random numbers; attacks use those below


def agreement(
    defended: Classifier, lead: Classifier, images: Tensor, labels: Tensor, *, budget: Budget, seed: int
) -> Tensor:
    """(N,) bool: a short step down the lead's gradient changes the defended margin by .5 to 2 times the prediction.

    The step is a fiftieth of the budget from a random point of the ball; a random defense plays one draw throughout.
    Masked gradients, which are zero or wrong, do not agree.

    Args:
        defended: whose margin is measured.
        lead: whose gradient predicts; `defended` itself for its own gradients.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        budget: of the attacks that are to be judged.
        seed: of points and draws.
    """
    with attack_context(defended, images, labels, AttackOptions(budget, seed=seed)) as problem:
        points = problem.apply(random_start(problem, STREAM))
    ratio = _ratio(defended, lead, points, labels, budget, seed)
    return (ratio >= SMALLEST_RATIO) & (ratio <= LARGEST_RATIO)


def leads_on(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, *, budget: Budget, seed: int
) -> Tensor:
    """(N,) bool: a short step from these points (N, C, H, W) lowers the margin by at least a quarter of the prediction.

    At the points where an attack ended, a model whose slope vanishes near its decision boundary does not lead on,
    though its gradients agree elsewhere. Kinks between competing classes are common there in any model, so less is
    asked than of `agreement`.
    """
    return _ratio(defended, lead, points, labels, budget, seed) >= LEADING


def _ratio(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, budget: Budget, seed: int
) -> Tensor:
    """(N,) the change of the defended margin over the predicted one; NaN where no fall is predicted."""
    size = default_batch(points)
    with evaluating(defended), evaluating(lead):
        parts = zip(points.split(size), labels.split(size), strict=True)
        return torch.cat([_ratio_of_batch(defended, lead, *part, budget, seed) for part in parts])


def _ratio_of_batch(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, budget: Budget, seed: int
) -> Tensor:
    start = points.detach().clone().requires_grad_()
    with one_draw(lead, seed):
        led = margin(lead(start), labels)
    if not led.requires_grad:
        return torch.full_like(led, torch.nan)
    (gradient,) = torch.autograd.grad(led.sum(), start, allow_unused=True, materialize_grads=True)
    step = STEP * budget.steepest_step(-gradient, torch.zeros_like(points), points)
    moved = (points + step).clamp(0, 1)
    predicted = (gradient * (moved - points)).flatten(1).sum(1)
    with torch.no_grad():
        with one_draw(defended, seed):
            before = margin(defended(points), labels)
        with one_draw(defended, seed):
            after = margin(defended(moved), labels)
    return torch.where(predicted < 0, (after - before) / predicted, torch.nan)
