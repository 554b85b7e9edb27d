"""Inside the network: propagation, dissection, sensitivity, masking. Run: python -m benchmarks.inside [SECTION ...]

Sections: propagation (compared with forward passes and Captum's layer activations), dissection (compared with passes
over the data; memory for more images), spread (one-pixel successes, failures and random edits), sensitivity (units that
an attack changes more than noise of equal size), masking (masked units of ResNet-20, attacked again). All but
propagation need real data, and print a note without it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import real, sections
from benchmarks.timing import peak_of
from weakspot import (
    Pairs,
    attacks,
    build_concepts,
    defenses,
    load,
    propagation,
    propagation_study,
    sample_images,
    unit_sensitivity,
)
from weakspot.attribution.hooks import spatial_layers
from weakspot.budgets import Linf
from weakspot.classifier import Classifier, as_classifier, evaluating
from weakspot.dissection import ConceptSet, dissect_layers
from weakspot.dissection.concepts import image_batches
from weakspot.dissection.sensitivity import equal_noise
from weakspot.fusion import fused
from weakspot.statistics import proportion_interval

ROUNDS = 9
LAYERS = ("_blocks.10", "_blocks.15")


def seconds(job: Callable[[], object]) -> float:
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun


def spread_pairs(count: int = 8) -> tuple[Classifier, Pairs]:
    """The embedded network and pairs of photographs with noise; the cost does not depend on the attack."""
    model = load("efficientnet_lite0", device="cpu")
    images = torch.cat([sample_images()[0], sample_images()[0].flip(3)])[:count]
    noise = 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return model, Pairs.of(model, images, (images + noise).clamp(0, 1))


def propagation_section() -> None:
    """Seconds and memory of propagation, compared with two forward passes, batch 8."""
    model, pairs = spread_pairs()
    with evaluating(model) as classifier:
        layers = list(spatial_layers(classifier, pairs.clean[:1]))

    def bare() -> None:
        with torch.inference_mode():
            model(pairs.clean)
            model(pairs.adversarial)

    def bare_fused() -> None:
        with evaluating(model) as classifier, fused(classifier, pairs.clean[:1]), torch.inference_mode():
            for images in (pairs.clean, pairs.adversarial):
                for part in images.split(4):
                    classifier(part)

    jobs: dict[str, Callable[[], object]] = {
        "two plain forward passes": bare,
        "two plain forward passes, fused, at the best batch": bare_fused,
        f"propagation, {len(layers)} layers": lambda: propagation(model, pairs),
        "propagation, the last layer": lambda: propagation(model, pairs, layers=layers[-1:]),
    }
    captum = _captum(model, pairs)
    if captum is not None:
        jobs["Captum LayerActivation, the same layers, and the maxima"] = captum
    for job in jobs.values():
        job()
    times = [[seconds(job) for job in jobs.values()] for _ in range(ROUNDS)]
    print("\nEfficientNet-Lite0, 8 pairs at 224 x 224, medians of 9 rounds\n")
    print("| job | seconds | x plain |\n|---|---|---|")
    for place, name in enumerate(jobs):
        median = statistics.median(row[place] for row in times)
        ratio = statistics.median(row[place] / row[0] for row in times)
        print(f"| {name} | {median:.3f} | {ratio:.2f} |", flush=True)
    print("\n| job, alone in its process | peak memory, MB | added by the job, MB |\n|---|---|---|")
    for name in ("bare", "propagation"):
        print(f"| {name} | " + _alone("memory", name) + " |", flush=True)


def _captum(model: Classifier, pairs: Pairs) -> Callable[[], object] | None:
    """The same maps from the whole activations that Captum returns, for modules that are called once."""
    try:
        from captum.attr import LayerActivation
    except ImportError:
        return None
    with evaluating(model) as classifier:
        names = [name for name in spatial_layers(classifier, pairs.clean[:1]) if "(call" not in name]
    modules: list[nn.Module] = [model.network.get_submodule(name) for name in names]

    def job() -> None:
        with torch.no_grad():
            clean, adversarial = (
                LayerActivation(model, modules).attribute(images)
                for images in (pairs.clean, pairs.adversarial)
            )
            for first, second in zip(clean, adversarial, strict=True):
                first, second = (value[0] if isinstance(value, tuple) else value for value in (first, second))  # noqa: PLW2901
                activation_change = (first - second).abs()
                activation_change.amax(1), activation_change.mean(1), first.abs().flatten(1).amax(1)

    return job


def memory(kind: str) -> None:
    """Print the peak memory of one job, in its own process."""
    model, pairs = spread_pairs()

    def bare() -> None:
        with torch.inference_mode():
            model(pairs.clean)
            model(pairs.adversarial)

    peak, more = peak_of(bare if kind == "bare" else lambda: propagation(model, pairs))
    print(f"{peak:.0f} | {more:.0f}")


def _alone(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.inside", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def camvid(folder: Path, count: int | None = None) -> Path:
    """CamVid in the layout of Broden, the first `count` images."""
    source = real.FOLDER / "camvid"
    whole = build_concepts(
        source / "images",
        folder / "camvid",
        masks=source / "labels",
        names=source / "classes.txt",
        void=(11,),
    )
    if count is not None:
        table = (whole / "index.csv").read_text().splitlines()
        (whole / "index.csv").write_text("\n".join(table[: count + 1]) + "\n")
    return whole


def dissection_section() -> None:
    """Two layers on CamVid, compared with passes over the data; memory for 60 to 233 images."""
    if not real.available():
        return
    model = load("efficientnet_lite0", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        dataset = camvid(Path(folder))
        concepts = ConceptSet.open(dataset)

        def bare(*, reading: bool, fuse: bool = False) -> float:
            begun, spent = time.perf_counter(), 0.0
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if fuse:
                    stack.enter_context(fused(model, torch.zeros(1, 3, 224, 224)))
                for images, _ in image_batches(concepts, (224, 224), 3, 8, annotated=False):
                    start = time.perf_counter()
                    model(images)
                    spent += time.perf_counter() - start
            return time.perf_counter() - begun if reading else spent

        dissections = dissect_layers(model, LAYERS, dataset)
        rows = [
            (seconds(lambda: dissect_layers(model, LAYERS, dataset)), bare(reading=True) + bare(reading=True),
             bare(reading=False) + bare(reading=False), bare(reading=True, fuse=True) + bare(reading=True, fuse=True))
            for _ in range(3)
        ]  # fmt: skip
        own, whole, forward, quick = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"\nDissection of {' and '.join(LAYERS)} of EfficientNet-Lite0 on CamVid, {len(concepts)} images\n"
        )
        print("| job | seconds | dissection is |\n|---|---|---|")
        print(f"| dissection | {own:.1f} | |")
        print(f"| two plain passes, reading the images included | {whole:.1f} | {own / whole:.2f} |")
        print(f"| two plain passes, network alone | {forward:.1f} | {own / forward:.2f} |")
        print(f"| two plain passes, fused, reading the images included | {quick:.1f} | {own / quick:.2f} |")
        for layer in LAYERS:
            detectors = dissections[layer].units.dropna(subset=["concept"])
            counts = detectors.groupby("concept")["iou"].agg(["size", "max"])
            best = ", ".join(
                f"{name} {row['size']:.0f} (best {row['max']:.3f})" for name, row in counts.iterrows()
            )
            print(
                f"\n{layer}: {len(detectors)} of {len(dissections[layer].units)} units detect a concept: "
                f"{best or 'none'}"
            )
    print("\n| images | peak memory, MB | added by the job, MB |\n|---|---|---|")
    for count in (60, 120, 233):
        print(f"| {count} | {_alone('dissection_memory', str(count))} |", flush=True)


def dissection_memory(count: str) -> None:
    """Print the peak memory of dissecting `count` images, in its own process."""
    model = load("efficientnet_lite0", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        dataset = camvid(Path(folder), int(count))
        peak, more = peak_of(lambda: dissect_layers(model, LAYERS, dataset))
    print(f"{peak:.0f} | {more:.0f}")


def spread_section() -> None:
    """How far one-pixel changes spread in ResNet-20: successes, failures, random edits."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", 320)
    pairs = attacks.few_pixel(model, images, labels, method="guided")
    study = propagation_study(model, pairs)
    last = study.table[study.table["layer"] == study.layers[-1]]
    print(
        "\nOne pixel, ResNet-20 on CIFAR-10, the last layer: share of its sites that change by over 10% of its peak,"
    )
    print("and largest change over that peak; means over images with 95% intervals\n")
    print(sections.table(last.drop(columns=["depth"])))
    print(
        "\nPublished (arXiv 1902.02947, as recalled): one pixel reaches the last layer and spreads, near the layer's "
        "own maximum; a replay on ResNet-32 had 44% of sites for successes and 38% for failures."
    )


def masking_section(count: int = 300) -> None:
    """Sensitive units of ResNet-20 masked: clean, transferred and new attacks, with random and most active units."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", 2 * count)
    chosen_on, judged = (images[:count], labels[:count]), (images[count:], labels[count:])

    def attack(network: nn.Module, batch: Tensor, wanted: Tensor) -> Pairs:
        return attacks.pgd(network, batch, wanted, budget=Linf(1 / 255), steps=20)

    layer = list(spatial_layers(as_classifier(model), images[:1]))[-1]
    table = unit_sensitivity(model, layer, attack(model, *chosen_on))
    print(
        f"\nResNet-20, {layer}, {len(table)} units; PGD-20, 1/255; units by sensitivity on {count} other images,"
    )
    print(f"judged on {count}\n")
    moved = table[table["p_value"] <= 0.05].sort_values("sensitivity", ascending=False)
    result = defenses.masking(
        model, layer, moved["unit"].head(round(0.2 * len(table))).tolist(), *judged, attack=attack
    )
    print(sections.table(result) + f"\n\n{defenses.masking_sentence(result)}\n", flush=True)


def sensitivity_section(count: int = 200) -> None:
    """Units of ResNet-20 that an attack, or noise of equal size, changes more than noise of equal size does."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", count)
    pairs = attacks.pgd(model, images, labels, budget=Linf(2 / 255), steps=20)
    fake = Pairs.of(model, images, equal_noise(pairs, 0, seed=11)[0], labels)
    rows = []
    for layer in ("body.layer1", "body.layer2", "body.layer3"):
        for name, one in (("PGD-20, 2/255", pairs), ("noise of that size", fake)):
            table = unit_sensitivity(model, layer, one)
            moved = proportion_interval((table["p_value"] <= 0.05).to_numpy())
            medians = (float(table[column].median()) for column in ("sensitivity", "noise"))
            rows.append([layer, name, len(table), *moved, *medians])
    columns = ["layer", "attack", "units", "moved", "low", "high", "median sensitivity", "median under noise"]
    print(
        f"\nResNet-20, {count} correct CIFAR-10 test images; fooled: PGD {pairs.success.float().mean():.3f}, ",
        end="",
    )
    print(f"noise {(fake.targets != labels).float().mean():.3f}\n")
    print(sections.table(pd.DataFrame(rows, columns=columns)))


SECTIONS = {
    "propagation": propagation_section,
    "dissection": dissection_section,
    "spread": spread_section,
    "sensitivity": sensitivity_section,
    "masking": masking_section,
}
ALONE = {"memory": memory, "dissection_memory": dissection_memory}

if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ALONE:
        ALONE[sys.argv[1]](sys.argv[2])
    else:
        sections.run(SECTIONS)
