"""The loop: epochs of updates, on one device or many, that can stop anywhere and go on as if they had not."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._state import EvalMode
from weakspot.classifier import Classifier
from weakspot.datasets import LabeledImages
from weakspot.datasets.labeled import as_float
from weakspot.training.adversary import perturbed, quick_stem
from weakspot.training.config import Settings, find_recipe
from weakspot.training.data import Backgrounds, HeldOut, Moves, collapsed, mixed_seed

if TYPE_CHECKING:
    from lightning_fabric import Fabric


ORDER, NOISE, SCATTER, DROPOUT = 0, 2, 3, 4  # streams of random numbers; 1 is that of augmentation
ENOUGH = 100  # held-out images from which on a fall in their accuracy is more than chance
State = dict[str, Any]


class Loop:
    """One training: network, optimizer, data, and where it stands.

    Everything random is drawn from (seed, epoch, update), so that where it stands is two numbers.

    Attributes:
        epoch: the one in progress.
        update: updates done in it.
        history: a row for every finished epoch.
        stopped: why it ended before its last epoch, or "".
    """

    def __init__(
        self,
        fabric: Fabric,
        classifier: Classifier,
        data: LabeledImages,
        backgrounds: Backgrounds | None,
        held_out: HeldOut | None,
        settings: Settings,
        workers: int,
    ) -> None:
        self.fabric, self.data, self.settings = fabric, data, settings
        self.recipe = find_recipe(settings.recipe)
        self.backgrounds, self.held_out, self.workers = backgrounds, held_out, workers
        self.per_epoch = len(data) // settings.batch_size
        self.epoch, self.update = 0, 0
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.stopped = ""
        self.best: tuple[float, dict[str, Tensor]] | None = None
        optimizer = torch.optim.SGD(
            classifier.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        # What is in eval mode inside a network in train mode was meant to stay there, such as frozen batch-norm.
        if not classifier.training:
            classifier.train()
        modes = [(module, module.training) for module in classifier.modules()]
        self.layout = layout_of(classifier)
        classifier.to(memory_format=self.layout)  # type: ignore[call-overload]  # as torch documents it
        # Known before the wrapper takes it: the adversary goes through the bare network, which moves no buckets of
        # gradients between devices.
        self.classifier = classifier
        self.network, self.optimizer = fabric.setup(_InOwnMode(classifier), optimizer)
        for module, mode in modes:
            module.training = mode
        stored = classifier.state_dict().keys()
        self.unstored = [name for name, _ in classifier.named_buffers() if name not in stored]

    def run(
        self,
        *,
        every: float,
        keep: Callable[[State], None] | None,
        on_epoch: Callable[[dict[str, float]], None] | None,
        progress: Callable[[float], None] | None,
        raise_if_interrupted: Callable[[], None],
    ) -> None:
        """To the end.

        Args:
            every: seconds between checkpoints within an epoch.
            keep: called with the state, at the end of every epoch and that often besides.
            on_epoch: called with each epoch's row.
            progress: called with the share done.
            raise_if_interrupted: called between updates, when the state is whole; an exception ends the loop and
                keeps the state.
        """
        kept = time.monotonic()
        total = self.per_epoch * self.settings.epochs
        while self.epoch < self.settings.epochs and not self.stopped:
            begun = time.perf_counter()
            for batch in self._batches():
                self.losses.append(self._step(*batch))
                self.update += 1
                if keep is not None and time.monotonic() - kept > every:
                    keep(self.state())
                    kept = time.monotonic()
                self._heed(raise_if_interrupted, keep)
                if progress is not None:
                    progress((self.epoch * self.per_epoch + self.update) / total)
            self._check_finite()
            self._agree()
            row = self._row() | {"seconds": time.perf_counter() - begun}
            self.history.append(row)
            self.epoch, self.update, self.losses = self.epoch + 1, 0, []
            self._watch(row)
            if keep is not None:
                keep(self.state())
                kept = time.monotonic()
            self._heed(raise_if_interrupted, keep)
            if on_epoch is not None:
                on_epoch(row)

    def state(self) -> State:
        """Everything that a later run needs to go on from here, on the CPU."""
        return {
            "epoch": self.epoch,
            "update": self.update,
            "history": self.history,
            "losses": self.losses,
            "stopped": self.stopped,
            "model": _on_cpu(self.classifier.state_dict()),
            "buffers": {
                name: self.classifier.get_buffer(name).detach().cpu().clone() for name in self.unstored
            },
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "best": None if self.best is None else {"robust": self.best[0], "model": self.best[1]},
        }

    def go_on_from(self, state: State) -> None:
        """Take up what `state` returned."""
        for name in ("epoch", "update", "history", "losses", "stopped"):
            setattr(self, name, state[name])
        self.classifier.load_state_dict(state["model"])
        for name, tensor in state["buffers"].items():
            self.classifier.get_buffer(name).copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        best = state["best"]
        self.best = None if best is None else (best["robust"], best["model"])

    def finish(self) -> None:
        """Where robustness was lost, the weights before it was."""
        if self.stopped and self.best is not None:
            self.classifier.load_state_dict(self.best[1])
        self.optimizer.zero_grad()

    def _heed(self, raise_if_interrupted: Callable[[], None], keep: Callable[[State], None] | None) -> None:
        try:
            raise_if_interrupted()
        except KeyboardInterrupt:
            if keep is not None:
                keep(self.state())
            raise

    def _agree(self) -> None:
        """Buffers of all processes as those of the first: each moved its own batch-norm statistics."""
        if self.fabric.world_size > 1:
            for buffer in self.classifier.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _check_finite(self) -> None:
        """Raises ValueError where a weight is no number any more."""
        if not all(bool(weight.isfinite().all()) for weight in self.classifier.parameters()):
            raise ValueError(self._diverged())

    def _diverged(self) -> str:
        return (
            f"the training diverged in epoch {self.epoch + 1}: learning_rate is {self.settings.learning_rate:g}; "
            "accepted is one at which the loss stays a number"
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Moves]]:
        """Row numbers of this device's part of each batch, their pixels, their places in the whole batch, moves."""
        settings, seed = self.settings, self.settings.seed
        generator = torch.Generator().manual_seed(mixed_seed(seed, self.epoch, ORDER))
        order = torch.randperm(len(self.data), generator=generator)
        order = order[: self.per_epoch * settings.batch_size].view(self.per_epoch, -1)
        places = torch.arange(self.fabric.global_rank, settings.batch_size, self.fabric.world_size)
        mine = list(order[self.update :, places])
        moves = Moves(settings.augment, len(self.data), self.data.shape[1:], seed, self.epoch)
        if self.data.held:
            read: Any = (self.data.pixels(rows) for rows in mine)
        else:
            read = torch.utils.data.DataLoader(
                _Rows(self.data),
                sampler=mine,
                batch_size=None,
                num_workers=self.workers,
                generator=torch.Generator(),  # else it draws from the global random numbers
                collate_fn=_as_it_is,
            )
        for rows, pixels in zip(mine, read, strict=True):
            if isinstance(pixels, ValueError):
                raise pixels
            yield rows, pixels, places, moves

    def _step(self, rows: Tensor, pixels: Tensor, places: Tensor, moves: Moves) -> float:
        """One update; returns the loss of this device's part."""
        settings, device = self.settings, self.fabric.device
        done = self.epoch * self.per_epoch + self.update
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(done / (self.per_epoch * settings.epochs))
        moved = moves.apply(rows, pixels.detach().to(device))  # as bytes: a quarter of what floats would move
        images = as_float(moved, self.layout)
        labels = self.data.labels[rows].to(device)
        start = mixed_seed(settings.seed, self.epoch, self.update, self.fabric.global_rank, DROPOUT)
        torch.manual_seed(start)
        random.seed(start)
        np.random.seed(start % 2**32)  # noqa: NPY002 - a network may draw from it
        self._agree()
        attacked = int((places < settings.attacked).sum())  # the first of the whole batch
        adversarial = self._attacked(
            rows[:attacked], images[:attacked], labels[:attacked], places[:attacked], moves
        )
        if self.recipe.trades:
            logits = self.network(torch.cat([images, adversarial]))
            loss = F.cross_entropy(logits[: len(images)], labels)
            if attacked:
                gap = F.kl_div(
                    F.log_softmax(logits[len(images) :], 1),
                    F.log_softmax(logits[:attacked], 1),
                    reduction="sum",
                    log_target=True,
                )
                loss = loss + settings.beta * gap / len(images)
        else:
            shown = torch.cat([adversarial, images[attacked:]]) if attacked else images
            loss = F.cross_entropy(self.network(shown), labels)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(self._diverged())
        return value

    def _attacked(self, rows: Tensor, images: Tensor, labels: Tensor, places: Tensor, moves: Moves) -> Tensor:
        """What the adversary makes of the images, by a network in eval mode whose modes come back."""
        if not len(rows):
            return images
        settings = self.settings
        generator = torch.Generator().manual_seed(mixed_seed(settings.seed, self.epoch, self.update, NOISE))
        noise = uniform((settings.attacked, *images.shape[1:]), generator)
        if self.fabric.world_size > 1:
            noise = noise[places]
        region = self._region(rows, images, places, moves)
        with EvalMode(self.classifier), quick_stem(self.classifier):
            return perturbed(self._logits, images, labels, region, noise.to(images), self.recipe, settings)

    def _logits(self, images: Tensor) -> Tensor:
        with self.fabric.autocast():
            logits = self.classifier.in_own_mode(images)
        return logits.float()

    def _region(self, rows: Tensor, images: Tensor, places: Tensor, moves: Moves) -> Tensor | None:
        if self.backgrounds is None:
            return None
        # What a crop brings in from outside the image is no part of the object.
        region = moves.apply(rows, self.backgrounds.masks(rows).byte(), fill=1).bool()
        if self.recipe.region == "foreground":
            region = ~region
        if self.recipe.region == "random":
            region = scattered(region, places, self.settings, mixed_seed(self.epoch, self.update, SCATTER))
        return region.to(images.device).contiguous(memory_format=self.layout)

    def _row(self) -> dict[str, float]:
        mean = sum(self.losses) / max(1, len(self.losses))
        judged = {} if self.held_out is None else self.held_out.judge(self.classifier, self.settings)
        row = {
            "epoch": self.epoch + 1,
            "loss": mean,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **judged,
        }
        shared: dict[str, float] = self.fabric.broadcast(row)
        return shared

    def _watch(self, row: dict[str, float]) -> None:
        """Stop where robustness has collapsed; else remember the best."""
        if (
            self.held_out is None
            or len(self.held_out.labels) < ENOUGH
            or self.recipe.search in {"none", "noise"}
            or not self.settings.attacked
        ):
            return
        if collapsed([past["robust"] for past in self.history], self.held_out.constant):
            self.stopped = (
                f"robust accuracy fell to {row['robust']:.0%} in epoch {self.epoch} (catastrophic overfitting); the "
                "weights are those of the best epoch before"
            )
        elif self.best is None or row["robust"] > self.best[0]:
            self.best = (row["robust"], _on_cpu(self.classifier.state_dict()))


class _InOwnMode(nn.Module):
    """A classifier as it is trained: called by itself it always answers in eval mode."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.in_own_mode(images)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(n, C, H, W) uniform in [-1, 1) in steps of 2**-15: four numbers of each that is drawn, channels last."""
    count, channels, height, width = shape
    size = count * channels * height * width
    drawn = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    levels = drawn.view(torch.int16)[:size].view(count, height, width, channels)
    return levels.permute(0, 3, 1, 2).to(torch.float32).div_(2**15)


def scattered(region: Tensor, places: Tensor, settings: Settings, seed: int) -> Tensor:
    """As many sites as each mask (n, 1, H, W) has, anywhere; drawn by the place (n,) of the image in the batch."""
    generator = torch.Generator().manual_seed(mixed_seed(settings.seed, seed))
    scores = torch.rand((settings.attacked, *region.shape[1:]), generator=generator)[places].flatten(1)
    ranks = scores.argsort(1).argsort(1)
    return (ranks < region.flatten(1).sum(1, keepdim=True)).view_as(region)


def layout_of(network: nn.Module) -> torch.memory_format:
    """channels_last where it is the faster: everywhere but with grouped convolutions, whose backward it cripples."""
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())
    deep = any(weight.ndim > 4 for weight in network.parameters())  # for which there is no such layout
    return torch.contiguous_format if grouped or deep else torch.channels_last


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Copies of tensors; whatever else a module keeps in its state as it is."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _as_it_is(pixels: Any) -> Any:
    return pixels


class _Rows(torch.utils.data.Dataset[Any]):
    """Batches of pixels by their row numbers, for worker processes; what they cannot read comes back as its error."""

    def __init__(self, data: LabeledImages) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Any) -> Tensor | ValueError:
        try:
            return self.data.pixels(rows)
        except ValueError as error:
            return error
