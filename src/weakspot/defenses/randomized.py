"""Randomized defenses: the draws that a defense is judged by, and those that an attacker averages over.

A random defense must not be attacked on the draw that it is judged by, because the attack would then learn one coin
toss instead of the defense. Every draw has a number. Numbers from 0 up are the defender's, and draw 0 is judged;
negative numbers are the attacker's, who knows how the defense draws but not what it will draw.

There are two kinds of randomness. A defense that draws from the global generators (torch, numpy, random) draws anew at
every call. A defense that derives its draws from the image, as `neutralizing` does, gives the same answer to the same
image, so an image that fools it once fools it always. An attacker who has its seed, or may query it, attacks it as it
is; its randomness protects only as long as the seed is secret and nobody may query.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_count, check_seed
from weakspot._state import seeded
from weakspot.classifier import Classifier, as_classifier, as_wrapped_classifier, evaluating

DIFFERENT = 1e-4  # of the largest logit; two draws that differ by more are random
TRIED = 4  # images

_requested = threading.local()  # draw numbers of this thread, by the id of the module


class DrawnByImage(nn.Module):
    """Base class of defenses whose draws are a function of the image, a seed and the number of the draw.

    A subclass uses `draw` where it draws, for example as the stream of random numbers of an image.

    Attributes:
        draw: number of the draw. 0, the defender's own, unless `expectation` asks for another one.
    """

    @property
    def draw(self) -> int:
        """The number that this thread requested, else the defender's."""
        requested: dict[int, int] = getattr(_requested, "draws", {})
        return requested.get(id(self), 0)


def expectation(model: nn.Module, draws: int, *, seed: int = 0) -> Classifier:
    """A random defense as an attacker sees it: its logits averaged over the attacker's own draws.

    Expectation over transformation (EOT, Athalye et al. 2018, arXiv 1707.07397, equation 1). The gradient of the mean
    logits is the mean gradient. Attacks take their loss of the mean logits; for a loss that is linear in the logits, as
    the margin is while the same class competes, this is the mean loss. Draws change with the images, so that every step
    of an attack averages over new ones, and they are never the defender's (see the text of this module).

    The global generators of torch, numpy and random are seeded for each draw and restored. For a defense that uses
    them, the draws of an image depend on its batch; for a `DrawnByImage`, on the image only.

    Args:
        model: any classifier. Its weights are shared, not copied.
        draws: how many to average over. Each costs a forward and a backward pass, and the memory of its activations.
        seed: of the attacker's draws, if the defense uses the global generators.

    Raises:
        ValueError: if an argument does not fit.

    >>> class Noisy(nn.Module):
    ...     def forward(self, images):
    ...         return images.flatten(1)[:, :2] + torch.randn(len(images), 2)
    >>> images = torch.zeros(1, 3, 2, 2)
    >>> [bool((expectation(Noisy(), draws)(images).abs() < 0.3).all()) for draws in (1, 400)]
    [False, True]
    """
    check_count("draws", draws)
    check_seed(seed)
    classifier = as_classifier(model)
    name = f"{classifier.name} on the mean of {draws} draws" if draws > 1 else classifier.name
    return as_wrapped_classifier(_OnDraws(classifier, range(-draws, 0), seed), classifier, name)


def defender_model(model: nn.Module, *, seed: int = 0) -> Classifier:
    """The random defense on the draw that it is judged by, which is the same for the same batch."""
    classifier = as_classifier(model)
    return as_wrapped_classifier(_OnDraws(classifier, (0,), seed), classifier, classifier.name)


def is_random(model: nn.Module, images: Tensor, *, seed: int = 0) -> bool:
    """Whether two draws give different logits on the first few images (N, C, H, W)."""
    with evaluating(model) as classifier, torch.no_grad():
        few = classifier.filled(images[:TRIED])
        first, second = (_OnDraws(classifier, (number,), seed)(few) for number in (0, -1))
    return bool(((first - second).abs() > DIFFERENT * first.abs().amax()).any())


class _OnDraws(nn.Module):
    """The mean logits of a classifier over the draws of these numbers."""

    def __init__(self, defended: Classifier, draws: Sequence[int], seed: int) -> None:
        super().__init__()
        self.defended, self.draws, self.seed = defended, tuple(draws), seed
        self.training = defended.training

    def forward(self, images: Tensor) -> Tensor:
        content = _random.keys(images.detach(), self.seed).sum()  # does not depend on the order of the images
        logits = []
        # Another draw is another seed; mixing keeps the seeds of neighboring draws unrelated.
        for draw in self.draws:
            start = int(_random.mixed(_random.mixed(content) + draw))
            with one_draw(self.defended, start, draw):
                logits.append(self.defended(images))
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]


@contextmanager
def one_draw(classifier: Classifier, seed: int, draw: int = -1) -> Iterator[None]:
    """Inside, the classifier uses one draw, by default the attacker's, for all images.

    Global generators are seeded and the draw of every `DrawnByImage` is set; all are restored.
    """
    before: dict[int, int] = getattr(_requested, "draws", {})
    # By thread and module, so that two threads on one model use different draws.
    numbered = {id(module): draw for module in classifier.modules() if isinstance(module, DrawnByImage)}
    try:
        with seeded(seed, classifier.mean.device):
            _requested.draws = before | numbered
            yield
    finally:
        _requested.draws = before
