"""`weakspot explore`: the bench in a browser (brush, attack, probe, explain), and the records of audits beside it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from weakspot._checks import require
from weakspot._errors import first_line
from weakspot._progress import Display
from weakspot.classifier import Classifier
from weakspot.cli.app import Failure, command, note, one_line
from weakspot.cli.labeled_images import find_labels
from weakspot.cli.options import (
    ImagesArgument,
    LabelsOption,
    ModelOptions,
    OutputOptions,
    SamplesOption,
    flag,
    option,
)
from weakspot.cli.output import print_text, progress_display, warnings_as_notes
from weakspot.cli.session import check_sources, load_classifier, open_session
from weakspot.models.identity import fingerprint

if TYPE_CHECKING:
    from weakspot.audit import Run
    from weakspot.explorer.desk import Desk
    from weakspot.explorer.gallery import Gallery
    from weakspot.explorer.gallery_desk import RecordDesk
    from weakspot.explorer.service import Service

MOST_RUNS = 2


@command(
    "weakspot explore cat.jpg",
    "weakspot explore photos/ --model my_package.models:build",
    "weakspot explore runs/v7 runs/v8",
    "weakspot explore --samples --port 9000 --no-browser",
)
def explore(
    context: typer.Context,
    network: ModelOptions,
    output: OutputOptions,
    images: ImagesArgument = None,
    samples: SamplesOption = False,
    labels: LabelsOption = None,
    dissected: Annotated[
        Path | None,
        option("FOLDER", "Folder that weakspot dissect wrote: units are shown with their concepts."),
    ] = None,
    port: Annotated[int, option("N", "Port; if it is taken, the next free one.", least=0)] = 8765,
    host: Annotated[
        str, option("HOST", "Address to listen on. Others than 127.0.0.1 let other machines connect.")
    ] = "127.0.0.1",
    base_url: Annotated[
        str,
        option(
            "URL", "Where a proxy shows the page: a path or a whole URL.", default="the server's own address"
        ),
    ] = "",
    token: Annotated[
        str | None,
        option("TEXT", "Token that the link holds, at least 16 characters.", default="a random one"),
    ] = None,
    no_browser: Annotated[bool, flag("--no-browser", "Do not open a browser.")] = False,
) -> None:
    """Open images and a model in the browser: brush a region, attack it, and see what the network loses.

    Of an audit, the records are shown: filtered, sorted, with pictures, each a click away from the bench. Two audits
    are shown side by side.

    The page is served on this machine only (without --host), behind a token. Ctrl-C ends it.
    """
    require("weakspot explore", "starlette", "uvicorn", "websockets", extra="explore")
    if output.as_json:
        raise Failure(
            "--json has no effect on explore, which opens a page and prints no results (leave it out)"
        )
    sources = list(images or [])
    check_sources(sources, samples=samples)
    _check_token(token)
    runs = runs_among(sources)
    if runs and labels is not None:
        raise Failure("--labels has no effect on an audit, which has its own")
    if runs and dissected is not None:
        raise Failure("--dissected has no effect on an audit (explore the images themselves)")
    address = Address(host, port, base_url, token, browser=not no_browser, quiet=output.quiet)
    if runs:
        # The runs stay open until the page is no longer served; the display of progress ends before.
        with ExitStack() as opened:
            with warnings_as_notes(output.quiet), progress_display(output.silent) as display:
                service = address.service(opened.enter_context(run_desk(runs, network, display)))
                with display.paused():
                    address.announce(service)
            _serve(service, output.quiet)
        _end()
    with open_session(context, network, output, Path(), ()) as session:
        from weakspot.explorer.bench import Bench, Origin
        from weakspot.explorer.desk import Desk
        from weakspot.explorer.pair_explanations import read_concepts

        read, truth, *_ = find_labels(labels, session, session.read_images(sources, samples=samples))
        bench = Bench(
            session.classifier, Origin(_model_options(network), _load_expression(network), samples, labels)
        )
        if dissected is not None:
            bench.concepts = read_concepts(dissected)
        bench.add(read.pixels, read.names, truth, paths=None if samples else read.paths)
        service = address.service(Desk(bench))
        with session.showing():
            address.announce(service)
    _serve(service, output.quiet)
    _end()


@dataclass(frozen=True)
class Address:
    """Where the page is served, and how the user gets there."""

    host: str
    port: int
    base_url: str
    token: str | None
    browser: bool
    quiet: bool

    def service(self, desk: Desk | RecordDesk) -> Service:
        """Take the port, or the next free one."""
        from weakspot.explorer.service import Service

        return Service.prepare(desk, host=self.host, port=self.port, token=self.token, base_url=self.base_url)

    def announce(self, service: Service) -> None:
        """Print the link and how to reach it, and open a browser where there is one."""
        from weakspot.explorer.service import forwarding_hint, has_display

        port = service.access.port
        if self.port and port != self.port:
            print_text(f"Port {self.port} is not free; {port} is used.")
        print_text(f"The explorer is at {service.url}")
        hint = forwarding_hint(port, service.host)
        if hint is not None:
            print_text(f"To open it on your own machine, run there: {hint}")
        if not service.is_local:
            print_text("Other machines can connect, and the token travels unencrypted.")
        if not self.quiet:
            print_text("Ctrl-C ends it.")
        if self.browser and has_display():
            webbrowser.open(service.url)


def _serve(service: Service, quiet: bool) -> None:
    """Serve until Ctrl-C, without a display of progress."""
    with warnings_as_notes(quiet):
        service.run()


def _end() -> NoReturn:
    """End the process at once.

    The interpreter's own end would search torch's objects for garbage for seconds, and would abort the process if a
    thread were inside the model.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _check_token(token: str | None) -> None:
    if token is not None and not re.fullmatch("[A-Za-z0-9_-]{16,200}", token):
        raise Failure("--token must be at least 16 letters, digits, - and _ (leave it out for a random one)")


def runs_among(sources: Sequence[Path]) -> list[Path]:
    """The folders that hold an audit.

    Raises:
        Failure: if there are more than two, or other things beside them.
    """
    runs = [source for source in sources if _is_audit(source)]
    if runs and len(runs) < len(sources):
        other = next(source for source in sources if source not in runs)
        raise Failure(
            f"explore shows images or audits, got both: {other} is no audit (leave out one of the two)"
        )
    if len(runs) > MOST_RUNS:
        raise Failure(f"explore shows one audit or two side by side, got {len(runs)}")
    return runs


def _is_audit(folder: Path) -> bool:
    file = folder / "run.json"
    try:
        about = json.loads(file.read_text("utf-8")) if file.is_file() else None
    except (OSError, ValueError):
        return True  # opening it then says what is wrong
    return isinstance(about, dict) and about.get("kind") == "audit"


@contextmanager
def run_desk(folders: Sequence[Path], network: ModelOptions, display: Display) -> Iterator[Desk | RecordDesk]:
    """The desk for the records of these runs, which are closed afterwards.

    It has no model if that of the first run cannot be loaded.

    Args:
        folders: one or two, of audits.
        network: the model that was asked for; if none was, it is the run's.
        display: of the progress.
    """
    require("weakspot explore of an audit", "duckdb", "fsspec", "pyarrow", "zarr", extra="audit")
    from weakspot.audit import open_run
    from weakspot.explorer.gallery import Gallery

    display.step("opening the records")
    runs = [open_run(folder) for folder in folders]
    gallery = Gallery(*runs)
    display.step("loading the model")
    try:
        yield _desk(gallery, runs[0], network)
    finally:
        gallery.close()


def _desk(gallery: Gallery, run: Run, network: ModelOptions) -> Desk | RecordDesk:
    from weakspot.explorer.bench import Bench
    from weakspot.explorer.desk import Desk
    from weakspot.explorer.gallery_desk import RecordDesk, gallery_questions

    try:
        classifier = _classifier(run, network)
    except Exception as error:  # noqa: BLE001 - whatever a factory raises: the records can be read without it
        why = f"cannot be loaded: {one_line(first_line(error))}"
        reason = (
            f"The model that was named, {network.model}, {why}."
            if _model_options(network)
            else f"The model of the run, {run.plan.model.spec}, {why} (name it with --model)."
        )
        note(f"{reason} The bench stays closed; the records are shown.", failure=True)
        return RecordDesk(gallery, reason)
    return Desk(Bench(classifier), gallery_questions(gallery))


def _classifier(run: Run, network: ModelOptions) -> Classifier:
    from weakspot.audit.execution.preparation import load_planned

    classifier = load_classifier(network) if _model_options(network) else load_planned(run.plan.model)
    known = run.info.model
    if known is not None and fingerprint(classifier) != known.fingerprint:
        note(
            f"The weights of {classifier.name} are not those that the audit {run.name} attacked: the bench shows what "
            "this network does now."
        )
    return classifier


def _model_options(network: ModelOptions) -> Sequence[str]:
    """The options of the model, as they are typed."""
    # Only what differs from the defaults.
    return [
        part
        for name in ("model", "weights", "mean", "std", "classes", "size")
        if (value := getattr(network, name)) not in {None, getattr(ModelOptions(), name)}
        for part in (f"--{name}", shlex.quote(str(value)))
    ]


def _load_expression(network: ModelOptions) -> str:
    """The Python expression that loads the model."""
    given = [f"{name}={value!r}" for name, value in network.arguments().items() if value is not None]
    return f"weakspot.load({', '.join([repr(network.model), *given])})"
