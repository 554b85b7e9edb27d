"""Training: a network made to stand attacks, or not, by one of several recipes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weakspot._checks import check_classes
from weakspot._state import EvalMode, copied, in_train_mode
from weakspot.budgets import Budget
from weakspot.classifier import Classifier, as_classifier
from weakspot.datasets import LabeledImages, from_tensors, read_labeled
from weakspot.training.checkpoint import find_earlier, make_record
from weakspot.training.config import Settings, defaults, find_recipe
from weakspot.training.fit import exclusive, fit, load_finished, make_fabric, split


def train(
    model: nn.Module,
    data: LabeledImages | tuple[Tensor, Tensor] | Path | str,
    *,
    recipe: str = "localized",
    budget: Budget | None = None,
    fraction: float = 0.5,
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
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """Train a copy of a network; part of every batch is attacked first, where and how the recipe says.

    Of a batch of n, the first round(share * n) are attacked and the loss is the mean over all: an estimate of
    (1 - share) CE(x) + share CE(x') at a cost of 1 + share * steps passes (Rothberg et al. 2019, arXiv 1909.04779, who
    alter the background; recipe "localized"). With "trades" the attacked share adds beta * KL(x || x') (Zhang et al.
    2019, arXiv 1901.08573). The network never sees a mask, only the adversary does; masks are cropped and flipped with
    their image. The adversary works on the network in eval mode: batch-norm statistics move by training alone.

    Equal arguments give equal weights on one machine. With `out`, a training that was killed at any moment goes on when
    it is called again, and ends with the weights that it would have had. Under torchrun or SLURM the batch is divided
    among the processes. After every epoch, held-out images are judged as they are and under PGD-10 in the recipe's
    region; where robust accuracy collapses (catastrophic overfitting of single-step training), training stops and the
    best weights before are returned.

    Args:
        model: any classifier of images in [0, 1], its weights the start; left as it is. Of a model in train mode, parts
            that are in eval mode (frozen batch-norm) stay so. Its hooks are copied with it, and run.
        data: images (N, C, H, W) with labels (N,), a `LabeledImages`, or a path for `read_labeled`.
        recipe: "standard", "localized", "foreground", "random_mask", "full", "fast" (one step, Wong et al. 2020, arXiv
            2001.03994), "noise" or "trades".
        budget: of the adversary; where not given 0.3 in L-infinity for gray images, 8/255 for color.
        fraction: of every batch that is attacked, 0 to 1; the recipe "standard" attacks none.
        epochs: passes over the data.
        seed: of everything random.
        out: folder for model.safetensors, training.json and, while it runs, checkpoint.pt.
        steps: of the adversary; 40 for gray images, 10 for color where not given.
        step_size: of each, in the budget's own unit; .01 and 2/255 where not given, 2.5 / steps of another budget.
        batch_size: images per update, all processes together.
        learning_rate: at the start, falling to zero along a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        beta: of TRADES.
        augment: "none", "crop" (shifts up to an eighth of the side), "crop,flip"; none for gray, both for color images
            where not given.
        held_out: images kept from training for judging, at most a tenth; under 100 nothing stops early.
        precision: "32-true", "16-mixed" or "bf16-mixed".
        device: "cpu", "cuda", ...; the model's own where not given.
        workers: processes that decode pictures, where they do not lie in memory.
        save_every: seconds between checkpoints within an epoch.
        masks: folder where backgrounds are kept from one training to the next; `out` where not given.
        about: what training.json says besides.
        on_epoch: called after every epoch with its row: epoch, loss, learning_rate, clean, robust, seconds.
        progress: called with the share done.

    Returns:
        The trained copy, in the mode of the model, on its device.

    Raises:
        ValueError: when an argument does not fit, naming it, or `out` holds another training.
        LockedError: a ValueError, when another process trains into `out`, saying which and since when.

    Warns:
        ModelWarning: when training stopped because robustness was lost.

    >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> trained = train(network, (images, labels), recipe="full", epochs=1, steps=2, batch_size=20, held_out=0)
    >>> bool((trained[1].weight != network[1].weight).any())
    True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; accepted is a torch.nn.Module that returns logits"
        )
    if out is not None and not isinstance(out, Path | str):
        raise ValueError(f"out is {out!r}; accepted is a folder's path")
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers is {workers!r}; accepted is a whole number from 0 up")
    folder = None if out is None else Path(out)
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model may draw from is put back
    try:
        with torch.random.fork_rng(), torch.inference_mode(mode=False), torch.enable_grad():
            classifier = _copied(model)
            everything = _as_labeled(data, classifier)
            _check_fit(classifier, everything)
            recipe_search = find_recipe(recipe).search
            usual = defaults(everything.shape[0])
            limits = usual["budget"] if budget is None else budget
            descends = recipe_search == "descent"
            count = 1 if not descends else usual["steps"] if steps is None else steps
            settings = Settings(
                recipe=recipe,
                budget=limits,
                fraction=fraction,
                epochs=epochs,
                seed=seed,
                steps=count,
                step_size=_step_size(usual, budget, steps, step_size) if descends else 0.0,
                batch_size=batch_size,
                learning_rate=learning_rate,
                momentum=momentum,
                weight_decay=weight_decay,
                beta=beta,
                augment=usual["augment"] if augment is None else augment,
                held_out=held_out,
                precision=precision,
            )
            record = make_record(settings, everything, classifier, about)
            earlier = None if folder is None else find_earlier(folder, record)
            home = classifier.mean.device
            if folder is not None and earlier is not None and earlier.get("finished"):
                load_finished(classifier, folder, earlier)
            else:
                fabric = make_fabric(device or str(home), precision)
                rows, kept = split(len(everything), held_out)
                _check_batches(batch_size, len(rows), fabric.world_size)
                with exclusive(folder, fabric):
                    # Again: another process may have finished it in the meantime.
                    earlier = None if folder is None else find_earlier(folder, record)
                    if folder is not None and earlier is not None and earlier.get("finished"):
                        load_finished(classifier, folder, earlier)
                    else:
                        fit(
                            classifier,
                            everything,
                            (rows, kept),
                            settings,
                            record,
                            fabric,
                            out=folder,
                            workers=workers,
                            every=save_every,
                            masks=masks or folder,
                            on_epoch=on_epoch,
                            progress=progress,
                        )
            result = classifier if isinstance(model, Classifier) else classifier.network
            result.to(home, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002
    for module, own in zip(result.modules(), model.modules(), strict=True):
        module.training = in_train_mode(own)
    return result


def _step_size(
    usual: Mapping[str, Any], budget: Budget | None, steps: int | None, step_size: float | None
) -> float:
    """As given; else the usual one, but of another budget or number of steps 2.5 times their ratio."""
    if step_size is not None:
        return step_size
    if budget is None and steps is None:
        return float(usual["step_size"])
    count = usual["steps"] if steps is None else steps
    limit = getattr(usual["budget"] if budget is None else budget, "eps", 1.0)
    return 2.5 * float(limit) / count if isinstance(count, int) and count > 0 else 1.0


def _copied(model: nn.Module) -> Classifier:
    """A copy to train.

    Raises:
        ValueError: when it cannot be copied or has no weights to train.
    """
    try:
        classifier = as_classifier(copied(model))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"model cannot be copied to be trained: {str(error).partition(chr(10))[0]}"
        ) from error
    if not any(weight.requires_grad for weight in classifier.parameters()):
        raise ValueError(
            f"{classifier.name} has no weights that require gradients; accepted is a model with some"
        )
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
            f"{classifier.name} does not take the data's images of {size} (channels x height x width): "
            f"{str(error).strip().partition(chr(10))[0][:160]}"
        ) from error
    check_classes(data.labels, len(data), classes)


def _check_batches(batch_size: int, images: int, processes: int) -> None:
    """Raises ValueError unless there are images for a batch, and the processes have equal parts of it."""
    if images < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}; there are {images} images to train on: accepted is no more"
        )
    if batch_size % processes:
        raise ValueError(
            f"batch_size is {batch_size}; accepted with {processes} processes is a multiple of that"
        )


def _as_labeled(data: Any, classifier: Classifier) -> LabeledImages:
    if isinstance(data, LabeledImages):
        return data
    if isinstance(data, Path | str):
        return read_labeled(data, size=classifier.input_size, channels=classifier.channels)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return replace(from_tensors(*data), name="tensors")
    raise ValueError(
        f"data is a {type(data).__name__}; accepted are (images, labels), a LabeledImages or the path of a data set"
    )
