"""Small edits: LocalEdits compared with whole forward passes, in one run. Run: python -m benchmarks.edits [SECTION ...]
[--json FILE]

Sections: throughput (edits of one pixel and of a cell, every network), sweep (all pixels of CIFAR-10 images),
promotion (cells of a photograph), locality (successful pixels moved to other sites). Sections without their real data
print a note.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks import peers, real, sections
from benchmarks.records import recorded
from benchmarks.timing import peak_gigabytes
from weakspot import Pairs, attacks, load, locality, promotion_suppression, sample_images
from weakspot.classifier import Classifier, evaluating
from weakspot.edits import Edits, prepare
from weakspot.fusion import fused

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
ROUNDS = 7


def bottleneck_network() -> nn.Module:
    """A network of the shape of ResNet-50 (He et al. 2016, arXiv 1512.03385) with random weights."""
    torch.manual_seed(0)

    class Bottleneck(nn.Module):
        def __init__(self, given: int, inner: int, stride: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(given, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(True),
                nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(True),
                nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner),
            )  # fmt: skip
            self.shortcut = (
                nn.Sequential(nn.Conv2d(given, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))
                if given != 4 * inner or stride != 1
                else nn.Identity()
            )

        def forward(self, maps: Tensor) -> Tensor:
            return torch.relu(self.layers(maps) + self.shortcut(maps))

    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    given = 64
    for inner, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(depth):
            layers.append(Bottleneck(given, inner, stride if number == 0 else 1))
            given = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, 1000)).eval()


def seconds(job: Callable[[], object]) -> float:
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun


def best_batch(forward: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """The batch size with the lowest cost per image; each is tried three times, in turn."""
    largest = 32 if image.shape[2] > 64 else 128
    sizes = [size for size in BATCHES if size <= largest]
    batches = {size: image.expand(size, -1, -1, -1).clone() for size in sizes}
    cost: dict[int, list[float]] = {size: [] for size in sizes}
    with torch.inference_mode():
        for batch in batches.values():
            forward(batch)
        for _ in range(3):
            for size, batch in batches.items():
                cost[size].append(seconds(lambda batch=batch: forward(batch)) / size)  # type: ignore[misc]
    return min(sizes, key=lambda size: statistics.median(cost[size]))


def throughput() -> None:
    """Edits by windows, by whole forward passes of the fused network, and by those of the original module."""
    photograph = sample_images()[0][:1]
    cases: dict[str, tuple[nn.Module, Tensor, tuple[int, int]]] = {
        "EfficientNet-Lite0": (load("efficientnet_lite0", device="cpu"), photograph, (1, 16)),
        "ResNet-50's shape, random weights": (bottleneck_network(), photograph, (1, 16)),
    }
    if real.available():
        mobile, images, _ = real.correct("mobilenet_v2_1.0_224", 1)
        cases["MobileNetV2"] = (mobile, images, (1, 16))
        for depth in (20, 56):
            model, images, _ = real.first(f"cifar10_resnet{depth}", 1)
            cases[f"ResNet-{depth}, CIFAR-10"] = (model, images, (1, 4))
    print("\nEdits per second, and the ratio to whole forward passes (median over rounds)\n")
    print(
        "| network | edit | windows | fused, whole | x fused | original | x original | error, of logit range |"
    )
    print("|---" * 8 + "|", flush=True)
    for name, (model, image, sizes) in cases.items():
        for size in sizes:
            print(f"| {name} | {size} x {size} | " + " | ".join(_row(model, image, size)) + " |", flush=True)
    print(f"\nPeak memory: {peak_gigabytes():.2f} GB")


def _row(model: nn.Module, image: Tensor, size: int) -> Sequence[str]:
    count = 1024 if image.shape[2] <= 64 else 384
    generator = torch.Generator().manual_seed(0)
    height, width = image.shape[2:]
    tops = torch.randint(0, height - size + 1, (count,), generator=generator)
    lefts = torch.randint(0, width - size + 1, (count,), generator=generator)
    patches = torch.rand(count, image.shape[1], size, size, generator=generator)
    owners = torch.zeros(count, dtype=torch.long)
    few = count // 4  # edits for the slower ways, whose cost per edit does not depend on their number
    edited = image.expand(few, -1, -1, -1).clone()
    for number, (top, left) in enumerate(zip(tops[:few].tolist(), lefts[:few].tolist(), strict=True)):
        edited[number, :, top : top + size, left : left + size] = patches[number]
    with evaluating(model) as classifier:
        prepared = prepare(classifier, image)
        if prepared.recording is None:
            sys.exit(f"{classifier.name} cannot be recorded: {prepared.reason}")
        edits = Edits(classifier, image, prepared, windows=True)
        with fused(classifier, image):
            batch_fused = best_batch(classifier, image)
        batch_plain = best_batch(classifier, image)

        def by_windows() -> Tensor:
            return edits.logits(owners, tops, lefts, patches)

        def whole(batch: int) -> Tensor:
            with torch.inference_mode():
                return torch.cat([classifier(part) for part in edited.split(batch)])

        def whole_fused() -> Tensor:
            with fused(classifier, image):
                return whole(batch_fused)

        result, expected = by_windows()[:few], whole(batch_plain)
        whole_fused()
        error = float((result - expected).abs().max() / (expected.max() - expected.min()))
        times = [
            (
                seconds(by_windows) / count,
                seconds(whole_fused) / few,
                seconds(lambda: whole(batch_plain)) / few,
            )
            for _ in range(ROUNDS)
        ]
    rates = [1 / statistics.median(column) for column in zip(*times, strict=True)]
    ratios = [statistics.median(row[place] / row[0] for row in times) for place in (1, 2)]
    return (
        f"{rates[0]:.0f}",
        f"{rates[1]:.0f} (batch {batch_fused})",
        f"{ratios[0]:.2f}",
        f"{rates[2]:.0f} (batch {batch_plain})",
        f"{ratios[1]:.2f}",
        f"{error:.0e}",
    )


def sweep(count: int = 40) -> None:
    """Every pixel of the images of the attacks benchmark, and the evolution of torchattacks on the same images."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", count)
    jobs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "pixel_sweep, corners": lambda i, y: attacks.pixel_sweep(model, i, y).success,
        "pixel_sweep, refined": lambda i, y: attacks.pixel_sweep(model, i, y, colors="refined").success,
        "pixel_sweep, refined, stop_early": lambda i, y: (
            attacks.pixel_sweep(model, i, y, colors="refined", stop_early=True).success
        ),
    }
    others = peers.installed(torchattacks_OnePixel=peers.torchattacks("OnePixel", steps=100, popsize=400))
    for name, attack in others.items():
        jobs[name] = lambda i, y, attack=attack: real.predictions(model, attack(model, i, y)) != y  # type: ignore[misc]
    took: dict[str, float] = dict.fromkeys(jobs, 0.0)
    results: dict[str, list[Tensor]] = {name: [] for name in jobs}
    for i, y in zip(images.split(10), labels.split(10), strict=True):
        for name, job in jobs.items():
            torch.manual_seed(0)
            begun = time.perf_counter()
            results[name].append(job(i, y))
            took[name] += time.perf_counter() - begun
    print(f"\nOne pixel anywhere: ResNet-20, first {count} correct CIFAR-10 test images\n")
    print(
        "| job | images fooled | of those that evolution fools | seconds | x torchattacks |\n|---|---|---|---|---|"
    )
    last = list(jobs)[-1]
    reference = torch.cat(results[last])
    for name in jobs:
        fooled = torch.cat(results[name])
        print(
            f"| {name} | {int(fooled.sum())} | {int((fooled & reference).sum())} of {int(reference.sum())} | "
            f"{took[name]:.1f} | {took[name] / took[last]:.3f} |",
            flush=True,
        )


def promotion() -> None:
    """Cells of 16 pixels of a photograph, compared with as many forward passes of the fused network."""
    cases = {"EfficientNet-Lite0": real.embedded(1)}
    if real.available():
        cases["MobileNetV2"] = real.correct("mobilenet_v2_1.0_224", 1)
    for name, (model, images, labels) in cases.items():
        pairs = attacks.pgd(model, images, labels, steps=10)
        with evaluating(model) as classifier:
            with fused(classifier, images):
                batch = best_batch(classifier, images)
            every = images.expand(196, -1, -1, -1).contiguous()

            def floor(
                classifier: Classifier = classifier,
                images: Tensor = images,
                every: Tensor = every,
                batch: int = batch,
            ) -> None:
                with fused(classifier, images), torch.inference_mode():
                    for part in every.split(batch):
                        classifier(part)

            def ours(model: nn.Module = model, pairs: Pairs = pairs) -> None:
                promotion_suppression(model, pairs, cell=16)

            floor()
            ours()
            times = [(seconds(ours), seconds(floor)) for _ in range(7)]
        ratio = statistics.median(own / base for own, base in times)
        own, base = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"\npromotion_suppression, {name}, 196 cells: {own:.2f} s, {ratio:.2f} of 196 fused forward passes "
            f"({base:.2f} s, batch {batch})",
            flush=True,
        )


def local(wanted: int = 100) -> None:
    """Successful pixels on ResNet-20 moved to every other site, with the published numbers."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", 320)
    pairs = attacks.few_pixel(model, images, labels, method="guided")
    one = (pairs.perturbation != 0).any(1).flatten(1).sum(1) == 1
    rows = (pairs.success & one).nonzero()[:wanted, 0]
    failed = (~pairs.success & one).nonzero()[: len(rows), 0]
    both = torch.cat([rows, failed])
    chosen = Pairs(pairs.clean[both], pairs.adversarial[both], pairs.labels[both], pairs.targets[both])
    result = locality(model, chosen)
    print(f"\nLocality: ResNet-20, {len(rows)} one-pixel successes and {len(failed)} failures\n")
    print(sections.table(result.by_radius))
    print()
    print(sections.table(result.controls))
    print(
        "\nPublished (arXiv 1902.02947, as recalled): neighbors 31.3%, random site 3.1% of ResNet's successes, 33.1% "
        "and 4.9% of LeNet's."
    )


SECTIONS = {"throughput": throughput, "promotion": promotion, "locality": local, "sweep": sweep}


if __name__ == "__main__":
    with recorded("edits", "Small edits: LocalEdits beside whole forward passes."):
        sections.run(SECTIONS)
