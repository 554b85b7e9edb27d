"""An attack inside a mask and the same attack at a place of equal area, side by side, watched and stoppable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot._checks import collected_warnings
from weakspot.attacks import AttackOptions, stored
from weakspot.attacks.observers import AttackEndedError, observed
from weakspot.classifier import evaluating
from weakspot.explorer.attack_order import Order
from weakspot.explorer.attack_progress import NORMS, SIDES, Pause, Progress
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import (
    Message,
    RequestError,
    Send,
    finite,
    floats,
    mask_text,
    picture_text,
    with_cautions,
)
from weakspot.explorer.place_masks import MOST_SHARED, control_of, describe
from weakspot.pairs import AttackResult
from weakspot.statistics.number_format import number, percent, size_of_change


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
    exhibit.masks = tuple(masks)
    exhibit.pair = result[0]
    exhibit.attacks += 1
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
    return {
        **bench.judged(exhibit, logits),
        "success": bool(result.success[0]),
        "linf": finite(NORMS["linf"](change)),
        "pixels": int((change != 0).any(0).sum()),
        "png": picture_text(result.adversarial[0]),
        "difference": floats(change.mean(0)),
    }


def pair_message(bench: Bench, exhibit: Exhibit) -> Message:
    """Both sides of the last attack on an image."""
    logits = exhibit.pair_logits
    assert exhibit.pair is not None  # noqa: S101 - callers have one
    assert logits is not None  # noqa: S101
    control = exhibit.control
    return {
        "pair": exhibit.attacks,
        "attack": side_message(bench, exhibit, exhibit.pair, logits[0]),
        "control": None if control is None else side_message(bench, exhibit, control, logits[1]),
        "masks": None
        if control is None
        else {side: mask_text(one) for side, one in zip(SIDES, exhibit.masks, strict=True)},
        "sentence": exhibit.sentence,
        "how": exhibit.how,
    }


# ---------------------------------------------------------------- sentences


@dataclass(frozen=True)
class SideOutcome:
    """What came of one side.

    Attributes:
        success: whether the image fools the classifier.
        success_8bit: whether its 8-bit file does.
        predicted: class of the image.
        margin: the label's logit less the largest other one.
        size: of the change, for attacks that look for the smallest one; else None.
        norm: of `size`.
        target: the class to reach, by name; None if leaving the label is enough.
    """

    success: bool
    success_8bit: bool
    predicted: str
    margin: float
    size: float | None = None
    norm: str = "linf"
    target: str | None = None

    def __str__(self) -> str:
        margin = f"margin {number(self.margin)}"
        if not self.success:
            failed = "not fooled" if self.target is None else f"{self.target} not reached"
            return f"{failed}, {self.predicted} ({margin})"
        by = "" if self.size is None else f" with a change of {size_of_change(self.size, self.norm)}"
        rounded = "" if self.success_8bit else ", but not once rounded to an 8-bit file"
        return f"fooled{by}, {self.predicted} ({margin}){rounded}"


def outcome_sentence(
    mask: SideOutcome,
    control: SideOutcome | None,
    *,
    area: float,
    shared: float | None = None,
    needless: str = "",
    stopped: bool = False,
) -> str:
    """The pair in a few sentences, which claim no more than one place can show.

    Args:
        mask: inside the mask.
        control: at the place of equal area; None if there is none.
        area: fraction of the image in the mask.
        shared: fraction of the mask's pixels that are in the control, too, if that is much.
        needless: why the image needs no change; empty if it does.
        stopped: whether the attack was ended early.
    """
    if needless:
        return f"The image is {needless} without an attack, so that no place needs to change."
    start = "Stopped early. " if stopped else ""
    if control is None:
        none = (
            ""
            if mask.success
            else " No change was found that is enough; this does not mean that none exists."
        )
        return f"{start}Whole image: {mask}.{none}"
    both = f"Inside the mask, {percent(area)} of the image: {mask}. At a place of equal area: {control}."
    if shared is not None:
        return f"{start}{both} The two places share {percent(shared)} of their pixels, so comparing them says little."
    return f"{start}{both} {_compared(mask, control)}"


def _compared(mask: SideOutcome, control: SideOutcome) -> str:
    if mask.success and control.success:
        if mask.size is None or control.size is None:
            return "The mask is nothing special here: the other place was enough as well."
        if mask.size == control.size:
            return "The two places needed the same."
        less = "mask" if mask.size < control.size else "other place"
        return f"The {less} needed less; one other place is no test."
    if mask.success:
        return "Only the mask was enough; one other place is no test."
    if control.success:
        return "Only the other place was enough; inside the mask, no change was found that is."
    return "At neither place was a change found that is enough; this does not mean that none exists."
