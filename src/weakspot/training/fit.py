"""Devices: one process, or as many as torchrun or SLURM have started, by Lightning Fabric.

Interrupts: Ctrl-C waits until a training stands between two updates.

Fitting: one training from its first or last checkpoint to its weights, alone in its folder.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from weakspot._checks import ModelWarning, warn
from weakspot._io.files import LockedError, locked, write_atomic
from weakspot.classifier import Classifier
from weakspot.datasets import LabeledImages
from weakspot.models.specs import find_device, fingerprint
from weakspot.regions import matched
from weakspot.training.checkpoint import (
    CHECKPOINT,
    WEIGHTS,
    check_same,
    clear_drafts,
    read_checkpoint,
    write_checkpoint,
    write_record,
)
from weakspot.training.config import Settings, find_recipe
from weakspot.training.data import Backgrounds, HeldOut, find_backgrounds
from weakspot.training.loop import Loop

if TYPE_CHECKING:
    from lightning_fabric import Fabric


PATIENCE = timedelta(days=1)  # of processes for the one that finds backgrounds


def make_fabric(device: str, precision: str) -> Fabric:
    """One process on the device, or this one of many.

    Raises:
        ValueError: when Lightning Fabric is not installed or there is no such device.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError:
        raise ValueError("training needs Lightning Fabric: pip install 'weakspot[train]'") from None
    where = find_device(device)
    if where.type not in {"cpu", "cuda", "mps"}:
        raise ValueError(f"device is {device!r}; accepted for training: cpu, cuda, cuda:NUMBER, mps")
    nodes, processes = _started()
    many = nodes * processes > 1
    devices: Any = [where.index or 0] if where.type == "cuda" and not many else processes
    fabric = Fabric(
        accelerator=where.type,
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=PATIENCE, find_unused_parameters=True) if many else "auto",
        # Else it finds out by itself that it runs under SLURM, and wants as many processes as a batch script asked for.
        plugins=None if many else [LightningEnvironment()],
        precision=precision,  # type: ignore[arg-type]  # checked by Settings
    )
    fabric.launch()
    if many:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """End the connection while Python is still whole: threads of it that outlive Python abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _started() -> tuple[int, int]:
    """Nodes, and processes on each, that torchrun or SLURM's srun have started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // here, here
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        return nodes, tasks // nodes
    return 1, 1


class Interrupts:
    """Whether somebody has asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def raise_if_interrupted(self) -> None:
        """Raises KeyboardInterrupt where somebody has."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """The first Ctrl-C is noted, the second one strikes at once; as before on exit, and outside the main thread."""
    noted = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.asked:
            signal.default_int_handler(number, frame)
        noted.asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)


LOCK = "training.lock"
NEEDS_BACKGROUND = {"background", "foreground", "random"}
SPLIT_SEED = 0  # which images are held out is a matter of the data, the same for every seed that is compared
FINDING = 0.3  # of the progress, where backgrounds have to be found first


@contextmanager
def exclusive(out: Path | None, fabric: Fabric) -> Iterator[None]:
    """Hold the lock of the folder, which is made where it is missing; the first process of a training does for all.

    Raises:
        LockedError: in all processes, when another training holds it.
    """
    if out is None:
        yield
        return
    with ExitStack() as held:
        refusal = ""
        if fabric.global_rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(out, LOCK))
            except LockedError as error:
                refusal = str(error)
        refusal = fabric.broadcast(refusal)  # the others would wait for the first in vain
        if refusal:
            raise LockedError(refusal)
        yield


def fit(
    classifier: Classifier,
    everything: LabeledImages,
    parts: tuple[Tensor, Tensor],
    settings: Settings,
    record: Mapping[str, Any],
    fabric: Fabric,
    *,
    out: Path | None,
    workers: int,
    every: float,
    masks: Path | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
    progress: Callable[[float], None] | None,
) -> None:
    """Train the classifier itself."""
    rows, kept = parts
    writes = fabric.global_rank == 0
    if out is not None and writes:
        clear_drafts(out)
    found, advance = None, progress
    region = find_recipe(settings.recipe).region
    if region in NEEDS_BACKGROUND and settings.attacked:
        first = None if progress is None else lambda done: progress(FINDING * done)
        with fabric.rank_zero_first():  # the others find what it kept
            found = find_backgrounds(everything, cache=masks, progress=first)
        advance = None if progress is None else lambda done: progress(FINDING + (1 - FINDING) * done)
    loop = Loop(
        fabric,
        classifier,
        everything.subset(rows),
        None if found is None else Backgrounds(found.bits[rows.numpy()], found.size),
        held_out_images(everything, kept, found, region, settings.seed),
        settings,
        workers,
    )
    state = None if out is None else read_checkpoint(out)
    if out is not None and state is not None:
        check_same(out / CHECKPOINT, record, json.loads(state.pop("record")))
        loop.go_on_from(state)

    def keep(now: Mapping[str, Any]) -> None:
        if out is not None and writes:
            write_checkpoint(out, {**now, "record": json.dumps(record)})
            write_record(out, {**record, "finished": False, "epochs": loop.history})

    if state is None:
        keep(loop.state())
    with deferred() as interrupts:
        loop.run(
            every=every,
            keep=keep if out is not None else None,
            on_epoch=on_epoch,
            progress=advance,
            raise_if_interrupted=interrupts.raise_if_interrupted,
        )
    loop.finish()
    if loop.stopped:
        warn(loop.stopped, ModelWarning)
    if out is not None and writes:
        # Copies: weights that modules share are written for each.
        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in classifier.network.state_dict().items()
            if isinstance(tensor, Tensor)
        }
        # Not save_file, which lets nobody else read what it writes.
        write_atomic(out / WEIGHTS, lambda draft: draft.write_bytes(save(tensors)), durable=True)
        finished = {"finished": True, "stopped": loop.stopped, "weights": fingerprint(classifier.network)}
        write_record(out, {**record, **finished, "epochs": loop.history})
        (out / CHECKPOINT).unlink(missing_ok=True)


def split(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, at most a tenth of all; the same for every recipe and seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held = min(held_out, count // 10)
    return order[held:].sort().values, order[:held].sort().values


def held_out_images(
    everything: LabeledImages, kept: Tensor, found: Backgrounds | None, region: str, seed: int
) -> HeldOut | None:
    """The held-out rows with the region that the recipe attacks, None where nothing is held out."""
    if not len(kept):
        return None
    masks = None if found is None else found.masks(kept)
    if masks is not None and region == "foreground":
        masks = ~masks
    if masks is not None and region == "random":
        masks = matched(masks, kind="random", seed=seed)
    return HeldOut(everything.images(kept), everything.labels[kept], masks)


def load_finished(classifier: Classifier, out: Path, record: Mapping[str, Any]) -> None:
    """The weights that a finished training left; says again why it stopped early, where it did."""
    path = out / WEIGHTS
    try:
        tensors = load_file(path)
        classifier.network.load_state_dict(tensors, strict=False)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, although the training is finished; remove {out} to begin anew"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {out} to begin anew") from None
    if fingerprint(classifier.network) != record.get("weights"):
        raise ValueError(f"{path} does not hold the weights of its training; remove {out} to begin anew")
    if record.get("stopped"):
        warn(str(record["stopped"]), ModelWarning)
