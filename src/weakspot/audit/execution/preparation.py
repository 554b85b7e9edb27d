"""Before groups are computed: the model is loaded and tried, and the images are listed. From then on a run is fixed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from weakspot._checks import ModelError, NotFiniteError, first_line, quiet, warn
from weakspot._io.files import write_atomic
from weakspot._io.urls import exists
from weakspot.audit.execution.job import Job
from weakspot.audit.plan.attack_plan import ModelPlan
from weakspot.audit.plan.image_list import list_images
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.digests import file_digest
from weakspot.audit.store.records import LISTING
from weakspot.audit.store.run_info import ImageCounts, ModelInfo, RunInfo, changed_versions
from weakspot.classifier import Classifier, evaluating
from weakspot.models import load
from weakspot.models.probe import Watch
from weakspot.regions import read_region


def load_planned(model: ModelPlan) -> Classifier:
    """Load the classifier of a plan.

    Raises:
        ValueError: if it cannot be loaded, or does not accept images of its size.
    """
    classifier = load(
        model.spec,
        weights=model.weights,
        device=model.device,
        mean=model.mean,
        std=model.std,
        input_size=model.size,
        class_names=model.classes,
    )
    try:
        class_count(classifier)
    except ModelError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)[:120]
        size = " x ".join(str(side) for side in (classifier.channels, *classifier.input_size))
        raise ValueError(
            f"model {model.spec} must accept images of {size} (channels x height x width), got: {reason} (give its "
            "size, or mean with one value per channel)"
        ) from None
    return classifier


def class_count(classifier: Classifier) -> int:
    """The number of classes, found by passing a gray image."""
    gray = torch.full((1, classifier.channels, *classifier.input_size), 0.5, device=classifier.mean.device)
    with evaluating(classifier), torch.no_grad():
        return int(classifier(gray).shape[1])


def prepare(info: RunInfo, out: Path) -> tuple[Job, RunInfo]:
    """Load the model of a planned run, try what can be tried, and list the images."""
    import pyarrow.parquet as pq

    plan = info.plan
    if not any(exists(source) for source in plan.sources):
        raise FileNotFoundError(f"{plan.sources[0]} does not exist (give a file, folder or array)")
    classifier = load_planned(plan.model)
    count = class_count(classifier)
    if len(classifier.class_names) not in {0, count}:
        raise ValueError(
            f"classes must have {count} names for {classifier.name}, got {len(classifier.class_names)}"
        )
    # A region that cannot be made would otherwise fail after minutes of attacks.
    _try_regions(plan, classifier)
    listing = list_images(
        plan.sources,
        classifier.class_names,
        count,
        labels=plan.labels,
        limit=plan.limit,
        seed=plan.seed,
    )
    if not len(listing):
        raise ValueError(f"images must name at least one file, got none in {', '.join(plan.sources[:3])}")
    # The list is on the disk before run.json refers to its digest.
    write_atomic(out / LISTING, lambda draft: pq.write_table(listing, draft), durable=True)
    job, watch = Job.of(plan, classifier, listing), Watch(classifier)
    height, width = classifier.input_size
    info = replace(
        info,
        plan=job.plan,
        status="running",
        model=ModelInfo(classifier.name, watch.weights, count, (height, width), watch.probe),
        device=str(classifier.mean.device),
        images=ImageCounts(len(listing)),
        labels=dict(sorted(Counter(listing["label_from"].to_pylist()).items())),
        absent=tuple(source for source in plan.sources if not exists(source)),
        remarks=tuple(watch.remarks()),
        checksums={LISTING: file_digest(out / LISTING)},
    )
    info.write(out)
    return job, info


def _try_regions(plan: Plan, classifier: Classifier) -> None:
    """Raises ValueError if a region cannot be made, before anything expensive is computed."""
    texts = [str(spec.control_of) if spec.donor is not None else text for text, spec in plan.specs.items()]
    with quiet():
        # Noise rather than a flat image, which has no background to separate.
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, classifier.channels, *classifier.input_size, generator=generator)
        images = images.to(classifier.mean.device)
        labels = torch.zeros(1, dtype=torch.long, device=images.device)
        for text in dict.fromkeys(texts):
            try:
                read_region(text, classifier, images, labels, fraction=plan.fraction, seed=plan.seed)
            except NotFiniteError:
                continue  # rows of the records will state it
            except (ValueError, FileNotFoundError) as error:
                message = str(error)
                prefix = "" if message.startswith("region") else f"region {text!r} of regions: "
                raise ValueError(f"{prefix}{message}") from None


def check_same_model(info: RunInfo, classifier: Classifier) -> None:
    """Raise ValueError if the model is not the one the audit began with; warn if versions of libraries changed.

    Compared are the weights and, within a tolerance, the logits of fixed probe images.
    """
    watch, model, spec = Watch(classifier), info.model, info.plan.model.spec
    if model is None or watch.weights != model.fingerprint:
        raise ValueError(
            f"model {spec} must have the weights with which the audit began (fingerprint "
            f"{'none' if model is None else model.fingerprint}), got {watch.weights} (start another audit)"
        )
    if not watch.probe.agrees(model.probe):
        raise ValueError(
            f"model {spec} has the same weights as when the audit began but returns other logits, so its code, its "
            "normalization or a library has changed (start another audit)"
        )
    changes = changed_versions(info.versions)
    if changes:
        warn(f"versions have changed ({changes}); the last digits may differ", UserWarning)
