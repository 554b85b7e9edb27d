"""run.json: what a run states about itself, from its plan to its outcome."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from weakspot._io.files import write_atomic
from weakspot.audit.plan.plan import Plan
from weakspot.audit.plan.schema import Reader
from weakspot.audit.store.digests import enumerated
from weakspot.models.identity import Probe, read_probe

SCHEMA = 1  # of the folder; grows when an older version could no longer read what is written
KIND = "audit"
RUN_FILE = "run.json"
Facts = Mapping[str, str | int | None]


@dataclass(frozen=True)
class ModelInfo:
    """The model of a run.

    Attributes:
        name: of the model.
        fingerprint: digest of its weights.
        classes: number of classes.
        input_size: (height, width).
        probe: its answers to fixed images.
    """

    name: str
    fingerprint: str
    classes: int
    input_size: tuple[int, int]
    probe: Probe = field(repr=False)


@dataclass(frozen=True)
class ImageCounts:
    """How many images were listed, read, skipped (no pictures) and are missing (unavailable); None before the end."""

    listed: int
    read: int | None = None
    skipped: int | None = None
    missing: int | None = None


@dataclass(frozen=True)
class MissingImages:
    """Listed images that are unavailable: how many, some names, and the reason for the first."""

    images: int
    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class RunInfo:
    """The content of run.json.

    Attributes:
        plan: resolved.
        status: "planned" (before the images are listed), "running", "incomplete" (images are missing) or "complete".
        command: that started the audit.
        started: UTC.
        versions: of everything that decides a result.
        host: the machine on which the audit started.
        model: None while planned.
        device: of the model.
        images: None while planned.
        labels: source of labels -> number of images.
        absent: sources that did not exist when the audit began.
        remarks: sentences about the model and earlier sessions that a reader must know.
        checksums: file -> digest, of the run's own Parquet files.
        missing: set while incomplete.
        engine: that the last session used.
        finished: UTC; None until complete.
        seconds: working time of all shards.
        images_per_second: over that time.
    """

    plan: Plan
    status: str
    command: str
    started: str
    versions: Mapping[str, str]
    host: Facts
    model: ModelInfo | None = None
    device: str = ""
    images: ImageCounts | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)
    missing: MissingImages | None = None
    engine: Facts = field(default_factory=dict)
    finished: str | None = None
    seconds: float | None = None
    images_per_second: float | None = None

    @classmethod
    def planned(cls, plan: Plan, command: str) -> RunInfo:
        """The state of a run before anything is done."""
        host: Facts = {
            "name": platform.node(),
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
        stores = {name: version(name) for name in ("pyarrow", "zarr", "pandas")}
        return cls(plan, "planned", command, now(), {**versions(), **stores}, host)

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> RunInfo:
        """Read the run.json of a folder, which messages call `name`.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if the file is damaged, or from another command or a newer weakspot.
        """
        name = name or str(folder)
        path = folder / RUN_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{name} holds no run (it has no {RUN_FILE})")
        file = f"{name.rstrip('/')}/{RUN_FILE}"
        try:
            values = json.loads(path.read_text("utf-8"))
        except ValueError:
            raise ValueError(
                f"{file} is damaged: it is not valid JSON (restore it or start another audit)"
            ) from None
        return cls.from_json(values, file)

    @classmethod
    def from_json(cls, values: object, name: str = RUN_FILE) -> RunInfo:
        """Read the parsed content of a run.json; `name` is the file in messages."""
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise ValueError(f"{name} must be written by weakspot audit, got a file of another command")
        schema = values.get("schema")
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ValueError(
                f"{name} was written by a newer weakspot (schema {schema}, this one reads up to {SCHEMA}; upgrade "
                "weakspot to open it)"
            )
        reader = Reader(own={Plan: Plan.from_mapping, Probe: read_probe})  # type: ignore[dict-item]  # they check
        try:
            return reader.table(cls, values, "run")
        except ValueError as error:
            raise ValueError(f"{name} is damaged: {error} (restore it or start another audit)") from None

    def to_json(self) -> dict[str, object]:
        """Plain values that `from_json` reads; what is not known yet is left out."""
        values = {
            **asdict(replace(self, model=None)),
            "plan": self.plan.as_mapping(),
            "images": None if self.images is None else _without_none(asdict(self.images)),
        }
        if self.model is not None:
            values["model"] = {**asdict(self.model), "probe": self.model.probe.as_mapping()}
        # Before the images are listed these are unknown rather than empty.
        empty = () if self.status != "planned" else ("device", "labels", "absent", "remarks", "checksums")
        skipped = {*empty, *(() if self.engine else ("engine",))}
        values = {key: value for key, value in values.items() if key not in skipped}
        return {"schema": SCHEMA, "kind": KIND, **_without_none(values)}

    def write(self, folder: Path) -> None:
        """Write run.json atomically; on return it has reached the disk."""
        text = json.dumps(self.to_json(), indent=2) + "\n"
        write_atomic(folder / RUN_FILE, lambda draft: draft.write_text(text, "utf-8"), durable=True)

    @property
    def complete(self) -> bool:
        """Whether the audit has finished with every image."""
        return self.status == "complete"

    def with_remarks(self, remarks: Iterable[str]) -> RunInfo:
        """The same with these remarks added, each once."""
        return replace(self, remarks=tuple(dict.fromkeys([*self.remarks, *remarks])))

    def shortfall(self, name: str) -> str:
        """Why no final conclusion is possible, in a sentence; empty if every requested image was audited.

        Args:
            name: the run's folder or URL.
        """
        command = resume_command(name)
        if not self.complete and self.missing is not None and self.images is not None:
            names = ", ".join(self.missing.names)
            more = ", ..." if self.missing.images > len(self.missing.names) else ""
            return (
                f"the audit is not complete: {self.missing.images:,} of {self.images.listed:,} images can no longer be "
                f"read ({names}{more}; {self.missing.reason}); restore them and continue with {command}"
            )
        if not self.complete:
            return f"the audit is not complete; continue with {command}"
        if self.absent:
            exist = "it does" if len(self.absent) == 1 else "they do"
            return (
                f"the audit lacks {enumerated(self.absent)}, which did not exist when it began; start another audit "
                f"once {exist}"
            )
        return ""


def resume_command(name: str) -> str:
    """The command that continues the audit of a folder or URL."""
    return f"weakspot audit --resume {shlex.quote(name)}"


def versions() -> dict[str, str]:
    """Versions of everything that decides a result."""
    return {
        "weakspot": version("weakspot"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def changed_versions(before: Mapping[str, str], *, then: str = "then", now: str = "now") -> str:
    """What differs from the versions of this process, such as "torch 2.4 then, 2.5 now"; empty if nothing does."""
    return "; ".join(
        f"{name} {before.get(name)} {then}, {value} {now}"
        for name, value in versions().items()
        if before.get(name) != value
    )


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}
