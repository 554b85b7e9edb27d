"""`train`: a trained copy of a network."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from weakspot._checks import check_classes
from weakspot._errors import first_line
from weakspot._progress import ProgressOption, shown
from weakspot._state import EvalMode, copied, in_train_mode, preserve_random_state
from weakspot.classifier import Classifier, as_classifier
from weakspot.datasets import LabeledImages
from weakspot.statistics.number_format import counted
from weakspot.training.checkpoint import Record, find_earlier, make_record
from weakspot.training.config import TrainConfig
from weakspot.training.data import TrainingData, as_labeled
from weakspot.training.fit import Job, exclusive, fit, load_finished, make_fabric
from weakspot.training.loop import Callbacks
from weakspot.training.robust_accuracy import split


def train(
    model: nn.Module,
    data: TrainingData,
    config: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
    *,
    out: Path | str | None = None,
    cache: Path | None = None,
    about: Record | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    progress: ProgressOption = None,
) -> nn.Module:
    """Train a copy of a network. A part of every batch is attacked first, as the recipe of the config says.

    Of a batch of n images, the first round(r * n) are attacked, with r = `config.attacked_fraction`, and the loss is
    the mean over all: an estimate of (1 - r) CE(x) + r CE(x') at the cost of 1 + r * steps passes (Rothberg et al.
    2019, arXiv 1909.04779, whose adversary alters the background: recipe "localized"). With recipe "trades" the
    attacked images add beta * KL(f(x) || f(x')) (Zhang et al. 2019, arXiv 1901.08573); "fast" is one step from a random
    start (Wong et al. 2020, arXiv 2001.03994). The network never sees a mask, only the adversary does; masks are
    cropped and flipped with their images. The adversary uses the network in eval mode, so that it does not change
    batch-norm statistics.

    Equal arguments give equal weights on one machine. With `out`, the same call resumes a training that was killed, and
    ends with the same weights as an undisturbed one. Under torchrun or SLURM the batch is divided among the processes.
    After every epoch, held-out images are evaluated without attack and under PGD-10 in the recipe's region; if robust
    accuracy collapses (catastrophic overfitting of single-step training), training stops and the best earlier weights
    are returned.

    Args:
        model: any classifier of images in [0, 1]. Its weights are the start; it is not changed. In a model in train
            mode, parts in eval mode (frozen batch-norm) stay frozen. Hooks are copied and run.
        data: one of

            - images (N, C, H, W), bytes or floats in [0, 1], with labels (N,); or a `LabeledImages`;
            - a torch `Dataset` of (image, label) with a length. Images are tensors (C, H, W) of one shape, bytes or
              floats in [0, 1]. Items are read when a batch needs them, after one pass over all items for their labels,
              so that large data sets need not fit into memory. An item must be the same each time it is read: use
              `config.augment` instead of random transforms.
            - a `DataLoader` of such a data set. It stands for its data set: the batch size, the order and the
              augmentation are those of `config`, whatever the loader does; `drop_last` has no effect. A loader whose
              sampler leaves items out is refused.
            - the path of a data set (see `datasets.read_labeled`).
        config: recipe, budget and every number.
        out: folder for model.safetensors, training.json and, until the training is finished, checkpoint.pt.
        cache: folder that stores the backgrounds for later trainings. Default: `out`.
        about: more entries for training.json.
        on_epoch: called after every epoch with its row: epoch, loss, learning_rate, clean, robust, seconds.
        progress: True for a bar on standard error or in the notebook, or a function of the fraction done.

    Returns:
        The trained copy, in the mode and on the device of the model.

    Raises:
        ValueError: if an argument does not fit, or `out` holds another training.
        LockedError: a ValueError, if another process trains into `out`.

    Warns:
        ModelWarning: if training stopped because robustness collapsed.

    >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> config = TrainConfig(recipe="full", epochs=1, steps=2, batch_size=20, held_out=0)
    >>> trained = train(network, (images, labels), config)
    >>> bool((trained[1].weight != network[1].weight).any())
    True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module that returns logits, got {type(model).__name__}")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config must be a TrainConfig, got {type(config).__name__}")
    if out is not None and not isinstance(out, Path | str):
        raise ValueError(f"out must be the path of a folder, got {out!r}")
    folder = None if out is None else Path(out)
    with (
        torch.random.fork_rng(),  # the generators of all devices
        preserve_random_state(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        shown(progress, "training") as report,
    ):
        callbacks = Callbacks(on_epoch=on_epoch, progress=report)
        classifier = _copied(model)
        images = as_labeled(data, classifier, workers=config.workers)
        _check_fit(classifier, images)
        resolved = config.resolved(images.shape[0])
        record = make_record(resolved, images, classifier, about)
        home = classifier.mean.device
        job = Job(classifier, images, resolved, record, out=folder, cache=cache or folder)
        # Also without Lightning Fabric a finished training can be loaded.
        if not _loaded(job):
            _fit_exclusively(job, home, callbacks)
        result = classifier if isinstance(model, Classifier) else classifier.network
        # Training may have moved it to another device and into another memory layout.
        result.to(home, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module, own in zip(result.modules(), model.modules(), strict=True):
        module.training = in_train_mode(own)
    return result


def _fit_exclusively(job: Job, home: torch.device, callbacks: Callbacks) -> None:
    """Train while holding the lock of the folder."""
    fabric = make_fabric(job.config.device or str(home), job.config.precision)
    rows, _ = split(len(job.data), job.config.held_out)
    _check_batches(job.config.batch_size, len(rows), fabric.world_size)
    with exclusive(job.out, fabric):
        if not _loaded(job):  # another process may have finished it since the first look
            fit(job, fabric, callbacks)


def _loaded(job: Job) -> bool:
    """Load the weights if the folder holds this training, finished.

    Raises:
        ValueError: if the folder holds another training.
    """
    earlier = None if job.out is None else find_earlier(job.out, job.record)
    if job.out is None or earlier is None or not earlier.get("finished"):
        return False
    load_finished(job.classifier, job.out, earlier)
    return True


def _copied(model: nn.Module) -> Classifier:
    """A copy to train.

    Raises:
        ValueError: if the model cannot be copied or has no weights to train.
    """
    try:
        classifier = as_classifier(copied(model))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"model must be one that can be copied, but copying raised: {first_line(error)}"
        ) from error
    if not any(weight.requires_grad for weight in classifier.parameters()):
        raise ValueError(f"model must have weights that require gradients, got {classifier.name} without any")
    return classifier


def _check_fit(classifier: Classifier, data: LabeledImages) -> None:
    """Raises ValueError unless the network takes the images and has a logit for every label."""
    size = " x ".join(map(str, data.shape))
    try:
        with EvalMode(classifier), torch.no_grad():
            images = data.images(torch.arange(min(2, len(data)))).to(classifier.mean)
            classes = classifier(classifier.filled(images)).shape[1]
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(
            f"data must be images that {classifier.name} takes, got {size} (channels x height x width), on which it "
            f"raised: {first_line(error)[:160]}"
        ) from error
    check_classes(data.labels, len(data), classes)


def _check_batches(batch_size: int, images: int, processes: int) -> None:
    """Raises ValueError unless there are images for a batch, and equal parts of it for all processes."""
    if images < batch_size:
        raise ValueError(
            f"batch_size must be at most the {counted(images)} to train on, got {batch_size} (give a smaller one)"
        )
    if batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}")
