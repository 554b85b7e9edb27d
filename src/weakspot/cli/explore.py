"""`weakspot explore`: the bench in a browser: brush, attack, probe, explain."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from weakspot.cli.aims import find_labels
from weakspot.cli.app import Failure, command
from weakspot.cli.explored_runs import run_desk, runs_among
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
from weakspot.cli.session import check_sources, open_session

if TYPE_CHECKING:
    from weakspot.explorer.desk import Desk
    from weakspot.explorer.gallery_desk import RecordDesk
    from weakspot.explorer.service import Service


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
    from weakspot._checks import require

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

        read = session.read_images(sources, samples=samples)
        aim = find_labels(labels, session.classifier, read)
        bench = Bench(
            session.classifier, Origin(_model_options(network), _load_expression(network), samples, labels)
        )
        if dissected is not None:
            bench.concepts = read_concepts(dissected)
        bench.add(read.pixels, read.names, aim.labels, paths=None if samples else read.paths)
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
        import webbrowser

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
    from weakspot.cli.options import parse_numbers, parse_size, read_class_names

    names = read_class_names(network.classes)
    given = {
        "weights": None if network.weights is None else str(network.weights),
        "mean": parse_numbers("--mean", network.mean),
        "std": parse_numbers("--std", network.std),
        "input_size": parse_size(network.size),
        "class_names": names,
    }
    arguments = [
        repr(network.model),
        *(f"{name}={value!r}" for name, value in given.items() if value is not None),
    ]
    return f"weakspot.load({', '.join(arguments)})"
