"""The loop of a training: epochs of updates on one or many devices, which can stop anywhere and resume exactly."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._progress import Progress
from weakspot._random import mixed_seed
from weakspot._state import EvalMode
from weakspot.classifier import Classifier
from weakspot.datasets import LabeledImages
from weakspot.datasets.labeled import as_float
from weakspot.statistics.number_format import percent
from weakspot.training.adversary import perturbed, scattered, trades_loss, uniform_noise
from weakspot.training.checkpoint import Best, State
from weakspot.training.config import ResolvedConfig, find_recipe
from weakspot.training.data import Augmentation, Backgrounds, read_in_workers
from weakspot.training.input_gradient import fast_input_gradient
from weakspot.training.robust_accuracy import HeldOut, collapsed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

ORDER, NOISE, SCATTER, DROPOUT = 0, 2, 3, 4  # streams of random numbers; 1 is that of augmentation
ENOUGH = 100  # held-out images; with fewer, a fall of their accuracy may be chance


class Batch(NamedTuple):
    """This process's part of a batch.

    Attributes:
        rows: (n,) row numbers in the data.
        pixels: (n, C, H, W) bytes or floats, before augmentation.
        places: (n,) places in the whole batch.
        augmentation: of the epoch.
    """

    rows: Tensor
    pixels: Tensor
    places: Tensor
    augmentation: Augmentation


@dataclass(frozen=True)
class Callbacks:
    """Functions that a loop calls.

    Attributes:
        save: called with the state at the end of every epoch, every `save_every` seconds, and when interrupted.
        on_epoch: called with the row of each epoch.
        progress: called with the fraction done.
        raise_if_interrupted: called between updates.
    """

    save: Callable[[State], None] | None = None
    on_epoch: Callable[[dict[str, float]], None] | None = None
    progress: Progress | None = None
    raise_if_interrupted: Callable[[], None] = lambda: None


class Loop:
    """One training: network, optimizer, data and position.

    Everything random is drawn from (seed, epoch, update): two integers are the whole position.

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
        config: ResolvedConfig,
        *,
        backgrounds: Backgrounds | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.fabric, self.data, self.config = fabric, data, config
        self.backgrounds, self.held_out = backgrounds, held_out
        self.recipe = find_recipe(config.recipe)
        self.per_epoch = len(self.data) // config.batch_size
        self.epoch, self.update = 0, 0
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.stopped = ""
        self.best: Best | None = None
        optimizer = torch.optim.SGD(
            classifier.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        # In a network in train mode, parts in eval mode (frozen batch-norm) are meant to stay frozen.
        if not classifier.training:
            classifier.train()
        modes = [(module, module.training) for module in classifier.modules()]
        self.layout = layout_of(classifier)
        classifier.to(memory_format=self.layout)  # type: ignore[call-overload]  # as torch documents it
        # The adversary calls the classifier itself: through the wrapper, devices would exchange its gradients.
        self.classifier = classifier
        self.network, self.optimizer = fabric.setup(_InOwnMode(classifier), optimizer)
        for module, mode in modes:
            module.training = mode
        stored = classifier.state_dict().keys()
        # A resumed training also needs the buffers that the state dict leaves out.
        self.unstored = [name for name, _ in classifier.named_buffers() if name not in stored]

    def run(self, callbacks: Callbacks) -> None:
        """Train until the last epoch, or until robustness collapses.

        Raises:
            ValueError: if the weights stop being finite.
            KeyboardInterrupt: if `raise_if_interrupted` raised it; the state is saved first.
        """
        saved = time.monotonic()
        total = self.per_epoch * self.config.epochs
        if callbacks.progress is not None:  # what an earlier run had done
            callbacks.progress((self.epoch * self.per_epoch + self.update) / total)
        while self.epoch < self.config.epochs and not self.stopped:
            begun = time.perf_counter()
            for batch in self._batches():
                self.losses.append(self._step(batch))
                self.update += 1
                if callbacks.save is not None and time.monotonic() - saved > self.config.save_every:
                    callbacks.save(self.state())
                    saved = time.monotonic()
                self._save_if_interrupted(callbacks)
                if callbacks.progress is not None:
                    callbacks.progress((self.epoch * self.per_epoch + self.update) / total)
            if not all(bool(weight.isfinite().all()) for weight in self.classifier.parameters()):
                raise ValueError(self._divergence())
            self._share_buffers()
            row = self._row() | {"seconds": time.perf_counter() - begun}
            self.history.append(row)
            self.epoch, self.update, self.losses = self.epoch + 1, 0, []
            self._stop_if_collapsed(row)
            if callbacks.save is not None:
                callbacks.save(self.state())
                saved = time.monotonic()
            self._save_if_interrupted(callbacks)
            if callbacks.on_epoch is not None:
                callbacks.on_epoch(row)

    def state(self) -> State:
        """Everything that another process needs to resume, on the CPU."""
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
            "best": self.best,
        }

    def resume(self, state: State) -> None:
        """Continue from what `state` returned."""
        self.epoch, self.update = state["epoch"], state["update"]
        self.history, self.losses, self.stopped = state["history"], state["losses"], state["stopped"]
        self.classifier.load_state_dict(state["model"])
        for name, tensor in state["buffers"].items():
            self.classifier.get_buffer(name).copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.best = state["best"]

    def finish(self) -> None:
        """Restore the best weights if robustness collapsed."""
        if self.stopped and self.best is not None:
            self.classifier.load_state_dict(self.best["model"])
        self.optimizer.zero_grad()

    def _save_if_interrupted(self, callbacks: Callbacks) -> None:
        try:
            callbacks.raise_if_interrupted()
        except KeyboardInterrupt:
            if callbacks.save is not None:
                callbacks.save(self.state())
            raise

    def _share_buffers(self) -> None:
        """Give all processes the buffers of the first, because each updates its own batch-norm statistics."""
        if self.fabric.world_size > 1:
            for buffer in self.classifier.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _divergence(self) -> str:
        return (
            f"learning_rate must be one at which the loss stays finite, got {self.config.learning_rate:g} "
            f"(the training diverged in epoch {self.epoch + 1})"
        )

    def _batches(self) -> Iterator[Batch]:
        """This process's part of each batch that is left in the epoch."""
        config, seed = self.config, self.config.seed
        generator = torch.Generator().manual_seed(mixed_seed(seed, self.epoch, ORDER))
        order = torch.randperm(len(self.data), generator=generator)
        # The last incomplete batch is left out: the attacked fraction would differ in it.
        order = order[: self.per_epoch * config.batch_size].view(self.per_epoch, -1)
        places = torch.arange(self.fabric.global_rank, config.batch_size, self.fabric.world_size)
        # A resumed epoch goes on after the updates that are done.
        batches = list(order[self.update :, places])
        augmentation = Augmentation(config.augment, len(self.data), self.data.shape[1:], seed, self.epoch)
        if self.data.held:
            read: Iterable[Tensor] = map(self.data.pixels, batches)
        else:
            read = read_in_workers(self.data.pixels, batches, config.workers)
        for rows, pixels in zip(batches, read, strict=True):
            yield Batch(rows, pixels, places, augmentation)

    def _step(self, batch: Batch) -> float:
        """One update; returns the loss of this process's part of the batch."""
        config, device = self.config, self.fabric.device
        done = self.epoch * self.per_epoch + self.update
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(done / (self.per_epoch * config.epochs))
        pixels = batch.pixels.detach().to(device)  # as bytes: a quarter of the traffic of floats
        images = as_float(batch.augmentation.apply(batch.rows, pixels), self.layout)
        labels = self.data.labels[batch.rows].to(device)
        # Dropout and other draws of the network depend on the position only, so that resuming repeats them.
        start = mixed_seed(config.seed, self.epoch, self.update, self.fabric.global_rank, DROPOUT)
        torch.manual_seed(start)
        random.seed(start)
        np.random.seed(start % 2**32)  # noqa: NPY002 - a network may draw from it
        self._share_buffers()
        # The first `config.attacked` images of the whole batch, of which this process has its part.
        attacked = int((batch.places < config.attacked).sum())
        adversarial = self._attack(batch, images[:attacked], labels[:attacked])
        if self.recipe.trades:
            # One pass for both, so that batch-norm sees clean and adversarial images together.
            logits = self.network(torch.cat([images, adversarial]))
            loss = trades_loss(logits[: len(images)], logits[len(images) :], labels, config.beta)
        else:
            # (1 - r) CE(x) + r CE(x') over a batch, at the cost of 1 + r * steps passes.
            mixed = torch.cat([adversarial, images[attacked:]]) if attacked else images
            loss = F.cross_entropy(self.network(mixed), labels)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        if not math.isfinite(value := float(loss.detach())):
            raise ValueError(self._divergence())
        return value

    def _attack(self, batch: Batch, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial versions of the first images of the batch, made with the network in eval mode."""
        config, count = self.config, len(images)
        if not count:
            return images
        generator = torch.Generator().manual_seed(mixed_seed(config.seed, self.epoch, self.update, NOISE))
        noise = uniform_noise((config.attacked, *images.shape[1:]), generator)
        # All processes draw the noise of the whole batch and use their part of it.
        if self.fabric.world_size > 1:
            noise = noise[batch.places[:count]]
        region = self._region(batch, count)
        with EvalMode(self.classifier), fast_input_gradient(self.classifier):
            return perturbed(self._logits, images, labels, noise.to(images), config, region=region)

    def _logits(self, images: Tensor) -> Tensor:
        with self.fabric.autocast():
            logits = self.classifier.in_own_mode(images)
        return logits.float()

    def _region(self, batch: Batch, count: int) -> Tensor | None:
        """Where the adversary may change the first `count` images, or None for everywhere."""
        if self.backgrounds is None:
            return None
        rows, places = batch.rows[:count], batch.places[:count]
        masks = self.backgrounds.masks(rows).byte()
        # fill=1: what a crop brings in from outside the image is background.
        region = batch.augmentation.apply(rows, masks, fill=1).bool()
        if self.recipe.region == "foreground":
            region = ~region
        if self.recipe.region == "random":
            seed = mixed_seed(self.config.seed, mixed_seed(self.epoch, self.update, SCATTER))
            region = scattered(region, places, self.config.attacked, seed)
        return region.to(self.fabric.device).contiguous(memory_format=self.layout)

    def _row(self) -> dict[str, float]:
        """The results of the epoch, those of the first process in all of them."""
        mean = sum(self.losses) / max(1, len(self.losses))
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"epoch": self.epoch + 1, "loss": mean, "learning_rate": rate}
        if self.held_out is not None:
            row |= self.held_out.evaluate(self.classifier, self.config)
        return self.fabric.broadcast(row)

    def _stop_if_collapsed(self, row: dict[str, float]) -> None:
        """Stop if robustness has collapsed; otherwise remember the best weights."""
        searches = self.recipe.search in {"descent", "step"} and self.config.attacked
        if self.held_out is None or len(self.held_out.labels) < ENOUGH or not searches:
            return
        if collapsed([earlier["robust"] for earlier in self.history], self.held_out.constant):
            fell = f"robust accuracy fell to {percent(row['robust'])} in epoch {self.epoch}"
            self.stopped = (
                f"{fell} (catastrophic overfitting); the weights are those of the best epoch before"
            )
        elif self.best is None or row["robust"] > self.best["robust"]:
            self.best = {"robust": row["robust"], "model": _on_cpu(self.classifier.state_dict())}


class _InOwnMode(nn.Module):
    """A classifier in its own mode, to be trained. Called directly, a classifier is always in eval mode."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.in_own_mode(images)


def layout_of(network: nn.Module) -> torch.memory_format:
    """channels_last, which is faster, unless the network has grouped convolutions, whose backward pass it cripples."""
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())
    deep = any(weight.ndim > 4 for weight in network.parameters())  # torch has no such layout for them
    return torch.contiguous_format if grouped or deep else torch.channels_last


def _on_cpu(state: Mapping[str, object]) -> dict[str, object]:
    """Copies of the tensors; a module may store other values too."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
