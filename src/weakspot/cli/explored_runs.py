"""`weakspot explore` of audits: the records of one run, or of two side by side, with the bench beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from weakspot._checks import first_line, require
from weakspot._progress import Display
from weakspot.cli.app import Failure, note, one_line
from weakspot.cli.options import ModelOptions
from weakspot.cli.session import load_classifier

if TYPE_CHECKING:
    from weakspot.audit import Run
    from weakspot.classifier import Classifier
    from weakspot.explorer.desk import Desk
    from weakspot.explorer.gallery import Gallery
    from weakspot.explorer.gallery_desk import RecordDesk

MOST = 2


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
    if len(runs) > MOST:
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
            if _is_named(network)
            else f"The model of the run, {run.plan.model.spec}, {why} (name it with --model)."
        )
        note(f"{reason} The bench stays closed; the records are shown.", failure=True)
        return RecordDesk(gallery, reason)
    return Desk(Bench(classifier), gallery_questions(gallery))


def _is_named(network: ModelOptions) -> bool:
    """Whether the user named a model or changed how it is loaded."""
    asked = ModelOptions()
    own = ("model", "weights", "mean", "std", "size", "classes")
    return any(getattr(network, name) != getattr(asked, name) for name in own)


def _classifier(run: Run, network: ModelOptions) -> Classifier:
    from weakspot.audit.execution.preparation import load_planned
    from weakspot.models.specs import fingerprint

    classifier = load_classifier(network) if _is_named(network) else load_planned(run.plan.model)
    known = run.info.model
    if known is not None and fingerprint(classifier) != known.fingerprint:
        note(
            f"The weights of {classifier.name} are not those that the audit {run.name} attacked: the bench shows what "
            "this network does now."
        )
    return classifier
