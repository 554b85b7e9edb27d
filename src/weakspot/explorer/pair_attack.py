"""An attack inside a mask and the same attack at a place of equal area, side by side, watched and stoppable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot._checks import collected_warnings, unknown_choice
from weakspot.attacks import Attack, AttackOptions, find_attack, stored
from weakspot.attacks.observers import AttackEndedError, observed
from weakspot.budgets import Budget, read_budget
from weakspot.classifier import evaluating
from weakspot.explorer.attack_progress import NORMS, Pause, Progress, Send
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import (
    Message,
    Request,
    RequestError,
    finite,
    floats,
    mask_text,
    picture_text,
)
from weakspot.explorer.pair_sentences import SideOutcome, outcome_sentence, with_cautions
from weakspot.explorer.place_masks import MOST_SHARED, control_of, describe
from weakspot.pairs import AttackResult
from weakspot.statistics.number_format import counted

Settings = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, eq=False)
class Order:
    """What to attack, where, and how.

    Attributes:
        number: of the image.
        mask: bool (1, 1, H, W); None for the whole image.
        attack: by name.
        budget: None for an attack that has none.
        settings: arguments of the attack's own.
        target: the class to reach, or None.
        seed: of everything random, the control's place included.
    """

    number: int
    mask: Tensor | None
    attack: Attack
    budget: Budget | None
    budget_text: str | None
    settings: Settings
    target: int | None
    seed: int

    @staticmethod
    def read(bench: Bench, request: Request) -> Order:
        """Check a request before anything runs.

        Raises:
            ValueError: if a part of it is not valid, in one sentence.
        """
        number = request.whole("image", 0, 10**6, 0)
        exhibit = bench.exhibit(number)
        attack = find_attack(own_attack(request))
        text = request.text("budget", "linf:4/255") if _takes_budget(attack, request) else None
        settings = request.settings("options")
        for name in settings:
            if not attack.takes(name):
                raise RequestError(
                    unknown_choice(f"options of {attack.name}", name, sorted(attack.parameters))
                )
        classes = exhibit.logits.shape[1]
        target = request.whole("target", 0, classes - 1) if request.has("target") else None
        if target == exhibit.label:
            raise RequestError(
                f"target must be another class than the label, {bench.classifier.class_name(target)}"
            )
        if target is not None and "targets" not in attack.accepts:
            raise RequestError(f"{attack.name} takes no target")
        mask = request.mask("mask", exhibit.size)
        # A mask of everything leaves no other place, so it is treated as none.
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None and "region" not in attack.accepts:
            raise RequestError(f"{attack.name} takes no mask: it always acts on the whole image")
        return Order(
            number,
            mask,
            attack,
            None if text is None else read_budget(text),
            text,
            settings,
            target,
            request.whole("seed", 0, 2**53, 0),
        )

    def describe(self, bench: Bench) -> str:
        """The attack in one line."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        budget = [] if self.budget_text is None else [self.budget_text]
        toward = [] if self.target is None else [f"toward {bench.classifier.class_name(self.target)}"]
        where = "whole image" if self.mask is None else counted(int(self.mask.sum()), "brushed pixel")
        return ", ".join([self.attack.name, *settings, *budget, where, *toward, f"seed {self.seed}"])


def own_attack(request: Request) -> str:
    """The name of an attack that is installed with weakspot or a plug-in, not one of another library."""
    from weakspot.attacks import available_attacks

    return request.choice("attack", list(available_attacks()), "pgd")


def _takes_budget(attack: Attack, request: Request) -> bool:
    if request.has("budget") and not attack.takes_budget:
        raise RequestError(f"{attack.name} takes no budget")
    return attack.takes_budget and (attack.default_budget or request.has("budget"))


def attack_pair(bench: Bench, order: Order, send: Send, pause: Pause) -> Message:
    """Attack inside the mask and at the control; returns the last event and keeps the pair on the bench.

    Both sides are one batch of two images that go through the model one by one, so that each result is what the attack
    gives for its image and its place alone.

    Args:
        bench: with the image.
        order: what to do.
        send: takes the events.
        pause: called between evaluations; raises StopRequestedError to end the attack with the best so far.
    """
    exhibit = bench.exhibit(order.number)
    control = None if order.mask is None else control_of(order.mask, order.seed)
    mask = torch.ones(1, 1, *exhibit.size, dtype=torch.bool) if order.mask is None else order.mask
    masks = [mask] if control is None else [mask, control]
    send({"event": "start", **describe(mask, control)})
    sides = len(masks)
    norm = order.attack.norm(order.settings) if order.attack.minimizes else None
    size = NORMS[norm or "l2"] if order.attack.minimizes else None
    progress = Progress(send, pause, exhibit.pixels[0], size, sides)
    options = AttackOptions(
        budget=order.budget,
        region=None if order.mask is None else torch.cat([one.to(exhibit.pixels.device) for one in masks]),
        targets=None if order.target is None else exhibit.label_tensor.new_full((sides,), order.target),
        seed=order.seed,
        batch_size=1,
        progress=progress.advance,
    )
    images, labels = exhibit.pixels.repeat(sides, 1, 1, 1), exhibit.label_tensor.repeat(sides)
    stopped, logits = False, None
    try:
        with observed(progress), collected_warnings() as cautions:
            result = order.attack.run(bench.classifier, images, labels, options, order.settings)
    except AttackEndedError:
        stopped = True
        result, logits = _verified(bench, images, labels, options, progress)
    except TypeError as error:
        raise RequestError(f"{order.attack.name} failed with these options: {error}") from error
    progress.flush()
    exhibit.masks = (mask, control)
    exhibit.pair = result[0]
    exhibit.control = None if control is None else result[1]
    exhibit.pair_logits = bench.logits(result.adversarial) if logits is None else logits
    exhibit.how = order.describe(bench) + (", stopped early" if stopped else "")
    mine, *others = (
        _side_outcome(bench, exhibit, result[side], order, exhibit.pair_logits[side]) for side in range(sides)
    )
    exhibit.sentence = with_cautions(cautions) + outcome_sentence(
        mine,
        others[0] if others else None,
        area=float(mask.float().mean()),
        shared=_shared(mask, control),
        needless=_needless(bench, exhibit, order.target),
        stopped=stopped,
    )
    bench.state += 1
    return {"event": "done", "stopped": stopped, "state": bench.state, **pair_message(bench, exhibit)}


def _side_outcome(
    bench: Bench, exhibit: Exhibit, result: AttackResult, order: Order, logits: Tensor
) -> SideOutcome:
    norm = order.attack.norm(order.settings) or "l2"
    return SideOutcome(
        bool(result.success[0]),
        result.success_8bit is None or bool(result.success_8bit[0]),
        bench.classifier.class_name(int(logits.argmax())),
        bench.margin(exhibit, logits),
        NORMS[norm](result.perturbation[0]) if order.attack.minimizes else None,
        norm,
        None if order.target is None else bench.classifier.class_name(order.target),
    )


def _shared(mask: Tensor, control: Tensor | None) -> float | None:
    """The fraction of the mask's pixels that are in the control, too; None if there are few."""
    fraction = 0.0 if control is None else float((mask & control).sum() / mask.sum())
    return fraction if fraction > MOST_SHARED else None


def _needless(bench: Bench, exhibit: Exhibit, target: int | None) -> str:
    """What the clean image is classified as, if that is what the attack is to achieve; else empty."""
    predicted = int(exhibit.logits.argmax())
    if target is None:
        return "misclassified" if predicted != exhibit.label else ""
    return f"classified as {bench.classifier.class_name(target)}" if predicted == target else ""


def _verified(
    bench: Bench, images: Tensor, labels: Tensor, options: AttackOptions, progress: Progress
) -> tuple[AttackResult, Tensor]:
    """The best images so far as the result of an attack that was ended, judged by fresh forward passes.

    Returns:
        The result and the logits (N, K) of its images.
    """
    best = torch.stack(progress.best).to(images)
    with evaluating(bench.classifier):
        files, fits = stored(best, images, options.budget)
        logits, file_logits = bench.logits(torch.cat([best, files])).split(len(best))
    reached, reached_8bit = logits.argmax(1), file_logits.argmax(1)
    aims = options.targets
    success, success_8bit = (
        classes != labels if aims is None else classes == aims for classes in (reached, reached_8bit)
    )
    result = AttackResult(
        clean=images,
        adversarial=best,
        labels=labels,
        targets=reached if aims is None else aims,
        success=success,
        # With the two passes above; which of the observed passes had gradients is not known.
        n_forward=torch.tensor(progress.passes).to(labels) + 2,
        n_backward=torch.zeros_like(labels),
        success_8bit=success_8bit & fits,
        seed=torch.full_like(labels, options.seed),
    )
    return result, logits


def side_message(bench: Bench, exhibit: Exhibit, result: AttackResult, logits: Tensor) -> Message:
    """One side of a pair, with the logits (K,) of its adversarial image."""
    change = result.perturbation[0]
    sizes = {name: finite(NORMS[name](change)) for name in ("linf", "l2")}
    return {
        **bench.judged(exhibit, logits),
        "success": bool(result.success[0]),
        "success_8bit": None if result.success_8bit is None else bool(result.success_8bit[0]),
        **sizes,
        "pixels": int((change != 0).any(0).sum()),
        "n_forward": int(result.n_forward[0]),
        "n_backward": int(result.n_backward[0]),
        "png": picture_text(result.adversarial[0]),
        "difference": floats(change.mean(0)),
    }


def _mask_texts(mask: Tensor, control: Tensor | None) -> Message:
    return {"attack": mask_text(mask), **({} if control is None else {"control": mask_text(control)})}


def pair_message(bench: Bench, exhibit: Exhibit) -> Message:
    """Both sides of the last attack on an image."""
    logits = exhibit.pair_logits
    assert exhibit.pair is not None  # noqa: S101 - callers have one
    assert logits is not None  # noqa: S101
    control = exhibit.control
    return {
        "attack": side_message(bench, exhibit, exhibit.pair, logits[0]),
        "control": None if control is None else side_message(bench, exhibit, control, logits[1]),
        "masks": None if control is None or exhibit.masks is None else _mask_texts(*exhibit.masks),
        "sentence": exhibit.sentence,
        "how": exhibit.how,
    }
