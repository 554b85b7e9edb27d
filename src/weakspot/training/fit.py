"""One training from its first or last checkpoint to its weights: devices, interrupts, the lock of its folder."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from weakspot._checks import ModelWarning, warn
from weakspot._io.files import LockedError, locked, write_atomic
from weakspot._progress import Progress, part
from weakspot.classifier import Classifier
from weakspot.datasets import LabeledImages
from weakspot.models.identity import fingerprint
from weakspot.models.specs import find_device
from weakspot.training.checkpoint import (
    CHECKPOINT,
    WEIGHTS,
    Record,
    State,
    check_same,
    clear_drafts,
    read_checkpoint,
    write_checkpoint,
    write_record,
)
from weakspot.training.config import ResolvedConfig, find_recipe
from weakspot.training.data import Backgrounds, find_backgrounds
from weakspot.training.loop import Callbacks, Loop
from weakspot.training.robust_accuracy import held_out_images, split

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PATIENCE = timedelta(days=1)  # other processes wait this long for the first one to find the backgrounds
LOCK = "training.lock"
BACKGROUND_PROGRESS = 0.3  # fraction of the progress bar, if backgrounds have to be found first


@dataclass(frozen=True)
class Job:
    """What is trained, and where it is stored.

    Attributes:
        classifier: trained in place.
        data: all images, those that are held out too.
        config: every number of the training.
        record: the content of training.json.
        out: folder of the results.
        cache: folder of the backgrounds.
    """

    classifier: Classifier
    data: LabeledImages
    config: ResolvedConfig
    record: Record
    out: Path | None
    cache: Path | None


def fit(job: Job, fabric: Fabric, callbacks: Callbacks) -> None:
    """Train the classifier of a job."""
    out, config, classifier = job.out, job.config, job.classifier
    writes = fabric.global_rank == 0
    if out is not None and writes:
        clear_drafts(out)
    progress = callbacks.progress
    backgrounds = _backgrounds(job, fabric, progress)
    rows, held = split(len(job.data), config.held_out)
    loop = Loop(
        fabric,
        classifier,
        job.data.subset(rows),
        config,
        backgrounds=None if backgrounds is None else backgrounds.subset(rows),
        held_out=held_out_images(job.data, held, backgrounds, config),
    )
    earlier = None if out is None else read_checkpoint(out)
    if out is not None and earlier is not None:
        # training.json was compared before; the checkpoint must be of this training too.
        check_same(out, job.record, earlier[1])
        loop.resume(earlier[0])

    def save_state(state: State) -> None:
        if out is not None and writes:
            write_checkpoint(out, state, job.record)
            write_record(out, {**job.record, "finished": False, "epochs": loop.history})

    if earlier is None:
        save_state(loop.state())  # from now on the folder belongs to this training
    # Finding backgrounds was the first part of the progress bar.
    if backgrounds is not None:
        progress = part(progress, BACKGROUND_PROGRESS, 1)
    with deferred_interrupts() as raise_if_interrupted:
        loop.run(
            replace(
                callbacks,
                save=save_state if out is not None else None,
                progress=progress,
                raise_if_interrupted=raise_if_interrupted,
            )
        )
    loop.finish()
    if loop.stopped:
        warn(loop.stopped, ModelWarning)
    if out is not None and writes:
        _write_finished(out, classifier, {**job.record, "epochs": loop.history, "stopped": loop.stopped})


def _backgrounds(job: Job, fabric: Fabric, progress: Progress | None) -> Backgrounds | None:
    """The backgrounds of all images, if the recipe needs them."""
    if find_recipe(job.config.recipe).region == "everywhere" or not job.config.attacked:
        return None
    first = part(progress, 0, BACKGROUND_PROGRESS)
    with fabric.rank_zero_first():  # the other processes read what the first one stored
        return find_backgrounds(job.data, cache=job.cache, progress=first)


def _write_finished(out: Path, classifier: Classifier, record: Record) -> None:
    """Write the weights and the final record, then remove the checkpoint."""
    # Clones, because safetensors refuses weights that modules share.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in classifier.network.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    # Not save_file, which makes files that only their owner can read.
    write_atomic(out / WEIGHTS, lambda draft: draft.write_bytes(save(tensors)), durable=True)
    # In this order, so that a crash in between leaves either a checkpoint or finished weights.
    write_record(out, {**record, "finished": True, "weights": fingerprint(classifier.network)})
    (out / CHECKPOINT).unlink(missing_ok=True)


def load_finished(classifier: Classifier, out: Path, record: Record) -> None:
    """Load the weights of a finished training; warns again if it had stopped early.

    Raises:
        ValueError: if the weights are missing or damaged.
    """
    path, remedy = out / WEIGHTS, f"remove {out} to start over"
    try:
        tensors = load_file(path)
        classifier.network.load_state_dict(tensors, strict=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, although the training is finished; {remedy}") from None
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None
    if fingerprint(classifier.network) != record.get("weights"):
        raise ValueError(f"{path} does not hold the weights of its training; {remedy}")
    if record.get("stopped"):
        warn(str(record["stopped"]), ModelWarning)


def make_fabric(device: str, precision: str) -> Fabric:
    """This process alone, or as one of those that torchrun or SLURM started.

    Raises:
        ValueError: if Lightning Fabric is not installed or there is no such device.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError:
        raise ValueError("training needs Lightning Fabric: pip install 'weakspot[train]'") from None
    place = find_device(device)
    if place.type not in {"cpu", "cuda", "mps"}:
        raise ValueError(f"device must be cpu, cuda, cuda:NUMBER or mps to train on, got {device!r}")
    nodes, processes = _started_processes()
    many = nodes * processes > 1
    fabric = Fabric(
        accelerator=place.type,
        devices=[place.index or 0] if place.type == "cuda" and not many else processes,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=PATIENCE, find_unused_parameters=True) if many else "auto",
        # Otherwise Fabric detects SLURM by itself and expects as many processes as the batch script asked for.
        plugins=None if many else [LightningEnvironment()],
        precision=precision,  # type: ignore[arg-type]  # checked by TrainConfig
    )
    fabric.launch()
    if many:
        atexit.register(_leave_group)
    return fabric


def _leave_group() -> None:
    """Close the connection before Python exits: its threads would abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _started_processes() -> tuple[int, int]:
    """Number of nodes, and of processes on each, that torchrun or SLURM's srun started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // local, local
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        return nodes, tasks // nodes
    return 1, 1


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Note the first Ctrl-C instead of raising; a second one raises. Only in the main thread.

    Yields:
        A function that raises KeyboardInterrupt if there was one.
    """
    requested = False

    def raise_if_interrupted() -> None:
        if requested:
            raise KeyboardInterrupt

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            signal.default_int_handler(number, frame)
        requested = True

    if threading.current_thread() is not threading.main_thread():
        yield raise_if_interrupted
        return
    earlier = signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, earlier if earlier is not None else signal.default_int_handler)


@contextmanager
def exclusive(out: Path | None, fabric: Fabric) -> Iterator[None]:
    """Make the folder and hold its lock, which the first process takes for all processes of a training.

    Raises:
        LockedError: in all processes, if another training holds it.
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
        refusal = fabric.broadcast(refusal)  # otherwise the other processes would wait forever
        if refusal:
            raise LockedError(refusal)
        yield
