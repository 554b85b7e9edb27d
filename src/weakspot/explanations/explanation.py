"""Explain: run analyses on pairs and keep what they found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning, check_classes, warn_once
from weakspot._io.files import write_whole
from weakspot.classifier import Classifier, evaluating, margin, predict
from weakspot.explanations.agreement import other_images
from weakspot.explanations.analysis import (
    Analysis,
    Picture,
    Series,
    check_pairs,
    declared,
    find_analyses,
    rivals,
    settled,
)
from weakspot.pairs import AttackResult, Pairs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Explanation:
    """Scores and maps of N pairs, and what is needed to show them.

    Attributes:
        scores: one row per pair: image, label, target and adversarial_class (class names), success,
            success_8bit (of a picture
            file), confidences, sizes of the perturbation, then the scores of every analysis.
        maps: name to (N, 1, H, W), of every analysis.
        pairs: what was explained, on the CPU.
        analyses: name to what each analysis returned.
        model: the classifier's name.
        class_names: names of label and of target, one of each per pair.
        made: how it came about (budget, region, seed, command, versions), for the reader.
    """

    scores: pd.DataFrame
    maps: Mapping[str, Tensor]
    pairs: Pairs
    analyses: Mapping[str, Analysis]
    model: str
    class_names: Sequence[tuple[str, str]]
    made: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

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

    def verdict(self, index: int = 0) -> str:
        """What happened to one image, in plain words, with number, chance and doubt."""
        from weakspot.report.sentences import verdict

        return verdict(self, index)

    def figure(self, index: int = 0) -> Figure:
        """A matplotlib figure of one pair: both images, their difference and every map with its scale."""
        from weakspot.report.figures import figure

        return figure(self, index)

    def to_html(self, path: Path | str) -> Path:
        """Write one self-contained page; returns its path."""
        from weakspot.report.explanation_page import page

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = page(self)
        write_whole(path, lambda draft: draft.write_text(content, "utf-8"))
        return path

    def _repr_html_(self) -> str:
        from weakspot.report.explanation_page import notebook_frame

        return notebook_frame(self)


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
    progress: Callable[[float], None] | None = None,
) -> Explanation:
    """Where each perturbation acts, and whether the network was looking there.

    Args:
        model: any classifier; left as it was.
        pairs: from an attack, or `Pairs.of(model, clean, adversarial)`.
        analyses: names from the entry-point group "weakspot.analyses"; all that are installed where not given.
        seed: handed to every analysis.
        names: what to call each image.
        made: what the report should say of how the pairs came about.
        reference: (R, C, H, W) other images of the same source as the pairs. Whether an attack acts where the network
            looks can be tested from 19 other images on, those of the batch and these.
        compare: False leaves out the scores that depend on the other images of the batch, such as p values, so that
            parts of a batch have the scores of the whole.
        progress: called with the share done, 0 to 1.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> from weakspot.attacks import pgd
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> pairs = pgd(model.eval(), torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), steps=2)
    >>> explain(model, pairs, names=["first", "second"]).scores["image"].tolist()
    ['first', 'second']
    """
    import pandas as pd

    check_pairs(pairs, model)
    if names is not None and len(names) != len(pairs):
        raise ValueError(f"names has {len(names)} entries; accepted is one for each of {len(pairs)} pairs")
    functions = find_analyses(analyses)
    if reference is not None and not any(declared(each, {"reference": None}) for each in functions.values()):
        raise ValueError(
            "analyses must name one that compares images if there is a reference (ssim, overlap, promotion), "
            f"got {', '.join(functions) or 'none'}"
        )
    with evaluating(model) as classifier:
        pairs = settled(classifier, pairs)
        others = None if reference is None else other_images(classifier, pairs, reference)
        options = {"reference": others, "compare": compare}
        base, losing = _base_scores(classifier, pairs, names)
        found: dict[str, Analysis] = {}
        for number, (name, function) in enumerate(functions.items()):
            analysis = function(classifier, pairs, seed=seed, **declared(function, options))
            found[name] = _checked(name, analysis, len(pairs))
            if progress is not None:
                progress((number + 1) / len(functions))
    found = _unlike(found, base)
    class_names = [
        (classifier.class_name(int(own)), classifier.class_name(int(other)))
        for own, other in zip(pairs.labels, losing, strict=True)
    ]
    return Explanation(
        scores=pd.concat([base, *(a.scores.set_axis(base.index) for a in found.values())], axis=1),
        maps={
            name: maps.detach().cpu() for analysis in found.values() for name, maps in analysis.maps.items()
        },
        pairs=pairs.to("cpu"),
        analyses=found,
        model=classifier.name,
        class_names=class_names,
        made=dict(made or {}),
    )


def _base_scores(
    classifier: Classifier, pairs: Pairs, names: Sequence[str] | None
) -> tuple[pd.DataFrame, Tensor]:
    """What is true of a pair whatever the analysis; and the class each label loses to."""
    import pandas as pd

    clean, adversarial = predict(classifier, pairs.clean), predict(classifier, pairs.adversarial)
    for name, classes in (("labels", pairs.labels), ("targets", pairs.targets)):
        check_classes(classes, len(pairs), clean.shape[1], name=name)
    losing = rivals(classifier, pairs)
    adversarial_class = adversarial.argmax(1)
    if len(classifier.class_names) not in {0, clean.shape[1]}:
        raise ValueError(
            f"class_names has {len(classifier.class_names)} names; {classifier.name} has {clean.shape[1]} classes"
        )
    _warn_of_randomness(classifier, pairs.clean[:1], clean[:1])
    success, success_8bit = _successes(classifier, pairs, adversarial_class)
    change = pairs.perturbation.flatten(1)
    before, after = clean.softmax(1), adversarial.softmax(1)

    def of(chances: Tensor, classes: Tensor) -> Tensor:
        return chances.gather(1, classes[:, None])[:, 0]

    numbers = {
        "success": success,
        "success_8bit": success_8bit,
        "asked_for_target": pairs.targets != adversarial_class,
        "label_clean": of(before, pairs.labels),
        "label_adversarial": of(after, pairs.labels),
        "target_clean": of(before, losing),
        "target_adversarial": of(after, losing),
        "adversarial_class_adversarial": of(after, adversarial_class),
        "margin_clean": margin(clean, pairs.labels),
        "margin_adversarial": margin(adversarial, pairs.labels),
        "linf": change.abs().amax(1),
        "l2": torch.linalg.vector_norm(change, dim=1),
    }
    words = {
        "image": list(names) if names is not None else [f"image {number}" for number in range(len(pairs))],
        "label": [classifier.class_name(int(index)) for index in pairs.labels],
        "target": [classifier.class_name(int(index)) for index in losing],
        "adversarial_class": [classifier.class_name(int(index)) for index in adversarial_class],
        "read_clean_as": [classifier.class_name(int(index)) for index in clean.argmax(1)],
    }
    return pd.DataFrame({**words, **{name: values.cpu().numpy() for name, values in numbers.items()}}), losing


def _successes(classifier: Classifier, pairs: Pairs, adversarial_class: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) bool twice: whether the images fool as they are, and stored with 8 bits."""
    known = pairs if isinstance(pairs, AttackResult) else None
    success = (
        (adversarial_class != pairs.labels) & (adversarial_class == pairs.targets)
        if known is None
        else known.success
    )
    if known is not None and known.success_8bit is not None:
        return success, known.success_8bit
    adversarial_class_8bit = predict(classifier, (pairs.adversarial * 255).round() / 255).argmax(1)
    # Without a target that was asked for, the pair's target is where the image lands; any other class will do too.
    reached = torch.where(
        pairs.targets == adversarial_class,
        adversarial_class_8bit != pairs.labels,
        adversarial_class_8bit == pairs.targets,
    )
    return success, reached & (adversarial_class_8bit != pairs.labels)


def _warn_of_randomness(classifier: Classifier, image: Tensor, logits: Tensor) -> None:
    again = predict(classifier, image)
    if not torch.allclose(again, logits, rtol=1e-2, atol=1e-3 * float(logits.abs().max())):
        warn_once(
            classifier.network,
            "random",
            f"{classifier.name} answers differently when it is given the same image twice: what is explained is one "
            "draw among many",
            ModelWarning,
        )


def _checked(name: str, analysis: Analysis, count: int) -> Analysis:
    if not isinstance(analysis, Analysis) or len(analysis.scores) != count:
        rows = f"{len(analysis.scores)} rows" if isinstance(analysis, Analysis) else type(analysis).__name__
        raise ValueError(
            f"analysis {name!r} returned {rows}; accepted is an Analysis with one row for each of {count} pairs"
        )
    return analysis


def _unlike(found: Mapping[str, Analysis], base: pd.DataFrame) -> dict[str, Analysis]:
    """The analyses, a score or map whose name is taken carrying its analysis's name in front, wherever it is named."""
    scores, maps = set(base.columns), {"difference"}
    unlike = {}
    for prefix, analysis in found.items():
        columns = {column: f"{prefix}_{column}" for column in analysis.scores if column in scores}
        taken = {name: f"{prefix}_{name}" for name in analysis.maps if name in maps}
        unlike[prefix] = replace(
            analysis,
            scores=analysis.scores.rename(columns=columns),
            meanings={columns.get(name, name): text for name, text in analysis.meanings.items()},
            maps={taken.get(name, name): tensor for name, tensor in analysis.maps.items()},
            pictures={taken.get(name, name): picture for name, picture in analysis.pictures.items()},
        )
        scores |= set(unlike[prefix].scores.columns)
        maps |= set(unlike[prefix].maps)
    return unlike
