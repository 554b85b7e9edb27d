"""What a reproduction works on: a network, images that it classifies correctly, and their attacks."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from weakspot import attacks
from weakspot.budgets import Budget, Linf
from weakspot.classifier import as_classifier, predict
from weakspot.datasets import LabeledImages
from weakspot.models.identity import fingerprint
from weakspot.pairs import AttackResult
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import counted, percent
from weakspot.training.checkpoint import data_fingerprint

LEAST_CONFIDENCE = 0.1  # mean probability of the first class
SCHEMA = 6  # of the stored claims
PIECE = 16  # images between two writes
ONE_CLASS = 0.9  # fraction of the images above which they count as being of one class


@dataclass(frozen=True)
class Material:
    """A network and its data. Images, labels and attacks are on the CPU, also if the network is on a GPU.

    Attributes:
        model: any classifier, on any device.
        images: (N, C, H, W), all different and all classified as `labels`.
        labels: (N,).
        about: what the data are and which network it is, for the page.
        unusable: why this network can test no claim, if there is a reason, such as that it guesses.
        quick: whether fewer steps and images are used.
        seed: of every attack and test.
        train: labeled images to train on, if there are any.
        test: labeled images of the same kind that no network is trained on.
        make: a seed to a fresh network for `train`.
        log: called with what is being done.
        store: a folder for finished pieces of attacks, so that an interrupted run resumes; None keeps none.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    about: str
    unusable: str = ""
    quick: bool = True
    seed: int = 0
    train: LabeledImages | None = None
    test: LabeledImages | None = None
    make: Callable[[int], nn.Module] | None = None
    log: Callable[[str], object] = lambda _: None
    store: Path | None = None

    def __post_init__(self) -> None:
        # Tables and stored pieces are made on the CPU, so that nothing is ever mixed.
        for name in ("images", "labels"):
            object.__setattr__(self, name, getattr(self, name).cpu())

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def why_not(self) -> str:
        """Why no claim can be tested; empty if nothing speaks against it.

        A network that tells no images apart, such as one with random weights, confirms claims that are about what
        networks have learned.
        """
        if self.unusable:
            return self.unusable
        most = int(self.labels.bincount().max()) if self.count else 0
        if self.count > 1 and most > ONE_CLASS * self.count:
            return (
                f"{most} of {counted(self.count)} have the same class, so it is unknown whether the network tells "
                f"images apart; images of several classes are needed."
            )
        return ""

    @cached_property
    def budget(self) -> Budget:
        """4/255 at photographs, 2/255 at small color images, .2 at gray ones: most attacks succeed, without excess."""
        if self.images.shape[1] == 1:
            return Linf(0.2)
        return Linf((4 if min(self.images.shape[2:]) >= 96 else 2) / 255)

    @cached_property
    def pairs(self) -> AttackResult:
        """PGD on every image."""
        return self.pgd("attacking", self.budget)

    def pgd(self, doing: str, budget: Budget, model: nn.Module | None = None) -> AttackResult:
        """PGD on every image, of the material's network or of another one, for the classes that it predicts."""
        attacked, labels = self.model, self.labels
        if model is not None:
            attacked, labels = model, predict(as_classifier(model), self.images).argmax(1).cpu()
        steps = 10 if self.quick else 40

        def attack(rows: Tensor) -> AttackResult:
            return attacks.pgd(
                attacked, self.images[rows], labels[rows], budget=budget, steps=steps, seed=self.seed
            )

        return self.attacked(doing, attack)

    def attacked(self, doing: str, attack: Callable[[Tensor], AttackResult]) -> AttackResult:
        """The attack of every image, piece by piece; a piece that an interrupted run has finished is read.

        Args:
            doing: what is being done, and the name of the pieces.
            attack: of the images with these row numbers. It must not depend on which images are attacked at once.

        Returns:
            The result on the CPU, whatever the device of the network.
        """
        pieces = []
        for rows in torch.arange(self.count).split(PIECE):
            self.log(f"{doing}, image {int(rows[0]) + 1} of {self.count}")
            name = f".{doing.replace(' ', '-')}-{int(rows[0])}-{self.key}.safetensors"
            path = None if self.store is None else self.store / name
            if path is not None and path.exists():
                pieces.append(AttackResult.load(path))
                continue
            pieces.append(attack(rows).to("cpu"))
            if path is not None:
                pieces[-1].save(path)
        return AttackResult.concatenate(pieces)

    @cached_property
    def key(self) -> str:
        """What the claims depend on: network, images, size and seed."""
        digest = hashlib.sha256(f"{SCHEMA} {fingerprint(self.model)}".encode())
        digest.update(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        digest.update(f"{self.quick} {self.seed} {self.unusable}".encode())
        return digest.hexdigest()[:12]

    @cached_property
    def training_key(self) -> str:
        """The same for claims about training, which also depend on the data to train on and test with."""
        data = ["none" if data is None else data_fingerprint(data) for data in (self.train, self.test)]
        return hashlib.sha256(" ".join([self.key, *data]).encode()).hexdigest()[:12]

    @property
    def successes(self) -> int:
        """How many attacks of `pairs` succeed."""
        return int(self.pairs.success.sum())

    @cached_property
    def fooled(self) -> AttackResult:
        """The successful attacks of `pairs`, of which there must be one."""
        return self.pairs[self.pairs.success]

    def correct(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) bool, whether the network classifies images as labels; on the CPU, like the labels."""
        return predict(as_classifier(self.model), images).argmax(1).cpu() == labels

    def others(self, maps: Tensor) -> Tensor:
        """Every image's map replaced by that of another image, none by its own."""
        # In a random order, each image gets the map of the one before it and the first that of the last.
        order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(self.seed))
        return maps[order.roll(1)[order.argsort()]]


def guesses(correct: Tensor, classes: int) -> str:
    """Why a network is unusable whose accuracy does not exceed guessing, else an empty text.

    Args:
        correct: (N,) bool, for labeled images drawn at random.
        classes: of the data.
    """
    rate, low, _ = proportion_interval(correct.cpu().numpy())
    if low > 1 / classes:
        return ""
    return (
        f"The network classifies {percent(rate)} of {counted(len(correct))} correctly, not clearly more than guessing "
        f"among {counted(classes, 'class')}."
    )


def unsure(logits: Tensor) -> str:
    """Why a network is unusable on images without labels: it is not sure of any class, as if it had learned nothing.

    Args:
        logits: (N, K).
    """
    confidence = float(logits.double().softmax(1).amax(1).mean())
    # Twice the probability that guessing gives; .6 for two classes, where that would be 1.
    if confidence > max(LEAST_CONFIDENCE, 2 / logits.shape[1] if logits.shape[1] > 2 else 0.6):
        return ""
    return (
        f"The network gives its first class a probability of {percent(confidence)} on average over "
        f"{counted(len(logits))} without labels, so nothing shows that it has learned to classify them."
    )
