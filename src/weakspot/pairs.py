"""Pairs: clean and adversarial images side by side, the noun that everything is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from weakspot._checks import check_batch, check_classes, check_range
from weakspot._io.files import write_atomic
from weakspot.classifier import evaluating, predict
from weakspot.similarity import ssim_map

if TYPE_CHECKING:
    import pandas as pd

FORMAT = {"weakspot": "pairs 1"}  # one entry: of several, safetensors would change the order from run to run


@dataclass(frozen=True, eq=False)
class Pairs:
    """N clean images, the adversarial image made of each, and the two classes the pair is about.

    Attributes:
        clean: (N, C, H, W) in [0, 1].
        adversarial: (N, C, H, W) in [0, 1].
        labels: (N,) class t0 the clean image stands for.
        targets: (N,) class t the adversarial image lands in, or was asked to.

    Raises:
        ValueError: when shapes do not fit each other or values are not finite.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        check_batch(self.clean, name="clean")
        check_batch(self.adversarial, name="adversarial")
        if self.clean.shape != self.adversarial.shape:
            raise ValueError(
                f"clean has shape {tuple(self.clean.shape)} and adversarial {tuple(self.adversarial.shape)}; "
                "accepted are two batches of one shape"
            )
        check_classes(self.labels, len(self.clean), name="labels")
        check_classes(self.targets, len(self.clean), name="targets")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def perturbation(self) -> Tensor:
        """adversarial - clean, (N, C, H, W)."""
        return self.adversarial - self.clean

    @property
    def distances(self) -> pd.DataFrame:
        """How far each pair is apart, one row each.

        Columns: linf, l2, l1 (images in [0, 1]), pixels (sites where any channel changed), ssim_windowed and
        ssim_windowed_min (mean and minimum of `ssim_map`). What an SSIM budget bounds is another quantity: see
        `AttackResult.ssim_budget_spent`.
        """
        import pandas as pd

        rows = self.perturbation.detach().float().flatten(1)
        similarity = ssim_map(self.clean, self.adversarial).flatten(1)
        measured = {
            "linf": rows.abs().amax(1),
            "l2": rows.norm(dim=1),
            "l1": rows.abs().sum(1),
            "pixels": (self.perturbation != 0).any(1).flatten(1).sum(1),
            "ssim_windowed": similarity.mean(1),
            "ssim_windowed_min": similarity.amin(1),
        }
        return pd.DataFrame({name: values.cpu().numpy() for name, values in measured.items()})

    def to(self, device: torch.device | str) -> Self:
        """The same pairs on another device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in self._tensors().items()})

    @classmethod
    def of(cls, model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor | None = None) -> Pairs:
        """Pairs made by any tool; missing labels and all targets are the model's own predictions.

        Args:
            model: the classifier under attack.
            clean: (N, C, H, W) in [0, 1].
            adversarial: (N, C, H, W) in [0, 1].
            labels: (N,) class of each clean image.

        Raises:
            ValueError: when shapes do not fit or a label is no class of the model.

        Warns:
            ImageWarning: when values lie outside [0, 1].
        """
        with evaluating(model) as classifier, torch.no_grad():
            for name, images in (("clean", clean), ("adversarial", adversarial)):
                check_batch(images, name=name)
                check_range(images, name=name)
            if clean.shape != adversarial.shape:
                raise ValueError(
                    f"clean has shape {tuple(clean.shape)} and adversarial {tuple(adversarial.shape)}; "
                    "accepted are two batches of one shape"
                )
            device = classifier.mean.device
            clean, adversarial = (
                images.detach().to(device, torch.float32).clamp(0, 1) for images in (clean, adversarial)
            )
            logits = predict(classifier, adversarial)
            if labels is None:
                labels = predict(classifier, clean).argmax(1)
            check_classes(labels, len(clean), logits.shape[1])
            return Pairs(clean, adversarial, labels.to(device), logits.argmax(1))

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors().items()
        }
        write_atomic(path, lambda draft: draft.write_bytes(save(tensors, FORMAT)))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is no safetensors file or holds no pairs.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        try:
            with safe_open(path, "pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no safetensors file ({error}); accepted is what Pairs.save wrote"
            ) from None
        missing = [
            field.name for field in fields(cls) if field.name not in stored and field.default is MISSING
        ]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; accepted is what {cls.__name__}.save wrote")
        return cls(**{field.name: stored[field.name] for field in fields(cls) if field.name in stored})

    def _tensors(self) -> dict[str, Tensor]:
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class AttackResult(Pairs):
    """Pairs an attack made, with what it cost.

    Attributes:
        success: (N,) bool, from a fresh forward pass of the returned images.
        forwards: (N,) images of this sample sent through the model, that fresh pass included.
        backwards: (N,) gradients of this sample taken.
        success_8bit: (N,) bool, of the images as 8-bit files hold them, within the attack's budget (see
            `attacks.stored`).
        seed: (N,) of everything random; 0 where nothing is.
        ssim_budget_spent: (N,) mean over patches of d1^2 + d2^2, what a budget `SSIM(eps)` bounds; None if the attack
            had another budget.
        ssim_local_budget_spent: (N,) largest d1^2 or d2^2 of any patch, what `SSIM(eps, mode="local")` bounds; None if
            the attack had another budget.
    """

    success: Tensor
    n_forward: Tensor
    n_backward: Tensor
    success_8bit: Tensor | None = None
    seed: Tensor | None = None
    ssim_budget_spent: Tensor | None = None
    ssim_local_budget_spent: Tensor | None = None

    def select(self, rows: Tensor) -> Self:
        """Some of the pairs, by number or by a bool mask (N,)."""
        return type(self)(**{name: tensor[rows] for name, tensor in self._tensors().items()})

    @classmethod
    def concatenate(cls, results: Sequence[Self]) -> Self:
        """Results one after the other; a field that one of them lacks is None."""
        tables = [result._tensors() for result in results]
        shared = [name for name in tables[0] if all(name in table for table in tables)]
        return cls(**{name: torch.cat([table[name] for table in tables]) for name in shared})

    @property
    def fooled(self) -> Tensor:
        """(N,) bool, the success that counts: of the 8-bit files, or where that is not known of the images."""
        return self.success if self.success_8bit is None else self.success_8bit

    @property
    def table(self) -> pd.DataFrame:
        """One row per image: label, target, success, success_8bit, `distances`, forwards, backwards, seed.

        If the budget was an `SSIM`, ssim_budget_spent or ssim_local_budget_spent stands before forwards.
        """
        import pandas as pd

        def columns(**known: Tensor | None) -> pd.DataFrame:
            return pd.DataFrame({name: t.cpu().numpy() for name, t in known.items() if t is not None})

        before = columns(
            label=self.labels, target=self.targets, success=self.success, success_8bit=self.success_8bit
        )
        after = columns(
            ssim_budget_spent=self.ssim_budget_spent,
            ssim_local_budget_spent=self.ssim_local_budget_spent,
            n_forward=self.n_forward,
            n_backward=self.n_backward,
            seed=self.seed,
        )
        return pd.concat([before, self.distances, after], axis=1)
