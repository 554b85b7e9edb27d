"""`weakspot certify`: prove that no color of a pixel, or no patch, changes the class; check such a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import Tensor

from weakspot._io.files import write_atomic
from weakspot.classifier import Classifier
from weakspot.cli.app import GATE_FAILED, Failure, command, note
from weakspot.cli.attack_choice import Aim, AimOptions, find_region
from weakspot.cli.labeled_images import Labels, find_labels, without_failures
from weakspot.cli.options import (
    QUICK_IMAGES,
    FractionOption,
    ImagesArgument,
    LabelsOption,
    LimitOption,
    ModelOptions,
    OutputOptions,
    QuickImagesOption,
    RegionOption,
    SamplesOption,
    SeedOption,
    flag,
    option,
    parse_number,
    refuse,
    refuse_fraction,
    trial_sentence,
)
from weakspot.cli.output import json_rows, picture_names, print_sentences, print_text, shorten_name
from weakspot.cli.session import Images, Session, check_output, check_sources, draw_rows, open_session
from weakspot.images import are_samples
from weakspot.proofs import (
    PatchCertificate,
    PixelCertificate,
    certify_patches,
    certify_pixels,
    check_certificate,
)
from weakspot.proofs.certificate_file import CertificateFile
from weakspot.proofs.sentences import patch_sentence, pixel_sentence, pixels_summary
from weakspot.report.robustness_figures import CertificateView, certificate_figure

if TYPE_CHECKING:
    import pandas as pd
Certificate = PixelCertificate | PatchCertificate
FILES = ("certificate.json", "maps", "scores.csv", "pairs.safetensors")
PIXEL_OPTIONS = ("region", "fraction", "colors", "time", "exact")
MANY = 64 * 64  # pixels of an image above which certifying all takes long


@command(
    "weakspot certify digit.png --model mnist_standard --colors 8bit",
    "weakspot certify photos/ --model my_package.models:build --colors 8/255 --time 60",
    "weakspot certify photos/ --patch 2% --out runs/patches",
    "weakspot certify --check weakspot-certify/certificate.json --model mnist_standard",
    "weakspot explain --pair weakspot-certify/pairs.safetensors --model mnist_standard",
)
def certify(
    context: typer.Context,
    network: ModelOptions,
    output: OutputOptions,
    images: ImagesArgument = None,
    samples: SamplesOption = False,
    labels: LabelsOption = None,
    region: RegionOption = "none",
    fraction: FractionOption = 0.3,
    colors: Annotated[
        str,
        option(
            "COLORS",
            "Colors that one pixel may take: full (all), 8bit (all of an 8-bit image), a radius such as 8/255 around "
            "its own, or 8bit:8/255.",
        ),
    ] = "full",
    time: Annotated[
        str | None,
        option("SECONDS", "Stop after so many seconds; the pixels left are unknown.", default="no limit"),
    ] = None,
    exact: Annotated[
        bool,
        flag(
            "--exact",
            "Prove for exact arithmetic instead of float32 as run; such proofs reach deeper networks.",
        ),
    ] = False,
    patch: Annotated[
        str | None,
        option(
            "SIZE",
            "Certify the network behind double masking against patches instead: a side in pixels (32), or an area "
            "(0.02, 2%).",
            default="single pixels",
        ),
    ] = None,
    check: Annotated[
        Path | None,
        option(
            "FILE",
            "Check a certificate anew. Without IMAGES, those it names are read.",
            default="make a certificate",
        ),
    ] = None,
    limit: LimitOption = None,
    quick: QuickImagesOption = False,
    seed: SeedOption = 0,
    out: Annotated[Path, option("FOLDER", f"Folder for {', '.join(FILES)}.")] = Path("weakspot-certify"),
) -> None:
    """Prove which pixels can take no color that changes the class, each pixel alone, and refute others.

    With --patch, certify the network behind double masking against every patch of a size. A pixel that is neither
    proven nor refuted is unknown. `weakspot explain --pair OUT/pairs.safetensors` explains colors that refute.
    """
    sources = list(images or [])
    if check is not None:
        refuse(
            context,
            ("labels", "patch", "limit", "quick", "seed", "out", *PIXEL_OPTIONS),
            "with --check (leave out one of the two)",
        )
        _check(context, network, output, check, sources, samples=samples)
        return
    if patch is None:
        refuse_fraction(context, [region])
    else:
        refuse(context, PIXEL_OPTIONS, "with --patch (leave out one of the two)")
    if quick:
        refuse(context, ["limit"], "with --quick, which sets it (leave out one of the two)")
        limit = QUICK_IMAGES
    check_sources(sources, samples=samples)
    check_output(out, sources, folders=FILES[1:2])
    size = None if patch is None else _parse_patch(patch.strip())
    seconds = None if time is None else parse_number("--time", time)
    with open_session(context, network, output, out, FILES) as session:
        labeled = find_labels(labels, session, session.read_images(sources, samples=samples))
        aim = labeled.subset(draw_rows(len(labeled.labels), limit, seed))
        read = aim.images
        session.make_folder()
        if size is None:
            certificate: Certificate = certify_pixels(
                session.classifier, read.pixels, aim.labels,
                region=_find_region(session, AimOptions(region=region, fraction=fraction), read, aim, seed, seconds),
                colors=colors, seconds=seconds, statement="exact arithmetic" if exact else "float32 as run",
                progress=session.display.step("certifying", total=len(read.names)),
                on_checkpoint=partial(_keep, out, read.paths),
            )  # fmt: skip
        else:
            aim, certificate = without_failures(session, aim, partial(_certify_patches, session, size))
            read = aim.images
        session.display.step("writing")
        certificate = _keep(out, read.paths, certificate)
        if isinstance(certificate, PixelCertificate):
            scores, summary = _pixel_scores(session.classifier, read, aim, certificate)
            save_pairs(out / FILES[3], certificate)
            draw_pictures(out / FILES[1], certificate, scores)
        else:
            scores, summary = _patch_scores(session.classifier, read, aim, certificate)
        write_atomic(out / FILES[2], partial(scores.to_csv, index=False))

    def show() -> None:
        print_sentences(scores, summary)
        if quick:
            print_text(f"\n{trial_sentence()}", style="dim")
        print_text(f"\nCertificate: {(out / FILES[0]).resolve()}{session.ending()}", style="dim")

    found = {"summary": summary, "scores": json_rows(scores), "skipped": session.skipped}
    session.report(lambda: {**found, "certificate": str(out / FILES[0])}, show)


def _parse_patch(text: str) -> int | float:
    """Pixels as an integer, or a fraction."""
    # To `isdigit` alone, superscripts are digits, too, which `int` does not read.
    if text.isascii() and text.isdigit():
        return int(text)
    return parse_number("--patch", text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def _check(
    context: typer.Context,
    network: ModelOptions,
    output: OutputOptions,
    path: Path,
    sources: Sequence[Path],
    *,
    samples: bool,
) -> None:
    """Check a certificate, and exit with the code of a failed gate if it does not hold."""
    file = CertificateFile.open(path)
    named = not sources and not samples
    if named:
        names = file.texts("names")
        if not names:
            raise Failure(f"{path} names no images (give the images that it is about)")
        # A file of somebody else's must not make this program read folders.
        for name in names:
            if not name or Path(name).is_dir():
                raise Failure(
                    f"{path}: names must be image files, got {name!r} (give the images that it is about)"
                )
        sources = [Path(name) for name in names]
        samples = are_samples(sources)
        sources = [] if samples else sources
    check_sources(sources, samples=samples)
    with open_session(context, network, output, path.parent, ()) as session:
        read = session.read_images(sources, samples=samples)
        step = session.display.step("checking the certificate", counted=False)
        found = check_certificate(session.classifier, path, read.pixels, progress=step)
        for remark in (*found.notes, *(file.misnamed(read.paths, read.pixels) if named else ())):
            note(f"{path}: {remark}")

    lines = [found.sentence, *(f"- {problem}" for problem in found.problems[1:])]
    session.report(
        lambda: {
            "holds": found.passed,
            "problems": list(found.problems),
            "checked": list(found.checked),
            "complete": found.complete,
            "seed": found.seed,
        },
        lambda: print_text("\n".join(lines)),
    )
    if not found.passed:
        raise typer.Exit(GATE_FAILED)


def _find_region(
    session: Session, options: AimOptions, read: Images, aim: Labels, seed: int, seconds: float | None
) -> Tensor | None:
    """The pixels to ask about, with a note if they are many."""
    pixels = read.pixels.to(aim.labels.device)
    goal = Aim(pixels, aim.labels, None, read.names, aim.logits.argmax(1))
    region, _ = find_region(options, session.classifier, goal, seed)
    asked = pixels[0, 0].numel() if region is None else int(region.sum()) // len(region)
    if asked > MANY and seconds is None:
        note(f"{asked:,} pixels an image take long (--region asks about fewer, --time sets a limit)")
    return region


def _certify_patches(session: Session, size: int | float, aim: Labels) -> PatchCertificate:
    step = session.display.step("masking twice", total=len(aim.names))
    return certify_patches(
        session.classifier, aim.images.pixels, aim.labels, patch=size, progress=step,
        on_checkpoint=partial(_keep, session.out, aim.images.paths),
    )  # fmt: skip


def _pixel_scores(
    classifier: Classifier, read: Images, aim: Labels, certificate: PixelCertificate
) -> tuple[pd.DataFrame, str]:
    """A row per image, and a sentence on all."""
    import pandas as pd

    before = aim.logits.argmax(1).tolist()
    rows = []
    for number, name in enumerate(read.names):
        inside = certificate.region[number, 0]
        counts = {
            key: int(((certificate.status[number] == status) & inside).sum())
            for key, status in (("proven", 1), ("refuted", -1), ("unknown", 0))
        }
        rows.append(
            {
                "image": name,
                "label": classifier.class_name(int(aim.labels[number])),
                "classified_as": classifier.class_name(before[number]),
                "pixels": int(inside.sum()),
                **counts,
                "sentence": pixel_sentence(certificate, number, before[number], classifier.class_name),
            }
        )
    correct = [label == index for label, index in zip(aim.labels.tolist(), before, strict=True)]
    return pd.DataFrame(rows), pixels_summary(certificate, correct)


def _patch_scores(
    classifier: Classifier, read: Images, aim: Labels, certificate: PatchCertificate
) -> tuple[pd.DataFrame, str]:
    """A row per image, and a sentence on all."""
    import pandas as pd

    scores = pd.DataFrame(
        {
            "image": read.names,
            "label": [classifier.class_name(label) for label in aim.labels.tolist()],
            "classified_as": [classifier.class_name(index) for index in aim.logits.argmax(1).tolist()],
            "behind_masks": [classifier.class_name(index) for index in certificate.predicted.tolist()],
            "certified": certificate.certified.tolist(),
            "margin": certificate.margin.tolist(),
            "sentence": [
                patch_sentence(certificate, n, classifier.class_name) for n in range(len(certificate))
            ],
        }
    )
    return scores, certificate.sentence


def _keep(out: Path, paths: Sequence[str], certificate: Certificate) -> Certificate:
    """Write what is known so far, so that an interrupt or a kill loses little; returns it with the images' names."""
    # Whole paths, because --check reads the images by these names.
    certificate = replace(certificate, names=tuple(paths[: len(certificate.labels)]))
    # Before the new certificate replaces the one that names the earlier files.
    remove_earlier(out)
    certificate.to_json(out / FILES[0])
    return certificate


def remove_earlier(out: Path) -> None:
    """Remove the scores, and the pictures and pairs that the certificate in the folder says were written with it."""
    try:
        earlier = CertificateFile.open(out / FILES[0])
        # A certificate against patches comes with neither.
        names = [] if earlier.of_patches else earlier.texts("names")
        refuted = bool(names and earlier.part("counterexamples", "pixels"))
    except (ValueError, OSError):
        return
    pictures = [out / FILES[1] / name for name in picture_names(names)]
    for path in (*pictures, out / FILES[2], *([out / FILES[3]] if refuted else [])):
        path.unlink(missing_ok=True)


def save_pairs(path: Path, certificate: PixelCertificate) -> None:
    """Write the pairs whose pixel differs; an image that is misclassified already has none."""
    if bool((certificate.status == -1).any()):
        pairs = certificate.counterexamples
        changed = (pairs.perturbation != 0).flatten(1).any(1)
        if bool(changed.any()):
            pairs[changed].save(path)


def draw_pictures(folder: Path, certificate: PixelCertificate, scores: pd.DataFrame) -> None:
    """Write a picture of each image."""
    folder.mkdir(exist_ok=True)
    for index, (picture, (_, row)) in enumerate(
        zip(picture_names(certificate.names), scores.iterrows(), strict=True)
    ):
        view = CertificateView(
            certificate.images[index].cpu().numpy(),
            certificate.status[index].cpu().numpy(),
            certificate.region[index, 0].cpu().numpy(),
        )
        figure = certificate_figure(view, shorten_name(row["image"], 60), row["sentence"])
        write_atomic(folder / picture, partial(figure.savefig, dpi=130, format="png"))
