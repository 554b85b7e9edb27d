"""Certificates on real networks: what is decided, and what it costs.

Run: python -m benchmarks.certify ROW ... [--first N] [--images N] [--cpu S] [--seconds S] [--out FILE] [--brute]
[--json FILE]. ROW is a name of `ROWS`, `MASKS`, or of `PEERS`. Images of `ROWS` are the first test images that the
network classifies correctly. One line of JSON for each image is appended to FILE; images that it already holds are
skipped, so that a stopped run goes on. No image of a row begins once its images have taken S CPU seconds (`--cpu`).

"intervals" is the fraction of pixels that interval bounds of one box prove under the same statement and the same
rounding. `--brute` compares with all 256 grays of every pixel, run by the network itself.

`MASKS`: the two-mask certificate of EfficientNet-Lite0 against a patch of 2%, on the first photographs and their true
labels, whether or not the network classifies them correctly.

Rows of `PEERS` compare bounds with those of auto_LiRPA, on N pixels (`--images`) of each of five images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import real
from benchmarks.certify_peer import PEERS, peer_table
from benchmarks.records import recorded
from benchmarks.timing import peak_of
from weakspot import PixelCertificate, certify_patches, certify_pixels
from weakspot.classifier import evaluating
from weakspot.proofs.affine_forms import Form
from weakspot.proofs.allowed_colors import parse_colors
from weakspot.proofs.certificate import AS_RUN, EXACT
from weakspot.proofs.margin_bounds import MarginBounds
from weakspot.proofs.network_steps import bound_network
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import counted

Case = tuple[nn.Module, Tensor, Tensor]
Result = dict[str, Any]
MASKS = "efficientnet_lite0_masks"
PATCH = 0.02
GRAYS = torch.arange(256).float() / 255


@dataclass(frozen=True)
class Row:
    """A row of the table: a network, the colors, what a proof is about, and how many pixels of each image if not all.

    The pixels are drawn at random: strides of the network make pixels of a regular grid alike.
    """

    network: str
    colors: str = "full"
    statement: str = AS_RUN
    pixels: int | None = None


MNIST = ("cnn_a_adv", "cnn_pgd_eps0.3", "cnn_fgsm_eps0.3", "convex_eps0.1", "conv_small_nat")
ROWS = {
    **{f"mnist_{name}": Row(f"mnist_{name}") for name in MNIST},
    **{f"mnist_{name}_8bit": Row(f"mnist_{name}", "8bit") for name in MNIST},
    **{
        f"cifar10_{name}": Row(f"cifar10_{name}")
        for name in ("conv_small_pgd", "cnn_a_adv", "cnn_a_mix", "resnet2b_adv", "resnet4b_adv")
    },
    **{
        f"cifar10_{name}_exact": Row(f"cifar10_{name}", statement=EXACT)
        for name in ("conv_small_pgd", "resnet2b_adv", "resnet4b_adv")
    },
    **{
        f"cifar10_{name}_exact_64": Row(f"cifar10_{name}", statement=EXACT, pixels=64)
        for name in ("resnet2b_adv", "resnet4b_adv")
    },
    "cifar10_resnet20_8bit": Row("cifar10_resnet20", "8bit:8/255", pixels=64),
    "cifar10_resnet20_8bit_1": Row("cifar10_resnet20", "8bit:8/255", pixels=1),
    "cifar10_resnet20_exact": Row("cifar10_resnet20", "8/255", EXACT, pixels=64),
}


def intervals(model: nn.Module, image: Tensor, label: int, row: Row) -> float:
    """The fraction of pixels that interval bounds of one box each prove."""
    with evaluating(model) as classifier, torch.no_grad():
        bounds = MarginBounds(bound_network(classifier, image), image, label, as_run=row.statement == AS_RUN)
        low, high = parse_colors(row.colors).box(image)
        colors = [ends[0].permute(1, 2, 0).flatten(0, 1) for ends in (low, high)]
        pixels = torch.arange(image.shape[2] * image.shape[3])
        proven = 0
        for part in pixels.split(256):
            center, reach = (colors[0][part] + colors[1][part]) / 2, (colors[1][part] - colors[0][part]) / 2
            shape = (len(part), 1, 1, image.shape[1])
            rows, columns = part // image.shape[3], part % image.shape[3]
            values = (
                center.view(shape),
                center.new_zeros(len(part), 0, *shape[1:]),
                reach.view(shape) * (1 + 2**-50),
            )
            form = bounds._propagation.run(Form(*values, (), rows, columns), deep=False)[
                bounds.network.logits
            ]
            proven += int((form.ends[0].amin(1) > 0).sum()) if bounds.network.last else 0
    return proven / len(pixels)


def disagreements(model: nn.Module, image: Tensor, label: int, certificate: PixelCertificate) -> int:
    """Pixels whose status is not what all 256 grays, run one by one, say."""
    wrong = 0
    with torch.no_grad():
        for pixel in range(image.shape[2] * image.shape[3]):
            row, column = pixel // image.shape[3], pixel % image.shape[3]
            edited = image.repeat(256, 1, 1, 1)
            edited[:, 0, row, column] = GRAYS
            holds = all(bool((model(batch).argmax(1) == label).all()) for batch in edited.split(64))
            wrong += int(certificate.status[0, row, column]) != (1 if holds else -1)
    return wrong


def certify_one(row: Row, case: Case, seed: int, seconds: float | None, *, brute: bool) -> dict[str, object]:
    """What is decided on all pixels of an image, or on those that the seed draws."""
    model, image, label = case
    region = None
    if row.pixels is not None:
        order = torch.randperm(image[0, 0].numel(), generator=torch.Generator().manual_seed(seed))
        region = torch.zeros(1, 1, *image.shape[2:], dtype=torch.bool)
        region.view(-1)[order[: row.pixels]] = True
    made: list[PixelCertificate] = []

    def run() -> None:
        made.append(
            certify_pixels(
                model,
                image,
                label,
                region=region,
                colors=row.colors,
                statement=row.statement,
                seconds=seconds,
            )
        )

    cost = measured(run)
    certificate = made[0]
    result = {
        "proven": float(certificate.proven_fraction),
        "refuted": float(certificate.refuted_fraction),
        "unknown": float(certificate.unknown_fraction),
        **cost,
        "boxes": len(certificate.boxes),
        "because": certificate.unknown_because(),
        "intervals": intervals(model, image, int(label), row),
    }
    if brute:
        result["disagreements"] = disagreements(model, image, int(label), certificate)
    return result


def mask_one(case: Case) -> dict[str, object]:
    """The two-mask certificate of a photograph."""
    model, image, label = case
    made = []
    cost = measured(lambda: made.append(certify_patches(model, image, label, patch=PATCH)))
    certificate = made[0]
    return {
        "certified": bool(certificate.certified),
        "behind": bool(certificate.predicted == label),
        "alone": bool(real.predictions(model, image) == label),
        "passes": int(certificate.n_forward),
        **cost,
    }


def measured(run: Callable[[], None]) -> dict[str, float]:
    """Seconds and peak memory of the process while it runs."""
    wall, cpu = time.perf_counter(), time.process_time()
    peak, _ = peak_of(run)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "megabytes": peak}


def measure(name: str, given: argparse.Namespace) -> list[Result]:
    """The results of a row's images: those that the file holds, and new ones, appended to it."""
    lines = given.out.read_text("utf-8").splitlines() if given.out.is_file() else []
    results = [line for line in map(json.loads, lines) if line["row"] == name]
    known = {line["image"] for line in results}
    if name == MASKS:
        model = real.embedded(1)[0]
        images, labels = real.networks().imagenet(given.first + given.images)
    else:
        model, images, labels = real.correct(ROWS[name].network, given.first + given.images)
    for number in range(given.first, min(given.first + given.images, len(images))):
        if number in known:
            continue
        if sum(one["cpu"] for one in results) >= given.cpu:
            break
        case = model, images[number : number + 1].contiguous(), labels[number : number + 1]
        result = (
            mask_one(case)
            if name == MASKS
            else certify_one(
                ROWS[name],
                case,
                # Many pixels: the same in all images. A single one: another in each image.
                number if ROWS[name].pixels == 1 else 0,
                given.seconds,
                brute=given.brute,
            )
        )
        results.append({"row": name, "image": number, **result})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
    return results


def pixel_table(rows: Mapping[str, Sequence[Result]]) -> None:
    """A line for each network, colors and statement."""
    brute = any("disagreements" in one for results in rows.values() for one in results)
    print(
        "| row | n | proven | refuted | unknown | least decided | intervals | CPU s an image (median, most) "
        f"| wall s (median) | peak MB |{' pixels that differ from brute force |' if brute else ''}"
    )
    print("|---" * (11 if brute else 10) + "|")
    for name, results in rows.items():
        mean = {
            key: statistics.fmean(one[key] for one in results)
            for key in ("proven", "refuted", "unknown", "intervals")
        }
        cpu, wall = ([one[key] for one in results] for key in ("cpu", "wall"))
        compared = [one["disagreements"] for one in results if "disagreements" in one]
        print(
            f"| {name} | {len(results)} | {mean['proven']:.2%} | {mean['refuted']:.2%} | {mean['unknown']:.2%} | "
            f"{1 - max(one['unknown'] for one in results):.1%} | {mean['intervals']:.1%} | "
            f"{statistics.median(cpu):.2f}, {max(cpu):.2f} | {statistics.median(wall):.2f} | "
            f"{max(one['megabytes'] for one in results):.0f} |"
            + (f" {sum(compared)} on {len(compared)} images |" if brute else "")
        )
    for name, results in rows.items():
        reasons = sum((Counter(one["because"]) for one in results), Counter[str]())
        if reasons:
            print(
                f"\n{name}, unknown: "
                + "; ".join(f"{why} ({counted(count, 'pixel')})" for why, count in reasons.items())
            )


def mask_table(results: Sequence[Result]) -> None:
    """Accuracies of the two-mask certificate."""
    print("| EfficientNet-Lite0, patch of 2% | photographs | fraction | 95% interval |\n|---|---|---|---|")
    for words, key in (
        ("classified as labeled, without masks", "alone"),
        ("classified as labeled behind the masks", "behind"),
        ("certified", "certified"),
    ):
        hits = np.array([one[key] for one in results])
        _, low, high = proportion_interval(hits)
        print(f"| {words} | {hits.sum()} of {len(hits)} | {hits.mean():.1%} | {low:.1%} to {high:.1%} |")
    sure = [one["cpu"] for one in results if one["certified"]] or [0.0]
    cpu = [one["cpu"] for one in results]
    print(
        f"\nCPU s an image: median {statistics.median(cpu):.1f}, most {max(cpu):.1f}; of a certified one, with all 666 "
        f"masked images: median {statistics.median(sure):.1f}. Peak {max(one['megabytes'] for one in results):.0f} MB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=[*ROWS, MASKS, *PEERS], metavar="ROW")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--cpu", type=float, default=float("inf"))
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path, default=Path("certify.jsonl"))
    parser.add_argument("--brute", action="store_true")
    given = parser.parse_args()
    results = {name: measure(name, given) for name in given.rows if name not in PEERS}
    masks = results.pop(MASKS, None)
    if results:
        pixel_table(results)
    if masks:
        mask_table(masks)
    for name in given.rows:
        if name in PEERS:
            peer_table(name, given.images)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with recorded(
        "certify", "Certificates of single pixels and against patches: what is decided, and what it costs."
    ):
        main()
