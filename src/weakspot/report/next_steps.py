"""What to do next after an explanation: a reason that the findings support, and the exact command."""

from collections.abc import Mapping
from dataclasses import dataclass

from weakspot.explanations.explanation import Explanation
from weakspot.report.image_verdict import uncompared
from weakspot.statistics import LEAST_OTHERS, LEAST_REGION
from weakspot.statistics.number_format import counted

MOST = 4  # steps shown
# Of the change: if undoing so much stops most attacks, a defense that finds the place may help.
FEW_CELLS = 0.25


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        reason: why, in one sentence that ends with a colon.
        command: for the shell.
    """

    reason: str
    command: str


def next_steps(explanation: Explanation) -> list[Step]:
    """What the findings suggest, most specific first; at most `MOST` steps."""
    scores, made, noun = explanation.scores, explanation.made, explanation.noun
    options = _repeated(made)
    correct = scores[scores["read_clean_as"] == scores["label"]]
    fooled = correct[correct["success_8bit"]]
    failed = correct[~correct["success"] & ~correct["success_8bit"] & (correct["linf"] > 0)]
    failed = failed[~failed["asked_for_target"]]  # which may have ended in a third class
    steps = []
    if len(fooled) and made.get("region") == "background":
        steps += _background(_of(len(fooled), len(correct), len(scores), noun), options)
    elif 2 * len(fooled) > len(correct):
        steps.append(
            Step(
                f"{_of(len(fooled), len(correct), len(scores), noun)} fooled. Train a network on attacked images "
                "(a folder with one folder per class):",
                "weakspot train photos/ --size 64x64 --recipe full --out runs/full",
            )
        )
    if len(failed):
        none = f"The attack found no adversarial example for {counted(len(failed), noun)}"
        stronger = Step(
            f"{none}; this does not mean that none exists. Try the ensemble of attacks:",
            f"weakspot attack photos/ --attack ensemble{options} --out runs/ensemble",
        )
        if made.get("attack", "").startswith("ensemble"):
            stronger = Step(
                f"{none}; this does not mean that none exists. Search how much each place must change:",
                f"weakspot map photos/ --effort verified{options} --out runs/verified",
            )
        steps.append(stronger)
    # Of no image at all, the mean is NaN, which is not greater.
    if "necessary_fraction" in fooled and (fooled["necessary_fraction"] <= FEW_CELLS).mean() > 0.5:
        stopped = "the successful attack" if len(fooled) == 1 else "most of the successful attacks"
        steps.append(
            Step(
                f"Undoing a quarter of the change or less stops {stopped}. Test whether a defense can find the place "
                "by itself:",
                f"weakspot defend photos/ --defense neutralize{options}",
            )
        )
    images = len(set(explanation.images.tolist()))
    few = f"{counted(images)} {'is an example' if images == 1 else 'are examples'}, not a rate. "
    steps.append(
        Step(
            f"{few if images < LEAST_REGION else ''}Measure robust accuracy and weak regions on your own "
            f"photographs, at least {LEAST_REGION} of them:",
            f"weakspot audit photos/ --regions none,cam,background --controls{options} --out runs/first",
        )
    )
    if "smallest_square_side" not in scores:
        steps.append(
            Step(
                "Where each image is weak, whatever this attack did, was not looked for. Map it:",
                f"weakspot map photos/{options} --out runs/map",
            )
        )
    if uncompared(fooled):
        steps.append(
            Step(
                "To test whether attacks act where the network looks, compare with at least "
                f"{LEAST_OTHERS} other images of the same source:",
                f"weakspot explain photos/ --reference other-photos/{options} --out runs/compared",
            )
        )
    return steps[:MOST]


def _background(fooled: str, options: str) -> list[Step]:
    return [
        Step(
            f"{fooled} fooled by a change of the background alone. Train on images whose background is "
            "attacked (a folder with one folder per class):",
            "weakspot train photos/ --size 64x64 --recipe localized --out runs/localized",
        ),
        Step(
            "Whether the background is weaker than other places of its size is another question:",
            f"weakspot audit photos/ --regions background --controls{options} --out runs/background",
        ),
    ]


def _of(part: int, total: int, every: int, noun: str) -> str:
    """Some of the images that are classified as their label, out of all that were explained, and the verb."""
    noun = noun if total == every else f"correctly classified {noun}"
    if total == 1:
        return f"The {noun if total == every else f'one {noun}'} is"
    if part == total:
        return f"Both {noun}s are" if total == 2 else f"All {counted(total, noun)} are"
    return f"{part} of {counted(total, noun)} {'is' if part == 1 else 'are'}"


def _repeated(made: Mapping[str, str]) -> str:
    """The budget and the options of the model, to be given again; a placeholder for models made in Python."""
    if "command" not in made:
        return " --model my_package.models:build"
    return f" {made['options']}" if "options" in made else ""
