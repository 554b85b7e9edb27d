"""Training: a network made to stand attacks, or not, by one of several recipes."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import weakspot
from weakspot.budgets import Budget
from weakspot.checks import ModelWarning
from weakspot.classifier import Classifier, as_classifier
from weakspot.datasets import Labelled, from_tensors, read_labelled
from weakspot.defenses.training.backgrounds import Backgrounds, data_fingerprint, find_backgrounds
from weakspot.defenses.training.checkpoint import (
    CHECKPOINT,
    WEIGHTS,
    read_checkpoint,
    read_record,
    write_checkpoint,
    write_record,
    write_synced,
)
from weakspot.defenses.training.held_out import HeldOut
from weakspot.defenses.training.loop import Loop
from weakspot.defenses.training.recipes import find_recipe
from weakspot.defenses.training.settings import Settings, defaults
from weakspot.models.fingerprint import fingerprint

if TYPE_CHECKING:
    from lightning_fabric import Fabric

NEEDS_BACKGROUND = {"background", "foreground", "random"}
SPLIT_SEED = 0  # which images are held out is a matter of the data, the same for every seed that is compared
PATIENCE = timedelta(days=1)  # of processes for the one that finds backgrounds
FINDING = 0.3  # of the progress, where backgrounds have to be found first


def train(
    model: nn.Module,
    data: Labelled | tuple[Tensor, Tensor] | Path | str,
    *,
    recipe: str = "localized",
    budget: Budget | None = None,
    share: float = 0.5,
    epochs: int = 10,
    seed: int = 0,
    out: Path | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    beta: float = 6.0,
    augment: str | None = None,
    held_out: int = 512,
    precision: str = "32-true",
    device: str | None = None,
    workers: int = 2,
    save_every: float = 60.0,
    masks: Path | None = None,
    about: Mapping[str, Any] | None = None,
    told: Callable[[dict[str, float]], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """Train a copy of a network; part of every batch is attacked first, where and how the recipe says.

    Of a batch of n, the first round(share * n) are attacked and the loss is the mean over all: an estimate of
    (1 - share) CE(x) + share CE(x') at a cost of 1 + share * steps passes (Rothberg et al. 2019, arXiv 1909.04779, who
    alter the background; recipe "localized"). With "trades" the attacked share adds beta * KL(x' || x) (Zhang et al.
    2019, arXiv 1901.08573). The network never sees a mask, only the adversary does; masks are cropped and flipped with
    their image. The adversary works on the network in eval mode: batch-norm statistics move by training alone.

    Equal arguments give equal weights on one machine. With `out`, a training that was killed at any moment goes on when
    it is called again, and ends with the weights that it would have had. Under torchrun or SLURM the batch is divided
    among the processes. After every epoch, held-out images are judged as they are and under PGD-10 in the recipe's
    region; where robust accuracy collapses (catastrophic overfitting of single-step training), training stops and the
    best weights before are returned.

    Args:
        model: any classifier of images in [0, 1], its weights the start; left as it is.
        data: images (N, C, H, W) with labels (N,), a `Labelled`, or a path for `read_labelled`.
        recipe: "standard", "localized", "foreground", "random_mask", "full", "fast" (one step, Wong et al. 2020, arXiv
            2001.03994), "noise" or "trades".
        budget: of the adversary; where not given 0.3 in L-infinity for grey images, 8/255 for colour.
        share: of every batch that is attacked, 0 to 1; the recipe "standard" attacks none.
        epochs: passes over the data.
        seed: of everything random.
        out: folder for model.safetensors, training.json and, while it runs, checkpoint.pt.
        steps: of the adversary; 40 for grey images, 10 for colour where not given.
        step_size: of each, in the budget's own unit; .01 and 2/255 where not given, 2.5 / steps of another budget.
        batch_size: images per update, all processes together.
        learning_rate: at the start, falling to zero along a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        beta: of TRADES.
        augment: "none", "crop" (shifts up to an eighth of the side), "crop,flip"; none for grey, both for colour images
            where not given.
        held_out: images kept from training for judging, at most a tenth; under 100 nothing stops early.
        precision: "32-true", "16-mixed" or "bf16-mixed".
        device: "cpu", "cuda", ...; the model's own where not given.
        workers: processes that decode pictures, where they do not lie in memory.
        save_every: seconds between checkpoints within an epoch.
        masks: folder where backgrounds are kept from one training to the next; `out` where not given.
        about: what training.json says besides.
        told: called after every epoch with its row: epoch, loss, learning_rate, clean, robust, seconds.
        progress: called with the share done.

    Returns:
        The trained copy, in the mode of the model, on its device.

    Raises:
        ValueError: when an argument does not fit, naming it, or `out` holds another training.

    Warns:
        ModelWarning: when training stopped because robustness was lost.

    >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> trained = train(network, (images, labels), recipe="full", epochs=1, steps=2, batch_size=20, held_out=0)
    >>> bool((trained[1].weight != network[1].weight).any())
    True
    """
    classifier = as_classifier(copy.deepcopy(model))
    everything = _as_labelled(data, classifier)
    usual = defaults(everything.shape[0])
    limits = usual["budget"] if budget is None else budget
    count = usual["steps"] if steps is None else steps
    size = step_size
    if size is None:
        own = budget is None and steps is None
        size = usual["step_size"] if own else 2.5 * float(getattr(limits, "eps", 1.0)) / max(1, count)
    settings = Settings(
        recipe=recipe,
        budget=limits,
        share=share,
        epochs=epochs,
        seed=seed,
        steps=count,
        step_size=size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        beta=beta,
        augment=usual["augment"] if augment is None else augment,
        held_out=held_out,
        precision=precision,
    )
    record = {
        "settings": settings.as_record(),
        "data": {
            "name": everything.name,
            "images": len(everything),
            "fingerprint": data_fingerprint(everything),
        },
        "start": fingerprint(classifier.network),
        "versions": {"weakspot": weakspot.__version__, "torch": torch.__version__},
        **(about or {}),
    }
    earlier = None if out is None else _earlier(Path(out), record)
    home = classifier.mean.device
    if earlier is not None and earlier.get("finished"):
        _load_finished(classifier, Path(out or ""))
    else:
        with torch.random.fork_rng(), torch.inference_mode(mode=False), torch.enable_grad():
            _train(
                classifier,
                everything,
                settings,
                record,
                out=None if out is None else Path(out),
                device=device or str(home),
                workers=workers,
                every=save_every,
                masks=masks or out,
                told=told,
                progress=progress,
            )
    result = classifier if isinstance(model, Classifier) else classifier.network
    result.to(home, memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as torch documents it
    result.train(model.training)
    return result


def _train(
    classifier: Classifier,
    everything: Labelled,
    settings: Settings,
    record: Mapping[str, Any],
    *,
    out: Path | None,
    device: str,
    workers: int,
    every: float,
    masks: Path | None,
    told: Callable[[dict[str, float]], None] | None,
    progress: Callable[[float], None] | None,
) -> None:
    """Train the classifier itself."""
    fabric = make_fabric(device, settings.precision)
    rows, kept = split(len(everything), settings.held_out)
    if len(rows) < settings.batch_size:
        raise ValueError(
            f"batch_size is {settings.batch_size}; there are {len(rows)} images to train on: accepted is no more"
        )
    if settings.batch_size % fabric.world_size:
        raise ValueError(
            f"batch_size is {settings.batch_size}; accepted with {fabric.world_size} processes is a multiple of that"
        )
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
        _held_out(everything, kept, found, region, settings.seed),
        settings,
        workers,
    )
    state = None if out is None else read_checkpoint(out)
    if state is not None:
        loop.go_on_from(state)
    writes = out is not None and fabric.global_rank == 0
    if out is not None and writes:
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, {**record, "finished": False, "epochs": loop.history})

    def keep(now: Mapping[str, Any]) -> None:
        if out is not None and writes:
            write_checkpoint(out, now)

    try:
        loop.run(every=every, keep=keep if writes else None, told=told, progress=advance)
    except KeyboardInterrupt:
        keep(loop.state())
        raise
    loop.finish()
    if loop.stopped:
        warnings.warn(loop.stopped, ModelWarning, stacklevel=4)
    if out is not None and writes:
        tensors = {name: tensor.contiguous() for name, tensor in classifier.network.state_dict().items()}
        # Not save_file, which lets nobody else read what it writes.
        write_synced(out / WEIGHTS, lambda draft: draft.write_bytes(save(tensors)))
        finished = {"finished": True, "stopped": loop.stopped, "weights": fingerprint(classifier.network)}
        write_record(out, {**record, **finished, "epochs": loop.history})
        (out / CHECKPOINT).unlink(missing_ok=True)


def split(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, at most a tenth of all; the same for every recipe and seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held = min(held_out, count // 10)
    return order[held:].sort().values, order[:held].sort().values


def make_fabric(device: str, precision: str) -> Fabric:
    """One process on the device, or as many as torchrun or SLURM have started.

    Raises:
        ValueError: when Lightning Fabric is not installed or knows no such device.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError:
        raise ValueError("training needs Lightning Fabric: pip install 'weakspot[train]'") from None
    kind, _, number = device.partition(":")
    if kind not in {"cpu", "cuda", "mps"}:
        raise ValueError(f"device is {device!r}; accepted for training: cpu, cuda, cuda:NUMBER, mps")
    nodes, processes = _started()
    many = nodes * processes > 1
    devices: Any = processes if many or kind == "cpu" else [int(number or 0)]
    fabric = Fabric(
        accelerator=kind,
        devices=1 if kind == "mps" else devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=PATIENCE) if many else "auto",
        precision=precision,  # type: ignore[arg-type]  # checked by Settings
    )
    fabric.launch()
    return fabric


def _started() -> tuple[int, int]:
    """Nodes, and processes on each, that torchrun or SLURM have started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // here, here
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return nodes, int(os.environ["SLURM_NTASKS"]) // nodes
    return 1, 1


def _as_labelled(data: Any, classifier: Classifier) -> Labelled:
    if isinstance(data, Labelled):
        return data
    if isinstance(data, Path | str):
        return read_labelled(data, size=classifier.input_size, channels=classifier.channels)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return replace(from_tensors(*data), name="tensors")
    raise ValueError(
        f"data is a {type(data).__name__}; accepted are (images, labels), a Labelled or the path of a data set"
    )


def _held_out(
    everything: Labelled, kept: Tensor, found: Backgrounds | None, region: str, seed: int
) -> HeldOut | None:
    if not len(kept):
        return None
    masks = None if found is None else found.masks(kept)
    if masks is not None and region == "foreground":
        masks = ~masks
    if masks is not None and region == "random":
        from weakspot.regions import matched

        masks = matched(masks, kind="random", seed=seed)
    return HeldOut(everything.images(kept), everything.labels[kept], masks)


def _earlier(out: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the training that `out` holds.

    Raises:
        ValueError: when it is of another training, naming what differs.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file; accepted is a folder, made where it is missing")
    earlier = read_record(out)
    if earlier is None:
        return None
    for part in ("settings", "data", "start"):
        asked, there = record[part], earlier.get(part)
        if asked != there:
            detail = ""
            if isinstance(asked, Mapping) and isinstance(there, Mapping):
                name = next(key for key in asked if asked[key] != there.get(key))
                detail = f" ({name} is {there.get(name)} there, {asked[name]} here)"
            raise ValueError(
                f"out is {out}, which holds a training with other {part}{detail}; give another folder"
            )
    return earlier


def _load_finished(classifier: Classifier, out: Path) -> None:
    from safetensors.torch import load_file

    classifier.network.load_state_dict(load_file(out / WEIGHTS))
