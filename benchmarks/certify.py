"""Certificates of single pixels on real networks: what is decided, and what it costs.

Run: python -m benchmarks.certify ROW [--first N] [--images N] [--seconds S] [--out FILE] [--brute]. ROW is a name of
`ROWS`; `python -m benchmarks.certify table --out FILE` prints what a file holds. Images are the first test images that
the network classifies correctly. One line of JSON for each image is appended to FILE; images that it already holds are
skipped, so that a stopped run goes on.

"intervals" is the fraction of pixels that interval bounds of one box prove under the same statement and the same
rounding. `--brute` compares with all 256 grays of every pixel, run by the network itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import real
from benchmarks.timing import peak_gigabytes
from weakspot import PixelCertificate, certify_pixels
from weakspot.classifier import evaluating
from weakspot.proofs.affine_forms import Form
from weakspot.proofs.allowed_colors import parse_colors
from weakspot.proofs.certificate import AS_RUN, EXACT
from weakspot.proofs.margin_bounds import MarginBounds
from weakspot.proofs.network_steps import bound_network

GRAYS = torch.arange(256).float() / 255


@dataclass(frozen=True)
class Row:
    """A row of the table: a network, the colors and what a proof is about; every fourth pixel both ways if `sparse`."""

    network: str
    colors: str = "full"
    statement: str = AS_RUN
    sparse: bool = False


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
    "cifar10_resnet20_8bit": Row("cifar10_resnet20", "8bit:8/255", sparse=True),
    "cifar10_resnet20_exact": Row("cifar10_resnet20", "8/255", EXACT, sparse=True),
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
            form = bounds._run({0: Form(*values, (), rows, columns)}, deep=False)[bounds.network.logits]
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


def measure(name: str, first: int, count: int, seconds: float | None, out: Path, *, brute: bool) -> None:
    row = ROWS[name]
    lines = out.read_text("utf-8").splitlines() if out.is_file() else []
    known = {(line["row"], line["image"]) for line in map(json.loads, lines)}
    model, images, labels = real.correct(row.network, first + count)
    for number in range(first, min(first + count, len(images))):
        if (name, number) in known:
            continue
        image, label = images[number : number + 1], labels[number : number + 1]
        region = None
        if row.sparse:
            region = torch.zeros(1, 1, *image.shape[2:], dtype=torch.bool)
            region[:, :, 2::4, 2::4] = True
        wall, cpu = time.perf_counter(), time.process_time()
        certificate = certify_pixels(
            model, image, label, region=region, colors=row.colors, statement=row.statement, seconds=seconds
        )
        result = {
            "row": name,
            "image": number,
            "proven": float(certificate.proven_fraction),
            "refuted": float(certificate.refuted_fraction),
            "unknown": float(certificate.unknown_fraction),
            "cpu": time.process_time() - cpu,
            "wall": time.perf_counter() - wall,
            "boxes": len(certificate.boxes),
            "because": certificate.unknown_because(),
            "intervals": intervals(model, image, int(label), row),
        }
        if brute:
            result["disagreements"] = disagreements(model, image, int(label), certificate)
        result["gigabytes"] = peak_gigabytes()
        print(json.dumps(result), flush=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def table(out: Path) -> None:
    rows = defaultdict(list)
    for line in out.read_text("utf-8").splitlines():
        result = json.loads(line)
        rows[result["row"]].append(result)
    print(
        "| row | n | proven | refuted | unknown | intervals | CPU s an image (median, most) | wall s | GB | brute |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, results in rows.items():
        mean = {
            key: statistics.fmean(one[key] for one in results)
            for key in ("proven", "refuted", "unknown", "intervals")
        }
        cpu, wall = ([one[key] for one in results] for key in ("cpu", "wall"))
        compared = [one["disagreements"] for one in results if "disagreements" in one]
        print(
            f"| {name} | {len(results)} | {mean['proven']:.2%} | {mean['refuted']:.2%} | {mean['unknown']:.2%} | "
            f"{mean['intervals']:.1%} | {statistics.median(cpu):.2f}, {max(cpu):.2f} | {statistics.median(wall):.2f} | "
            f"{max(one['gigabytes'] for one in results):.2f} | "
            f"{f'{sum(compared)} of {len(compared)} images differ' if compared else ''} |"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=[*ROWS, "table"])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path, default=Path("certify.jsonl"))
    parser.add_argument("--brute", action="store_true")
    given = parser.parse_args()
    if given.row == "table":
        table(given.out)
    else:
        measure(given.row, given.first, given.images, given.seconds, given.out, brute=given.brute)
