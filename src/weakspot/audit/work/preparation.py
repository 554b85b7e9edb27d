"""Preparing: what is settled before the first image of an audit is touched, and written down."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weakspot._checks import ModelError, NotFiniteError, quiet
from weakspot._io.files import write_atomic
from weakspot._io.urls import exists
from weakspot.audit.plan.attack_plan import ModelPlan
from weakspot.audit.plan.image_list import list_images
from weakspot.audit.plan.plan import Plan, is_other, other_region
from weakspot.audit.store.integrity import file_digest
from weakspot.audit.store.records import LISTING, write_json
from weakspot.audit.store.run import ABOUT, KIND, SCHEMA, versions
from weakspot.audit.work.batches import usual_group
from weakspot.classifier import Classifier, evaluating
from weakspot.models import load
from weakspot.models.probe import Watch
from weakspot.regions import read_region

if TYPE_CHECKING:
    import pyarrow as pa


SHARDS = (16, 128)  # images, at least and at most: what is lost by a death, and what every shard costs anew
SHARD_PIXELS = 32 * 128 * 128  # of the images of a shard, whose maps must fit in memory


def load_planned(model: ModelPlan) -> Classifier:
    """The classifier that a plan names.

    Raises:
        ValueError: when it cannot be loaded, or does not take images of its size.
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
        said = str(error).strip().partition("\n")[0][:120]
        size = " x ".join(str(side) for side in (classifier.channels, *classifier.input_size))
        raise ValueError(
            f"model {model.spec} does not take images of {size} (channels x height x width): {said}; give its size, or "
            "mean with one value per channel"
        ) from None
    return classifier


def class_count(classifier: Classifier) -> int:
    """How many classes it tells apart."""
    gray = torch.full((1, classifier.channels, *classifier.input_size), 0.5, device=classifier.mean.device)
    with evaluating(classifier), torch.no_grad():
        return int(classifier(gray).shape[1])


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that an audit needs to go on.

    Attributes:
        plan: with nothing left open.
        classifier: as loaded.
        listing: of the images.
        about: what run.json says.
    """

    plan: Plan
    classifier: Classifier
    listing: pa.Table
    about: Mapping[str, Any]


def prepare(plan: Plan, out: Path, command: str) -> Prepared:
    """Load the model, try what can be tried, list the images; from then on the run is fixed."""
    import pyarrow.parquet as pq

    if not any(exists(source) for source in plan.sources):
        raise FileNotFoundError(f"{plan.sources[0]}: there is no such file or folder")
    classifier = load_planned(plan.model)
    count = class_count(classifier)
    if len(classifier.class_names) not in {0, count}:
        raise ValueError(
            f"classes has {len(classifier.class_names)} names; {classifier.name} has {count} classes"
        )
    _try_regions(plan, classifier)
    plan = replace(
        plan,
        group=classifier.fixed_batch or plan.group or usual_group(classifier),
        shard=plan.shard or usual_shard(classifier),
    )
    listing = list_images(
        plan.sources,
        classifier.class_names,
        count,
        labels=plan.labels,
        limit=plan.limit,
        seed=plan.seed,
    )
    if not len(listing):
        raise ValueError(f"{', '.join(plan.sources[:3])}: there are no files in it")
    write_atomic(out / LISTING, lambda draft: pq.write_table(listing, draft), durable=True)
    watch = Watch(classifier)
    about = {
        **beginning(plan, command),
        "status": "running",
        "model": {
            "name": classifier.name,
            "fingerprint": watch.weights,
            "classes": count,
            "input_size": list(classifier.input_size),
            "probe": watch.probe.as_mapping(),
        },
        "device": str(classifier.mean.device),
        "images": {"listed": len(listing)},
        "labels": _counted(listing["label_from"].to_pylist()),
        "absent": [source for source in plan.sources if not exists(source)],
        "remarks": watch.remarks(),
        "checksums": {LISTING: file_digest(out / LISTING)},
    }
    write_json(out / ABOUT, about)
    return Prepared(plan, classifier, listing, about)


def usual_shard(classifier: Classifier) -> int:
    """How many images are worked on and written together, unless a plan says otherwise."""
    height, width = classifier.input_size
    return max(SHARDS[0], min(SHARDS[1], SHARD_PIXELS // (height * width)))


def _try_regions(plan: Plan, classifier: Classifier) -> None:
    """Raises ValueError where a region cannot be made, before anything is computed."""
    with quiet():
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, classifier.channels, *classifier.input_size, generator=generator)
        images = images.to(classifier.mean.device)
        labels = torch.zeros(1, dtype=torch.long, device=images.device)
        for text in dict.fromkeys(other_region(text)[0] if is_other(text) else text for text in plan.regions):
            try:
                read_region(text, classifier, images, labels, fraction=plan.fraction, seed=plan.seed)
            except NotFiniteError:
                continue  # rows will say so
            except (ValueError, FileNotFoundError) as error:
                said = str(error)
                raise ValueError(
                    said if said.startswith("region") else f"regions has {text!r}: {said}"
                ) from None


def beginning(plan: Plan, command: str) -> dict[str, Any]:
    """What run.json says before anything is done."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "status": "planned",
        "command": command,
        "started": now(),
        "plan": plan.as_mapping(),
        "versions": {**versions(), **{name: version(name) for name in ("pyarrow", "zarr", "pandas")}},
        "host": {
            "name": platform.node(),
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _counted(words: list[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}
