"""Randomness: draws of a random defense, those it is judged by and those that an attacker makes.

A random defense must not be attacked on the very draw that it will be judged by: the attacker would then have learned a
coin toss, not the defense. So every draw has a number. Those from 0 on are the defender's, and 0 is the one that is
judged; negative ones are the attacker's, who knows how the defense draws but not what it will draw.

There are two kinds of randomness. A defense that draws from the global generators (torch, numpy, random) draws anew
whenever it is called. One that derives its draws from the image, as `neutralizing` does, is a function of the image to
anybody who has its seed, or may ask as often as they like: it gives the same answer to the same image, so an image on
which it errs goes on fooling it. Such an attacker attacks the defended model as it is, as a search without gradients
does anyway; randomness by the image protects only the seed's secret, and only as long as nobody may ask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from weakspot import _random as numbers
from weakspot._checks import check_count, check_seed
from weakspot._state import seeded
from weakspot.classifier import Classifier, as_classifier, as_wrapped_classifier, evaluating

DIFFERENT = 1e-4  # of the largest logit: what two draws must differ by for the defense to count as random
LOOKED_AT = 4  # images


class DrawnByImage(nn.Module):
    """Base of defenses whose draws are a function of the image, a seed and the number of the draw.

    A subclass draws by `numbers.keys(images, seed)` and the stream `draw`, or in any other way that depends on `draw`.

    Attributes:
        draw: number of the draw; 0, the defender's own, unless someone asks for another for a while.
    """

    own_draw: int = 0

    @property
    def draw(self) -> int:
        """The number that this thread asked for, else the module's own."""
        asked: dict[int, int] = getattr(_asked, "draws", {})
        return asked.get(id(self), self.own_draw)

    @draw.setter
    def draw(self, number: int) -> None:
        self.own_draw = number


_asked = threading.local()  # draws by the id of the module


def expectation(model: nn.Module, draws: int, *, seed: int = 0) -> Classifier:
    """What an attacker attacks in place of a random defense: its logits on the mean over draws of their own.

    Expectation over transformation (EOT, Athalye et al. 2018, arXiv 1707.07397). Gradients of the mean logits are mean
    gradients; an attack's objective is taken of the mean logits, which is the mean objective where that is linear in
    them, as the margin is while the same rival leads. Draws change with the images, so that each step of an attack
    averages new ones, and are never those that the defender plays (this module's own words say why).

    The global generators of torch, numpy and random are seeded for each draw, and put back. Of a defense that draws
    from them, what an image meets depends on the batch that it comes in; of `DrawnByImage`, on the image alone.

    Args:
        model: any classifier; its weights are shared, not copied.
        draws: how many to average. Each costs a forward and a backward pass, and holds its own activations meanwhile.
        seed: of the attacker's draws, where the defense draws from the global generators.

    Raises:
        ValueError: when an argument does not fit, naming it.

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
    return as_wrapped_classifier(_Drawn(classifier, range(-draws, 0), seed), classifier, name)


def defender_model(model: nn.Module, *, seed: int = 0) -> Classifier:
    """The random defense on the draw that it is judged by; the same whenever it is asked in the same batch."""
    classifier = as_classifier(model)
    return as_wrapped_classifier(_Drawn(classifier, (0,), seed), classifier, classifier.name)


def is_random(model: nn.Module, images: Tensor, *, seed: int = 0) -> bool:
    """Whether two draws on the first few images (N, C, H, W) give other logits."""
    with evaluating(model) as classifier, torch.no_grad():
        few = classifier.filled(images[:LOOKED_AT])
        first, second = (_Drawn(classifier, (number,), seed)(few) for number in (0, -1))
    return bool(((first - second).abs() > DIFFERENT * first.abs().amax()).any())


class _Drawn(nn.Module):
    """The mean logits of a classifier over draws of these numbers."""

    def __init__(self, drawn: Classifier, draws: Sequence[int], seed: int) -> None:
        super().__init__()
        self.drawn, self.draws, self.seed = drawn, tuple(draws), seed
        self.training = drawn.training

    def forward(self, images: Tensor) -> Tensor:
        content = numbers.keys(images.detach(), self.seed).sum()
        found = []
        for draw in self.draws:
            with _drawing(self.drawn, int(numbers.mixed(numbers.mixed(content) + draw)), draw):
                found.append(self.drawn(images))
        return torch.stack(found).mean(0) if len(found) > 1 else found[0]


def one_draw(model: Classifier, seed: int, draw: int = -1) -> AbstractContextManager[None]:
    """The same draw, one of the attacker's, whatever images the model is given; its generators are put back."""
    return _drawing(model, seed, draw)


@contextmanager
def _drawing(classifier: Classifier, start: int, draw: int) -> Iterator[None]:
    """Global generators start there and `DrawnByImage` have that draw; all are put back."""
    before: dict[int, int] = getattr(_asked, "draws", {})
    numbered = {id(module): draw for module in classifier.modules() if isinstance(module, DrawnByImage)}
    try:
        with seeded(start, classifier.mean.device):
            _asked.draws = before | numbered
            yield
    finally:
        _asked.draws = before
