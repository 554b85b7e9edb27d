"""Evaluation of a defense: the defended and the undefended model under the same attacks, each made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_budget, check_classes, check_count, check_fraction, check_seed, described
from weakspot._errors import describe_error
from weakspot._progress import ProgressOption, shown
from weakspot.attacks.context import DEFAULT_BUDGET
from weakspot.attacks.eight_bit import rounded, whole_levels
from weakspot.budgets import Budget
from weakspot.classifier import check_images, evaluating, predict
from weakspot.defenses.attack_sequence import AttackSequence, Effort, is_correct, table_row
from weakspot.defenses.verdicts import AttackRow
from weakspot.images import distinct

if TYPE_CHECKING:
    import pandas as pd


def evaluate_defense(
    model: nn.Module,
    defended: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget | None = None,
    steps: int = 30,
    fraction: float = 0.3,
    draws: int = 4,
    queries: int = 4000,
    substitute: nn.Module | None = None,
    oracle: Callable[[Tensor, Tensor], Tensor] | None = None,
    thorough: bool = False,
    seed: int = 0,
    progress: ProgressOption = None,
    on_attack: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Accuracy of the undefended and of the defended model under the same attacks; `verdict` sums it up.

    Both models face the attacks in turn. Each attack gets the images that withstood the attacks above it, so that a row
    is the accuracy left after all attacks so far and the last row is the worst case. Images are rounded to 8 bits
    first, and every attacked image is judged after rounding, inside the budget. Rows:

    - "clean": no attack.
    - "transferred from the undefended model": PGD made for the undefended model and shown to both. An attacker who does
      not know the defense can do no more.
    - "transferred from the substitute": MI-FGSM (arXiv 1710.06081) on `substitute`, if there is one.
    - "white-box": PGD on the model's own gradients.
    - "BPDA (straight-through)": PGD along the gradients of the network inside the defended model
      (`straight_through_models`). If there is none, both models face their own gradients from other starts.
    - "BPDA (undefended gradients)": PGD along the gradients of the undefended model.
    - "white-box (region of importance)": PGD confined to the class activation of the undefended model.
    - "white-box, N draws": only on a random defense that keeps a gain so far. N doubles from twice `draws` to eight
      times, until a doubling takes at most 2 points.
    - "ensemble": `attacks.ensemble`, if `thorough`.
    - "square search, N queries": N = 500 (or `queries`, if that is less), then twice as many with new squares until a
      doubling takes at most 2 points from the defended model, or the next one would exceed `queries`.
    - "oracle region": if there is an `oracle`. Not part of the worst case.

    PGD has two restarts. On a random defense it has one, with two thirds of the steps, on the mean logits of `draws`
    draws (EOT, arXiv 1707.07397) other than the one that the defense is judged by.

    Args:
        model: the undefended classifier.
        defended: the defended one, such as `neutralizing(model)`.
        images: (N, C, H, W) in [0, 1]. Copies of an image, which are no independent evidence, are left out.
        labels: (N,); of copies, that of the first counts.
        budget: of every attack. Default: `Linf(4 / 255)`.
        steps: of each PGD restart.
        fraction: of the image that the attack inside the region of importance may change.
        draws: of a random defense, over which attacks average.
        queries: most queries of one square search. Below 1000 there is no doubling, and no verdict of "protects".
        substitute: another classifier of the same classes.
        oracle: a function of attacked and clean images that returns the images for the undefended model, such as
            `functools.partial(oracle_neutralized, model)`.
        thorough: whether the ensemble, which is slow, is run too.
        seed: of the attacks and of draws from the global generators, which are restored.
        progress: True for a bar on standard error or in the notebook, or a function of the fraction done.
        on_attack: called after each attack with the rows so far.

    Returns:
        One row per attack. "undefended" and "defended" are accuracies, each with "_low" and "_high" (the exact 95%
        interval over images). "undefended_only" and "defended_only" count the images that only one of the two models
        still classifies correctly. For gradient attacks, "agreement" is the fraction of images whose gradients predict
        the defended model's margin at a random point (`agreement`), and "agreement_at_end" the fraction, of the images
        that withstand all gradient attacks, whose gradients still lower the margin where the attack ended (`leads_on`).
        "images" is the number of different images.

    Raises:
        ValueError: if an argument does not fit.
    """
    import pandas as pd

    check_seed(seed)
    if oracle is not None and not callable(oracle):
        raise ValueError(f"oracle must be a function of attacked and clean images, got {oracle!r}")
    for name, count in (("steps", steps), ("draws", draws), ("queries", queries)):
        check_count(name, count)
    check_fraction(fraction)
    budget = DEFAULT_BUDGET if budget is None else budget
    check_budget(budget)
    images, labels = _checked(model, defended, substitute, images, labels)
    if oracle is not None:
        _restored(oracle, images[:2], images[:2])  # before any attack: an error would lose them all
    # Whole gray levels, so that rounding an attacked image to 8 bits never leaves the budget.
    effort = Effort(whole_levels(budget), steps, fraction, draws, queries, thorough=thorough, seed=seed)
    # Tensors of inference mode have no gradients.
    with (
        torch.inference_mode(mode=False),
        shown(progress, "attacking", total=len(images), counted=False) as report,
    ):
        sequence = AttackSequence((model, defended), images, labels, effort, report)
        if on_attack is not None:
            sequence.on_attack = lambda rows: on_attack(pd.DataFrame(rows))
        sequence.run(substitute)
        rows = sequence.rows
        if oracle is not None:
            # Against the first attack only: the oracle has no adaptive attacker.
            restored = _restored(oracle, sequence.transferred, images)
            correct = is_correct(sequence.undefended.judged, restored, labels)
            rows.append(table_row(AttackRow.ORACLE, sequence.after_transfer, correct))
        sequence.report(1.0)
    return pd.DataFrame(rows)


def _checked(
    model: nn.Module, defended: nn.Module, substitute: nn.Module | None, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The images rounded to 8 bits and the labels, on the model's device.

    Raises:
        ValueError: if a network does not take them.
    """
    for name, network in (("model", model), ("defended", defended), ("substitute", substitute)):
        if network is not None and not isinstance(network, nn.Module):
            raise ValueError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    with evaluating(model) as classifier:
        images = rounded(check_images(images, classifier))
        classes = predict(classifier, images[:1]).shape[1]
        check_classes(labels, len(images), classes)
        chosen = distinct(images)
        images, labels = images[chosen], labels.to(images.device, torch.long)[chosen]
    for name, network in (("defended", defended), ("substitute", substitute)):
        if network is not None and network is not model:
            check_network(name, network, images[:2], classes)
    return images, labels


def _restored(oracle: Callable[[Tensor, Tensor], Tensor], attacked: Tensor, clean: Tensor) -> Tensor:
    """What the oracle makes of attacked images (N, C, H, W), if these are images of the same shape."""
    images: object = oracle(attacked.clone(), clean.clone())
    if not isinstance(images, Tensor) or images.shape != clean.shape:
        raise ValueError(f"oracle must return images of shape {tuple(clean.shape)}, got {described(images)}")
    return images.to(clean)


def check_network(name: str, network: nn.Module, images: Tensor, classes: int) -> None:
    """Check that a network takes images, all at once, and has as many classes.

    Args:
        name: of the network in the message.
        network: a defense or a substitute.
        images: (N, C, H, W), two or more.
        classes: of the undefended model.

    Raises:
        ValueError: if not.
    """
    with evaluating(network) as classifier:
        try:
            logits = predict(classifier, classifier.filled(images))
        except Exception as error:
            raise ValueError(
                f"{name} must take the images of model, of shape {tuple(images.shape[1:])} each, and return logits; "
                f"it raised {describe_error(error)}"
            ) from error
    if logits.shape[1] != classes:
        raise ValueError(f"{name} must have the {classes} classes of model, got {logits.shape[1]} logits")
