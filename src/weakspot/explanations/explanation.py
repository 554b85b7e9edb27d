"""`explain`: run analyses on pairs and collect their scores and maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot._checks import ModelWarning, check_seed, warn_once
from weakspot._io.files import write_atomic
from weakspot._memory import remembering
from weakspot._progress import ProgressOption, shown
from weakspot._rows import row_number
from weakspot.classifier import Classifier, evaluating, gives_again, predict
from weakspot.explanations.agreement import other_images
from weakspot.explanations.analysis import (
    FIRST,
    Analysis,
    Picture,
    Series,
    accepted_options,
    check_analysis,
    check_pairs,
    competing_classes,
    find_analyses,
    find_renderer,
    prepare_pairs,
    shapes,
    with_unique_names,
)
from weakspot.images import first_copies
from weakspot.logits import margin
from weakspot.pairs import AttackResult, Pairs
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Explanation:
    """Scores and maps of N pairs, with everything that is needed to show them.

    `verdict`, `figure` and `to_html` are drawn by `weakspot.report`, which registers its functions as entry points.

    Attributes:
        scores: one row per pair: image; label, target and adversarial_class (class names); success and success_8bit
            (whether the attack still fools after the image is stored in 8 bits); confidences; sizes of the
            perturbation; then the scores of every analysis.
        maps: name to (N, 1, H, W), of every analysis.
        pairs: the explained pairs, on the CPU.
        analyses: name to the result of each analysis.
        model: the classifier's name.
        class_names: names of the label and the target, one tuple per pair.
        made: how the pairs were made (budget, region, seed, command, versions), for the reader.
        seconds: name to the time that each analysis took.
    """

    scores: pd.DataFrame
    maps: Mapping[str, Tensor]
    pairs: Pairs
    analyses: Mapping[str, Analysis]
    model: str
    class_names: Sequence[tuple[str, str]]
    made: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        fooled = int(self.scores["success"].sum())
        return "\n".join(
            [
                f"Explanation of {counted(len(self), 'pair')} for {self.model}, {fooled} successful",
                f"  analyses: {', '.join(self.analyses) or 'none'}",
                f"  scores: {len(self.scores.columns)} columns",
                f"  maps: {shapes(self.maps)}",
            ]
        )

    @property
    def meanings(self) -> dict[str, str]:
        """Score name to one sentence, of every analysis."""
        return {name: text for analysis in self.analyses.values() for name, text in analysis.meanings.items()}

    @property
    def pictures(self) -> dict[str, Picture]:
        """Map name to how it is drawn, of every analysis."""
        return {
            name: analysis.pictures.get(name, Picture(name.replace("_", " ")))
            for analysis in self.analyses.values()
            for name in analysis.maps
        }

    @property
    def series(self) -> dict[str, Series]:
        """Name to maps along the layers, of every analysis."""
        return {
            name: series for analysis in self.analyses.values() for name, series in analysis.series.items()
        }

    def verdict(self, index: int | str = 0) -> str:
        """What happened to one image, in plain words, with the number, the chance level and the doubt.

        Args:
            index: the number or the name of the image.

        Raises:
            IndexError: if there is no image of this number.
            ValueError: if there is no image, or more than one, of this name.
        """
        return str(find_renderer("verdict")(self, self._row(index)))

    def figure(self, index: int | str = 0) -> Figure:
        """A matplotlib figure of one pair: both images, their difference and every map with its scale.

        Takes an index, and raises, as `verdict` does.
        """
        return cast("Figure", find_renderer("figure")(self, self._row(index)))

    @property
    def images(self) -> NDArray[np.int_]:
        """(N,) the number of each pair's clean image; several pairs may share one."""
        return first_copies(self.pairs.clean)

    @property
    def noun(self) -> str:
        """What a row of the scores is: "image", or "pair" if several rows share a clean image."""
        return "image" if len(set(self.images.tolist())) == len(self) else "pair"

    def _row(self, index: int | str) -> int:
        return row_number(index, [str(name) for name in self.scores["image"]], len(self))

    def to_html(self, path: Path | str) -> Path:
        """Write one self-contained page and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        page = str(find_renderer("page")(self))
        write_atomic(path, lambda draft: draft.write_text(page, "utf-8"))
        return path

    def _repr_html_(self) -> str:
        return str(find_renderer("notebook_frame")(self))


def explain(
    model: nn.Module,
    pairs: Pairs,
    *,
    analyses: Sequence[str] | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    made: Mapping[str, str] | None = None,
    reference: Tensor | None = None,
    compare: bool = True,
    progress: ProgressOption = None,
    on_analysis: Callable[[Explanation], None] | None = None,
) -> Explanation:
    """Show where each perturbation acts, and whether the network looks there.

    Args:
        model: any classifier. It is not changed.
        pairs: from an attack, or `Pairs.of(model, clean, adversarial)`.
        analyses: names from the entry-point group "weakspot.analyses". Default: all except "certificate".
        seed: passed to every analysis.
        names: the name of each image; by default those of the pairs.
        made: how the pairs were made, for the report.
        reference: (R, C, H, W) other images from the same source as the pairs. At least 19 other images, those of the
            batch and these together, are needed to test whether an attack acts where the network looks.
        compare: False omits the scores that depend on the other images of the batch, such as p values. Parts of a
            batch then have the same scores as the whole.
        progress: True for a bar on standard error or in the notebook, or a function of the fraction done.
        on_analysis: called after each analysis with the explanation so far; the one behind the verdict is first.

    Raises:
        ValueError: if an argument is invalid; the message names it.

    >>> from weakspot.attacks import pgd
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> pairs = pgd(model.eval(), torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), steps=2)
    >>> explain(model, pairs, names=["first", "second"]).scores["image"].tolist()
    ['first', 'second']
    """
    check_pairs(pairs, model)
    check_seed(seed)
    if names is not None and len(names) != len(pairs):
        raise ValueError(f"names must have one entry for each of {len(pairs)} pairs, got {len(names)}")
    names = names if names is not None else pairs.names or [f"image {row}" for row in range(len(pairs))]
    functions = find_analyses(analyses)
    compares = any(accepted_options(each, {"reference": None}) for each in functions.values())
    if reference is not None and not compares:
        raise ValueError(
            "analyses must include one that compares images if there is a reference (ssim, overlap, promotion), "
            f"got {', '.join(functions) or 'none'}"
        )
    results: dict[str, Analysis] = {}
    seconds: dict[str, float] = {}
    with (
        evaluating(model) as classifier,
        remembering(classifier),
        shown(progress, "explaining", total=len(functions), unit="analysis") as report,
    ):
        pairs = prepare_pairs(classifier, pairs).named(names)
        others = None if reference is None else other_images(classifier, pairs, reference)
        options = {"reference": others, "compare": compare}
        base, competing = _base_scores(classifier, pairs, names)

        def explanation() -> Explanation:
            done = {name: results[name] for name in functions if name in results}
            return _assembled(classifier, pairs, base, competing, done, made=made, seconds=seconds)

        for number, name in enumerate(sorted(functions, key=lambda name: name != FIRST), 1):
            function, started = functions[name], time.perf_counter()
            analysis = function(classifier, pairs, seed=seed, **accepted_options(function, options))
            results[name] = check_analysis(name, analysis, len(pairs))
            seconds[name] = time.perf_counter() - started
            if report is not None:
                report(number / len(functions))
            if on_analysis is not None:
                on_analysis(explanation())
        return explanation()


def _assembled(
    classifier: Classifier,
    pairs: Pairs,
    base: pd.DataFrame,
    competing: Tensor,
    results: Mapping[str, Analysis],
    *,
    made: Mapping[str, str] | None,
    seconds: Mapping[str, float],
) -> Explanation:
    """The explanation of the pairs by these analyses; `competing` (N,) are the classes that the labels compete with."""
    import pandas as pd

    results = with_unique_names(results, base)
    class_names = [
        (classifier.class_name(int(own)), classifier.class_name(int(other)))
        for own, other in zip(pairs.labels, competing, strict=True)
    ]
    return Explanation(
        scores=pd.concat([base, *(a.scores.set_axis(base.index) for a in results.values())], axis=1),
        maps={name: maps.detach().cpu() for a in results.values() for name, maps in a.maps.items()},
        pairs=pairs.to("cpu"),
        analyses=results,
        model=classifier.name,
        class_names=class_names,
        made=dict(made or {}),
        seconds=dict(seconds),
    )


def _base_scores(classifier: Classifier, pairs: Pairs, names: Sequence[str]) -> tuple[pd.DataFrame, Tensor]:
    """The scores that need no analysis, and (N,) the class that each label competes with."""
    import pandas as pd

    clean, adversarial = predict(classifier, pairs.clean), predict(classifier, pairs.adversarial)
    if len(classifier.class_names) not in {0, clean.shape[1]}:
        raise ValueError(
            f"class_names must have {clean.shape[1]} names, one for each class of {classifier.name}, got "
            f"{len(classifier.class_names)}"
        )
    competing = competing_classes(classifier, pairs)
    adversarial_class = adversarial.argmax(1)
    _warn_of_randomness(classifier, pairs.clean[:1], clean[:1])
    success, success_8bit = _successes(classifier, pairs, adversarial_class)
    change = pairs.perturbation.flatten(1)
    before, after = clean.softmax(1), adversarial.softmax(1)

    def of(confidences: Tensor, classes: Tensor) -> Tensor:
        return confidences.gather(1, classes[:, None])[:, 0]

    def class_names(classes: Tensor) -> list[str]:
        return [classifier.class_name(int(index)) for index in classes]

    numbers = {
        "success": success,
        "success_8bit": success_8bit,
        "asked_for_target": pairs.targets != adversarial_class,
        "label_clean": of(before, pairs.labels),
        "label_adversarial": of(after, pairs.labels),
        "target_clean": of(before, competing),
        "target_adversarial": of(after, competing),
        "adversarial_class_adversarial": of(after, adversarial_class),
        "margin_clean": margin(clean, pairs.labels),
        "margin_adversarial": margin(adversarial, pairs.labels),
        "linf": change.abs().amax(1),
        "l2": torch.linalg.vector_norm(change, dim=1),
    }
    texts = {
        "image": list(names),
        "label": class_names(pairs.labels),
        "target": class_names(competing),
        "adversarial_class": class_names(adversarial_class),
        "read_clean_as": class_names(clean.argmax(1)),
    }
    columns = {name: values.cpu().numpy() for name, values in numbers.items()}
    return pd.DataFrame({**texts, **columns}), competing


def _successes(classifier: Classifier, pairs: Pairs, adversarial_class: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) bool each: whether the images fool the model as float32, and after storage in 8 bits."""
    if isinstance(pairs, AttackResult):
        success = pairs.success
        if pairs.success_8bit is not None:
            return success, pairs.success_8bit
    else:
        success = (adversarial_class != pairs.labels) & (adversarial_class == pairs.targets)
    # The image as a file stores it: rounded to the nearest of 256 levels.
    class_8bit = predict(classifier, (pairs.adversarial * 255).round() / 255).argmax(1)
    # An untargeted pair has the reached class as its target: any other wrong class is a success as well. A target that
    # was asked for and not reached in float32 must be reached in 8 bits.
    reached = torch.where(
        pairs.targets == adversarial_class, class_8bit != pairs.labels, class_8bit == pairs.targets
    )
    return success, reached & (class_8bit != pairs.labels)


def _warn_of_randomness(classifier: Classifier, image: Tensor, logits: Tensor) -> None:
    if not gives_again(classifier, image, logits):
        warn_once(
            classifier.network,
            "random",
            f"{classifier.name} returns different logits for the same image: the explanation shows one random draw of "
            "many",
            ModelWarning,
        )
