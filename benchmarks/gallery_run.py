"""A run of any number of records for measurements and tests of the gallery, made in seconds without a network.

Every image has a label, a margin, and an outcome under each attack in each region. One class may be planted weak: it is
fooled more often than the others in one region. Otherwise outcomes do not depend on the class.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from weakspot.audit import AttackPlan, ModelPlan, Plan, Run, open_run
from weakspot.audit.store.digests import file_digest
from weakspot.audit.store.maps import CLEAN, MapBlock, MapWriter
from weakspot.audit.store.records import COLUMNS, LISTING, RECORDS, ROWS, SKIPPED
from weakspot.audit.store.run_info import ImageCounts, RunInfo

SHARD = 128
SIDE = 224
PLANTED = "planted 3"  # the name of the weak class, if there is one
ATTACKS = (AttackPlan("pgd", "linf:4/255"), AttackPlan("fgsm", "linf:4/255"))
SCORES = (
    "overlap_iou",
    "overlap_evidence",
    "locality_half",
    "promotion_gain",
    "ssim_slope",
    "restoration_half",
)


def synthetic_run(
    folder: Path,
    images: int,
    *,
    classes: int = 100,
    planted: float = 0.0,
    regions: tuple[str, ...] = ("none", "cam"),
    pictures: int = 0,
) -> Run:
    """Write a complete run and open it.

    Args:
        folder: of the run, which must not exist.
        images: number of images; every image has a record for each of two attacks and each region.
        classes: number of classes.
        planted: by how much more often, as a fraction, images of class 3 are fooled in the region cam.
        regions: of the plan.
        pictures: number of images at the start that have stored pictures of 224 x 224 pixels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    model = ModelPlan("efficientnet_lite0", size=(SIDE, SIDE))
    plan = Plan(
        ("/pictures",), model, ATTACKS, regions, analyses=(), maps=bool(pictures), shard=SHARD, group=SHARD
    ).resolved()
    records = _records(rng, images, classes, planted, plan)
    pq.write_table(
        pa.Table.from_pandas(records, preserve_index=False),
        folder / RECORDS,
        compression="zstd",
        row_group_size=ROWS,
    )
    empty = pa.array([], pa.large_string())
    pq.write_table(pa.table({"image": empty, "reason": empty}), folder / SKIPPED)
    first = records.drop_duplicates("index")
    listing = {
        "name": first["image"], "path": [f"/pictures/{name}".encode() for name in first["image"]], "row": -1,
        "label": first["label"].astype("int64"), "label_from": "folder", "error": "",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pandas(pd.DataFrame(listing), preserve_index=False), folder / LISTING)
    if pictures:
        _write_pictures(rng, folder, plan, images, pictures)
    digests = {name: file_digest(folder / name) for name in (RECORDS, SKIPPED, LISTING)}
    counts = ImageCounts(images, images, 0, 0)
    planned = RunInfo.planned(plan, "synthetic").to_json()
    info = {
        **planned,
        "status": "complete",
        "checksums": digests,
        "images": counts.__dict__,
        "labels": {"folder": images},
    }
    RunInfo.from_json(info).write(folder)
    return open_run(folder)


def _records(rng: np.random.Generator, images: int, classes: int, planted: float, plan: Plan) -> pd.DataFrame:
    cells = [(attack.label, attack.budget, region) for attack, region in plan.cells]
    index = np.repeat(np.arange(images), len(cells))
    which = np.tile(np.arange(len(cells)), images)
    label = rng.integers(0, classes, images)[index]
    correct = (rng.random(images) < 0.8)[index]
    region = np.array([cell[2] for cell in cells])[which]
    # A region shifted within the image, and one of the image, are fooled alike unless a weakness is planted.
    chance = np.where(region == "none", 0.6, 0.3) + planted * ((label == 3) & (region == "cam"))
    fooled = (rng.random(len(index)) < chance) | ~correct
    margin = rng.gamma(2.0, 1.5, images)[index] * np.where(correct, 1, -1)
    after = np.where(fooled, -1, 1) * rng.gamma(2.0, 1.0, len(index))
    wrong = (label + rng.integers(1, max(classes, 2), len(index))) % max(classes, 2)
    name = np.array(
        [f"class {number}" if number != 3 else PLANTED for number in range(max(classes, 2))], dtype=object
    )
    final = np.where(fooled, wrong, label)
    values: dict[str, object] = {
        "index": index,
        "image": np.array([f"{number:06d}.jpg" for number in range(images)], dtype=object)[index],
        "content": np.array([f"{number:016x}" for number in range(images)], dtype=object)[index],
        "attack": np.array([cell[0] for cell in cells], dtype=object)[which],
        "budget": np.array([cell[1] for cell in cells], dtype=object)[which],
        "region": region.astype(object),
        "region_fraction": np.where(region == "none", 1.0, 0.3),
        "label": label, "label_name": name[label], "label_from": "folder",
        "predicted": np.where(correct, label, wrong), "predicted_name": name[np.where(correct, label, wrong)],
        "correct": correct, "success": fooled, "success_8bit": fooled,
        "adversarial_class": final, "adversarial_class_name": name[final],
        "confidence_clean": 1 / (1 + np.exp(-margin)), "confidence_adversarial": 1 / (1 + np.exp(-np.abs(after))),
        "margin_clean": margin, "margin_adversarial": after,
        "linf": 4 / 255, "l2": rng.gamma(9.0, 0.2, len(index)), "l1": rng.gamma(9.0, 200.0, len(index)),
        "pixels": rng.integers(1, SIDE**2, len(index)), "ssim_windowed": rng.beta(20, 1, len(index)),
        "ssim_windowed_min": rng.beta(5, 1, len(index)), "n_forward": 21, "n_backward": 20,
        "attack_seconds": rng.gamma(4.0, 0.1, len(index)), "analysis_seconds": 0.0,
    }  # fmt: skip
    frame = pd.DataFrame({key: values.get(key) for key in COLUMNS}).astype(COLUMNS)
    for number, score in enumerate(SCORES):
        column = rng.normal(number, 1.0, len(index))
        column[rng.random(len(index)) < 0.01] = np.nan  # as where an analysis failed
        frame[score] = column
    return frame


def _write_pictures(rng: np.random.Generator, folder: Path, plan: Plan, images: int, pictures: int) -> None:
    """Smooth random pictures, which compress about as well as photographs."""
    writer = MapWriter(folder, images, [attack.label for attack in plan.attacks], plan.regions, SHARD)
    for number in range(-(-pictures // SHARD)):
        count = min(SHARD, images - number * SHARD)
        coarse = rng.integers(0, 256, (count, 3, SIDE // 8, SIDE // 8))
        clean = np.kron(coarse, np.ones((1, 1, 8, 8), np.int64)) + rng.integers(
            -9, 10, (count, 3, SIDE, SIDE)
        )
        clean = clean.clip(0, 255).astype(np.uint8)
        shape = (count, len(plan.attacks), len(plan.regions), 3, SIDE, SIDE)
        noise = rng.integers(-4, 5, shape, dtype=np.int16)
        adversarial = (clean[:, None, None] + noise).clip(0, 255).astype(np.uint8)
        about = {"kind": "picture", "title": "picture"}
        writer.write(number, {CLEAN: MapBlock(clean, about), "adversarial": MapBlock(adversarial, about)})
