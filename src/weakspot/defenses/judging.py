"""Judging: a defence beside the bare model, by attackers who do not know of it and by some who do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot.attacks import auto, iterative, pgd
from weakspot.attacks.gradient import Progress, check_counts, part_of
from weakspot.attacks.problem import attacking
from weakspot.attacks.squares import square_search
from weakspot.budgets import Budget, Linf
from weakspot.checks import ModelWarning, check_budget, check_classes, check_seed, warn_once
from weakspot.classifier import Classifier, check_images, evaluating, predict
from weakspot.defenses.bypassing import bypassing
from weakspot.defenses.randomness import as_played, expectation, is_random
from weakspot.regions import cam
from weakspot.statistics import share_interval

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_BUDGET = Linf(4 / 255)


def judge_defense(
    model: nn.Module,
    defended: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget | None = None,
    steps: int = 20,
    keep: float = 0.3,
    draws: int = 1,
    queries: int = 100,
    substitute: nn.Module | None = None,
    oracle: Callable[[Tensor, Tensor], Tensor] | None = None,
    thorough: bool = False,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> pd.DataFrame:
    """Accuracy of the bare and of the defended model under the same attacks.

    Rows, one for each attack ("made for each": for the bare model in its columns, for the defended one in its own):

    - "clean": none.
    - "replayed": PGD made for the bare model; the naive figure.
    - "transfer": momentum iterations (MI-FGSM, Dong et al. 2018, arXiv 1710.06081) made for `substitute`. Without one
      they are made for the bare model, and this is a second replay, of an attack that travels better.
    - "white box": PGD made for each, through the gradients that the defence defines.
    - "bare gradients": PGD made for each, judged by its answers and led by the bare model's gradients (`bypassing`).
    - "inside the region of importance": PGD made for each, and only where the bare model gathers most evidence.
    - "black box": square search made for each, which needs answers and no gradients.
    - "ensemble": `attacks.auto` made for each, where `thorough`.
    - "worst of all": images that stand against every attack above.
    - "replayed, oracle region": where an `oracle` is given, and not among the worst.

    A defence that is random is judged on one draw for each image, the one that it plays. Attacks by gradients are made
    on the mean of `draws` others (`expectation`); a search without gradients asks the defence itself, so that one whose
    draws are a function of the image can be asked until it errs.

    Args:
        model: the bare classifier.
        defended: the defended one, such as `neutralizing(model)`; gradients go through it as it defines them.
        images: (N, C, H, W).
        labels: (N,).
        budget: of every attack; 4/255 in L-infinity where not given.
        steps: of PGD.
        keep: share of the image that the attack inside the region of importance may change.
        draws: of a random defence, that the informed attacker averages over; of no matter to others.
        queries: forward passes of the black box for each image; 0 leaves it out.
        substitute: another classifier of the same classes, for the transfer.
        oracle: attacked and clean images to what the bare model is then given, such as
            `functools.partial(oracle_neutralized, model)`.
        thorough: also `attacks.auto`, which ends with 2000 queries of square search.
        seed: of the attacks and of draws from the global generators, which are put back.
        progress: called with the share done.

    Returns:
        One row per attack: attack, then bare, bare_low, bare_high, defended, defended_low, defended_high: accuracy and
        its 95% interval over images (Wilson's).

    Raises:
        ValueError: when an argument does not fit, naming it.

    Warns:
        ModelWarning: where gradients are zero, and where the defence is random and `draws` is 1.
    """
    import pandas as pd

    check_seed(seed)
    check_counts(steps=steps, draws=draws)
    check_counts(least=0, queries=queries)
    budget = DEFAULT_BUDGET if budget is None else budget
    check_budget(budget)
    for name, network in (("model", model), ("defended", defended), ("substitute", substitute)):
        if network is not None and not isinstance(network, nn.Module):
            raise ValueError(f"{name} is a {type(network).__name__}; accepted is a torch.nn.Module")
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        classes = predict(classifier, images[:1]).shape[1]
        check_classes(labels, len(images), classes)
        labels = labels.to(images.device, torch.long)
    for name, network in (("defended", defended), ("substitute", substitute)):
        if network is not None and network is not model:
            _check_classes_of(name, network, images[:1], classes)

    played, attacked = _sides(model, defended, images, draws, seed)
    region = cam(model, images, labels, keep=keep)
    told = _Told(progress, 6 + 2 * (queries > 0) + 2 * thorough)

    def descent(network: nn.Module, region: Tensor | None = None) -> Tensor:
        return pgd(
            network, images, labels, budget=budget, region=region, steps=steps, seed=seed, progress=told.next()
        ).adversarial  # fmt: skip

    def travelling(network: nn.Module) -> Tensor:
        return iterative(
            network, images, labels, budget=budget, steps=steps, momentum=1.0, progress=told.next()
        ).adversarial

    def asking(network: nn.Module) -> Tensor:
        with attacking(network, images, labels, None, None, None, seed) as problem, problem.searching():
            return square_search(problem, budget, queries=queries, stream=0, progress=told.next())[0]

    def ensemble(network: nn.Module) -> Tensor:
        return auto(network, images, labels, budget=budget, seed=seed, progress=told.next()).adversarial

    replayed = descent(model)
    transferred = travelling(model if substitute is None else substitute)
    shown = {
        "clean": (images, images),
        "replayed": (replayed, replayed),
        "transfer": (transferred, transferred),
        "white box": (replayed, descent(attacked)),
        "bare gradients": (
            replayed,
            replayed if defended is model else descent(bypassing(model, attacked)),
        ),
        "inside the region of importance": (descent(model, region), descent(attacked, region)),
    }
    if queries:
        shown["black box"] = (asking(model), asking(played))
    if thorough:
        shown["ensemble"] = (ensemble(model), ensemble(attacked))
    right = {
        name: (_right(model, for_bare, labels), _right(played, for_defended, labels))
        for name, (for_bare, for_defended) in shown.items()
    }
    standing = [torch.stack(both).all(0) for both in zip(*right.values(), strict=True)]
    right["worst of all"] = (standing[0], standing[1])
    if oracle is not None:
        right["replayed, oracle region"] = (
            right["replayed"][0],
            _right(model, oracle(replayed, images), labels),
        )
    told.finish()
    return pd.DataFrame(
        [
            {"attack": name, **_accuracy("bare", bare), **_accuracy("defended", behind)}
            for name, (bare, behind) in right.items()
        ]
    )


def _sides(
    model: nn.Module, defended: nn.Module, images: Tensor, draws: int, seed: int
) -> tuple[nn.Module, nn.Module]:
    """The defended model as it is judged, and as attacks by gradients are made on it."""
    if defended is model or not is_random(defended, images, seed=seed):
        return defended, defended
    if draws == 1:
        warn_once(
            defended,
            "random",
            f"{getattr(defended, 'name', type(defended).__name__)} is random: it gives the same image other logits at "
            "another draw, and an attack on the gradient of one draw overrates it; give draws, such as 10",
            ModelWarning,
        )
    return as_played(defended, seed=seed), expectation(defended, draws, seed=seed)


def _check_classes_of(name: str, network: nn.Module, image: Tensor, classes: int) -> None:
    """Raises ValueError unless the network takes the image and knows as many classes."""
    with evaluating(network) as classifier:
        try:
            found = predict(classifier, classifier.filled(image)).shape[1]
        except (RuntimeError, TypeError, AttributeError, AssertionError, IndexError, KeyError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise ValueError(
                f"{name} fails on an image of shape {tuple(image.shape[1:])} ({why}); accepted is a torch.nn.Module "
                "that takes the images of model and returns logits"
            ) from error
    if found != classes:
        raise ValueError(
            f"{name} returns {found} logits for an image and model {classes}; accepted are the same classes"
        )


def _right(network: nn.Module, shown: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool."""
    classifier: Classifier
    with evaluating(network) as classifier:
        return predict(classifier, shown).argmax(1) == labels


def _accuracy(title: str, right: Tensor) -> dict[str, float]:
    found = share_interval(right.cpu().numpy())
    return dict(zip((title, f"{title}_low", f"{title}_high"), found, strict=True))


class _Told:
    """Progress of several pieces, one after the other, as progress of the whole."""

    def __init__(self, progress: Progress | None, pieces: int) -> None:
        self.progress, self.pieces, self.done = progress, pieces, 0

    def next(self) -> Progress | None:
        """Progress of the next piece."""
        self.done += 1
        return part_of(self.progress, min(self.done, self.pieces) - 1, self.pieces)

    def finish(self) -> None:
        if self.progress is not None:
            self.progress(1.0)
