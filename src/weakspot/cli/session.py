"""Session: what every command that uses a classifier does before and after its own work."""

from __future__ import annotations

import os
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import torch
import typer
from torch import Tensor

from weakspot._checks import warn
from weakspot._errors import ModelError, first_line
from weakspot._io.urls import exists
from weakspot._progress import Display
from weakspot.classifier import Classifier, check_images, evaluating, predict
from weakspot.cli.app import UNREADABLE, WRITTEN_KEY, Failure, complain, note, one_line
from weakspot.cli.options import ModelOptions, OutputOptions
from weakspot.cli.output import print_json, working
from weakspot.images import open_pictures, sample_images
from weakspot.models import load
from weakspot.models.identity import fingerprint
from weakspot.models.specs import plain_pixels_note
from weakspot.similarity import luma

Files = dict[Path, tuple[int, int, int]]  # of each file, what changes if it is written again


@dataclass(frozen=True, eq=False)
class Images:
    """Images that were read from files.

    Attributes:
        pixels: (N, C, H, W) in [0, 1], of the size and the channels that the classifier takes.
        names: short names, unique within the command.
        paths: whole paths, or the short names of sample images.
    """

    pixels: Tensor
    names: list[str]
    paths: list[str]

    def __repr__(self) -> str:
        return f"Images({tuple(self.pixels.shape)}: {', '.join(self.names[:3])}{', ...' * (len(self.names) > 3)})"

    def subset(self, rows: Sequence[int]) -> Images:
        """Some of the images."""
        return Images(
            self.pixels[list(rows)], [self.names[row] for row in rows], [self.paths[row] for row in rows]
        )


@dataclass(eq=False)
class Session:
    """One run of a command.

    Attributes:
        context: typer's context of the command.
        output: how the command reports.
        network: which classifier.
        out: folder that the command writes to.
        display: of the current step.
        classifier: in eval mode, after a first forward pass to check that it takes such images.
        results: the standard output of the command.
        started: time at the start.
        skipped: one sentence for each file that could not be read.
        unread: whether a file or folder that was named gave no image; the command then exits with code 4.
    """

    context: typer.Context
    output: OutputOptions
    network: ModelOptions
    out: Path
    display: Display
    classifier: Classifier
    results: TextIO
    started: float = field(default_factory=time.perf_counter)
    skipped: list[str] = field(default_factory=list)
    unread: bool = False

    def __repr__(self) -> str:
        return f"Session({self.context.info_name} {self.network.model} -> {self.out})"

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def read_images(self, sources: Sequence[Path], *, samples: bool = False) -> Images:
        """Read image files. Files that cannot be read are noted and skipped.

        Raises:
            Failure: if no image could be read.
        """
        size, channels = self.classifier.input_size, self.classifier.channels
        self.display.step("reading the images")
        if samples:
            pixels, names = sample_images(size)
            return Images(luma(pixels) if channels == 1 else pixels, names, names)
        read: list[tuple[str, Tensor]] = []
        for source in sources:
            files = open_pictures(source, size=size, channels=channels) if source.exists() else []
            if source.exists() and not files:
                note(f"{source}: the folder is empty", failure=True)
            for file in files:
                name = str(source / file.name) if source.is_dir() else str(source)
                remark = one_line(f"{name}: {file.remark}")
                if file.remark:
                    note(remark, failure=file.pixels is None)
                if file.pixels is None:
                    self.skipped.append(remark)
                else:
                    read.append((name, file.pixels))
            # Every named source must give an image; files inside a folder may be anything.
            self.unread |= all(file.pixels is None for file in files)
        if not read:
            raise Failure("none of the images could be read", UNREADABLE)
        names = [name for name, _ in read]
        return Images(torch.stack([pixels for _, pixels in read]), shorten_paths(names), names)

    def predict(self, images: Images) -> tuple[Tensor, list[int]]:
        """Logits (N, K), and the rows where they are finite; the other images are noted and skipped.

        Raises:
            Failure: if no image is left.
        """
        classifier = self.classifier
        with evaluating(classifier):
            logits = predict(classifier, check_images(images.pixels, classifier), finite=False)
        finite = logits.isfinite().all(1)
        if not bool(finite.any()):
            raise Failure(
                f"{classifier.name} returned NaN or infinity for every image (check its weights and normalization)"
            )
        for row in (~finite).nonzero().flatten().tolist():
            self.skip(f"{images.names[row]}: {classifier.name} returned NaN or infinity; skipped")
        return logits, finite.nonzero().flatten().tolist()

    def skip(self, remark: str) -> None:
        """Note that an image is left out, and why."""
        note(one_line(remark), failure=True)
        self.skipped.append(one_line(remark))

    def make_folder(self) -> None:
        """Make the output folder before the work starts, so that no result is lost."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failure(f"--out {self.out} cannot be created ({error.strerror})") from None
        if not os.access(self.out, os.W_OK):
            raise Failure(f"--out {self.out} is not writable")

    def provenance(self, seed: int) -> dict[str, str]:
        """How the results were made, for the report and run.json."""
        from weakspot.audit.store.run_info import versions

        classifier = self.classifier
        made = {
            "model": f"{classifier.name} ({self.network.model}), weights {fingerprint(classifier)}",
            "seed": str(seed),
            "device": str(classifier.mean.device),
            "command": command_line(),
            "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
            "made at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        return made | ({"skipped": "; ".join(self.skipped)} if self.skipped else {})

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Print results while the work goes on, with the progress bar out of the way."""
        with self.display.paused(), redirect_stdout(self.results):
            try:
                yield
                self.results.flush()
            except SystemExit as left:
                # rich exits if the reader of a pipe has gone; what is written to files goes on.
                if not isinstance(left.__context__, BrokenPipeError):
                    raise

    def report(self, document: Callable[[], object], show: Callable[[], None]) -> None:
        """Print the results as JSON or for people.

        Raises:
            typer.Exit: with code 4, if a file or folder that was named could not be read.
        """
        if self.output.as_json:
            print_json(document())
        elif not self.output.quiet:
            show()
        if self.unread:
            raise typer.Exit(UNREADABLE)

    def ending(self) -> str:
        """How many files were skipped and how long the command took, to end a sentence."""
        return (f", {len(self.skipped)} skipped" if self.skipped else "") + f", in {self.seconds:.1f} s"


@contextmanager
def open_session(
    context: typer.Context, network: ModelOptions, output: OutputOptions, out: Path, files: Sequence[str]
) -> Iterator[Session]:
    """Run the work of a command: standard output is kept for results, warnings become notes, progress is shown.

    Args:
        context: of the running command.
        network: which classifier.
        output: how the command reports.
        out: folder that it writes to.
        files: names or patterns of what it writes there; an interrupt reports which of these it has written.
    """
    if out.exists() and not out.is_dir():
        raise Failure(f"--out must be a folder, got the file {out}")
    # Compared by inode, time and size with what is there after an interrupt.
    before = _list_files(out, files)
    started, results = time.perf_counter(), sys.stdout
    # `Commands.invoke` calls it if the command is interrupted.
    context.meta[WRITTEN_KEY] = lambda: _describe_written(out, files, before)
    with working(quiet=output.quiet, silent=output.silent) as display:
        display.step("loading the model")
        yield Session(context, output, network, out, display, load_classifier(network), results, started)


def check_sources(sources: Sequence[Path], *, samples: bool = False) -> None:
    """Check the images that were named, before anything is loaded.

    Raises:
        Failure: if none were named, or none exist.
    """
    if samples and sources:
        raise Failure("--samples takes no images (leave out one of the two)")
    if not sources and not samples:
        raise Failure("no images were named (give files, folders, or --samples)")
    check_existing(sources)


def check_output(
    out: Path, sources: Sequence[Path], *, folders: Sequence[str] = (), files: Sequence[str] = ()
) -> None:
    """Check that no image that is read is overwritten, and none that is written is read by the next run.

    Args:
        out: the output folder.
        sources: images and folders that are read.
        folders: folders of images that the command writes in `out`.
        files: images that it writes in `out`.
    """
    for kind, names in (("file", folders), ("folder", files)):
        for name in names:
            if (out / name).is_file() if kind == "file" else (out / name).is_dir():
                raise Failure(f"--out {out} already holds a {kind} named {name} (give another folder)")
    folder = out.resolve()
    written = [folder / name for name in (*folders, *files)]
    for source in (source.resolve() for source in sources):
        # Nothing inside the written folders may be read, and no folder that holds them from an earlier run.
        overwritten = source == folder or any(part in (source, *source.parents) for part in written)
        read_again = source in folder.parents and any(part.exists() for part in written)
        if overwritten or read_again:
            raise Failure(f"--out {out} holds images that are read (give another folder)")


def check_existing(sources: Sequence[Path | str]) -> None:
    """Report the files and folders that do not exist.

    Raises:
        typer.Exit: with code 4, if none of them exists.
    """
    missing = [source for source in sources if not exists(str(source))]
    for source in missing:
        complain(f"{source}: no such file or folder")
    if sources and len(missing) == len(sources):
        raise typer.Exit(UNREADABLE)


def load_classifier(options: ModelOptions, *, remedy: str = "give --mean and --std") -> Classifier:
    """Load the classifier, and check with a gray image that it takes images of its size and channels.

    A note says if a network of the user's gets images that are not normalized, and what the `remedy` is.
    """
    classifier = load(options.model, device=options.device, **options.arguments())
    # One gray image shows early whether channels and size fit, before images are read.
    shape = (classifier.channels, *classifier.input_size)
    try:
        with evaluating(classifier):
            logits = predict(classifier, torch.full((1, *shape), 0.5, device=classifier.mean.device))
    except ModelError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise Failure(
            f"{options.model} does not take images of {' x '.join(map(str, shape))} (channels x height x width): "
            f"{first_line(error)[:120]} (give --size, or --mean with one value per channel)"
        ) from None
    names = len(classifier.class_names)
    if options.classes is not None and names != logits.shape[1]:
        raise Failure(f"--classes must hold {logits.shape[1]} names, one for each class, got {names}")
    if options.mean is None and options.std is None:
        remark = plain_pixels_note(options.model, classifier, remedy)
        if remark:
            warn(remark, UserWarning)
    return classifier


def draw_rows(total: int, limit: int | None, seed: int) -> list[int]:
    """The rows of `limit` images of `total`, drawn by the seed, in their order; all rows without a limit."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(random.Random(seed).sample(range(total), limit))  # noqa: S311 - no secret


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["weakspot", *sys.argv[1:]])


def shorten_paths(names: Sequence[str]) -> list[str]:
    """Paths relative to the folder that contains them all."""
    paths = [Path(name).absolute() for name in names]
    common = os.path.commonpath([path.parent for path in paths])
    return [one_line(os.path.relpath(path, common)) for path in paths]


def _list_files(folder: Path, patterns: Sequence[str]) -> Files:
    """The files that match, and those in folders that match."""
    listed: Files = {}
    for top in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                about = path.stat()
                listed[path] = (about.st_ino, about.st_mtime_ns, about.st_size)
    return listed


def _describe_written(folder: Path, patterns: Sequence[str], before: Files) -> str:
    """The files written since `before`, those in folders by their number."""
    now = _list_files(folder, patterns)
    new = [path.relative_to(folder).parts for path in now if now[path] != before.get(path)]
    counts = Counter(parts[0] for parts in new if len(parts) > 1)
    names = [f"{name}/ ({count} file{'s' if count > 1 else ''})" for name, count in counts.items()]
    names += [parts[0] for parts in new if len(parts) == 1]
    return f"written to {folder} so far: {', '.join(names)}" if names else "nothing was written"
