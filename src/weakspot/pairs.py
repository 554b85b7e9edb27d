"""Pairs of clean and adversarial images, which attacks return and analyses explain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from weakspot._checks import check_batch, check_classes, check_range, described
from weakspot._io.files import write_atomic
from weakspot._rows import Rows, row_numbers
from weakspot.classifier import evaluating, predict
from weakspot.similarity import ssim_map
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "pairs 1"
PER_PAIR = {
    "success": "a bool",
    "n_forward": "an integer",
    "n_backward": "an integer",
    "success_8bit": "a bool",
    "seed": "an integer",
    "ssim_budget_spent": "a float",
    "ssim_local_budget_spent": "a float",
}
"""What each field of an `AttackResult` is a tensor of."""


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """N clean images, an adversarial image of each, and the two classes of each pair.

    Parts of them are Pairs again: `pairs[2]`, `pairs[:2]`, `pairs[pairs.labels == 3]`, `pairs[[0, 4]]` and, if they
    have names, `pairs["coffee"]`.

    Attributes:
        clean: (N, C, H, W) in [0, 1].
        adversarial: (N, C, H, W) in [0, 1].
        labels: (N,) class t0 of the clean image.
        targets: (N,) class t of the adversarial image, or the target of the attack.
        names: N names of the images, or empty; `named` gives them.

    There may be no pairs at all, where nothing was found; a part of pairs holds at least one.

    Raises:
        ValueError: if shapes do not fit each other or values are not finite.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    targets: Tensor
    names: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        both = {"clean": self.clean, "adversarial": self.adversarial}
        empty = all(isinstance(each, Tensor) and each.ndim == 4 and not len(each) for each in both.values())
        for name, images in both.items() if not empty else ():
            check_batch(images, name=name)
        _check_same_shape(self.clean, self.adversarial)
        check_classes(self.labels, len(self.clean), name="labels")
        check_classes(self.targets, len(self.clean), name="targets")
        if not isinstance(self.names, tuple | list) or len(self.names) not in {0, len(self.clean)}:
            got = len(self.names) if isinstance(self.names, tuple | list) else repr(self.names)
            raise ValueError(f"names must have one entry for each of {len(self)} pairs, got {got}")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: Rows) -> Self:
        """Some of the pairs, with all their fields, as a batch: one number or name gives a batch of one.

        Args:
            rows: a number, a slice, a list or tensor of numbers, a bool mask (N,), a name or a list of names.

        Raises:
            IndexError: if there is no pair of this number, or a mask has another length.
            ValueError: if there is no pair, or more than one, of this name.
        """
        chosen = row_numbers(rows, self.names, len(self))
        check_batch(self.clean[chosen.to(self.clean.device)], name="clean")
        parts = {name: tensor[chosen.to(tensor.device)] for name, tensor in self._tensors().items()}
        return type(self)(
            **parts, names=tuple(self.names[row] for row in chosen.tolist()) if self.names else ()
        )

    def named(self, names: Sequence[str]) -> Self:
        """The same pairs with a name for each image."""
        return replace(self, names=tuple(names))

    def __repr__(self) -> str:
        sides = " x ".join(map(str, self.clean.shape))
        if not len(self):
            return f"{type(self).__name__}(none)"
        largest = float(self.perturbation.abs().max())
        return f"{type(self).__name__}({sides} on {self.clean.device}, largest change {largest:.3g})"

    @property
    def perturbation(self) -> Tensor:
        """adversarial - clean, (N, C, H, W)."""
        return self.adversarial - self.clean

    @property
    def distances(self) -> pd.DataFrame:
        """Distances between the images of each pair, one row per pair.

        Columns: linf, l2, l1 (images in [0, 1]), pixels (pixels where any channel changed), ssim_windowed and
        ssim_windowed_min (mean and minimum of `ssim_map`). An SSIM budget bounds another quantity, see
        `AttackResult.ssim_budget_spent`.
        """
        import pandas as pd

        rows = self.perturbation.detach().float().flatten(1)
        similarity = ssim_map(self.clean, self.adversarial).flatten(1) if len(self) else rows
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
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return type(self)(**moved, names=self.names)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        clean: Tensor,
        adversarial: Tensor,
        labels: Tensor | None = None,
        *,
        names: Sequence[str] = (),
    ) -> Pairs:
        """Make pairs of images from any tool; targets, and labels if not given, are the model's predictions.

        Args:
            model: the classifier under attack.
            clean: (N, C, H, W) in [0, 1].
            adversarial: (N, C, H, W) in [0, 1].
            labels: (N,) class of each clean image.
            names: N names of the images.

        Raises:
            ValueError: if shapes do not fit each other or a label is not a class of the model.

        Warns:
            ImageWarning: if values lie outside [0, 1].
        """
        with evaluating(model) as classifier, torch.no_grad():
            for name, images in (("clean", clean), ("adversarial", adversarial)):
                check_batch(images, name=name)
                check_range(images, name=name)
            _check_same_shape(clean, adversarial)
            device = classifier.mean.device
            clean, adversarial = (
                images.detach().to(device, torch.float32).clamp(0, 1) for images in (clean, adversarial)
            )
            logits = predict(classifier, adversarial)
            if labels is None:
                labels = predict(classifier, clean).argmax(1)
            check_classes(labels, len(clean), logits.shape[1])
            return Pairs(clean, adversarial, labels.to(device), logits.argmax(1), names=tuple(names))

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors().items()
        }
        # One entry, because safetensors does not write several in a fixed order.
        about = {"weakspot": json.dumps({"format": FORMAT, "names": self.names})}
        write_atomic(path, lambda draft: draft.write_bytes(save(tensors, about)))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a safetensors file or holds no pairs.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} must be a file that Pairs.save wrote, got a folder")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            with safe_open(path, "pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                names = _stored_names(file.metadata())
        except SafetensorError as error:
            raise ValueError(
                f"{path} must be a safetensors file that Pairs.save wrote, but cannot be read ({error})"
            ) from None
        missing = [one.name for one in fields(cls) if one.name not in stored and one.default is MISSING]
        if missing:
            raise ValueError(
                f"{path} must be a file that {cls.__name__}.save wrote, but lacks {', '.join(missing)}"
            )
        known = {one.name: stored[one.name] for one in fields(cls) if one.name in stored}
        # Other tools may write names for another number of images.
        return cls(**known, names=names if len(names) == len(known["clean"]) else ())

    def _tensors(self) -> dict[str, Tensor]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: tensor for name, tensor in values.items() if isinstance(tensor, Tensor)}


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult(Pairs):
    """Pairs that an attack made, with its success and cost.

    Attributes:
        success: (N,) bool, by a fresh forward pass of the returned images.
        n_forward: (N,) forward passes of this image, the fresh one included.
        n_backward: (N,) gradients of this image.
        success_8bit: (N,) bool, of the images rounded to 8 bits within the attack's budget (see `attacks.stored`).
        seed: (N,) of all random numbers; 0 if the attack is deterministic.
        ssim_budget_spent: (N,) mean over patches of d1^2 + d2^2, which a budget `SSIM(eps)` bounds; None for other
            budgets.
        ssim_local_budget_spent: (N,) largest d1^2 or d2^2 of any patch, which `SSIM(eps, mode="local")` bounds; None
            for other budgets.

    Raises:
        ValueError: if shapes do not fit each other, or a field holds another kind of number.
    """

    success: Tensor
    n_forward: Tensor
    n_backward: Tensor
    success_8bit: Tensor | None = None
    seed: Tensor | None = None
    ssim_budget_spent: Tensor | None = None
    ssim_local_budget_spent: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in PER_PAIR.items():
            value = getattr(self, name)
            if value is not None or name in {"success", "n_forward", "n_backward"}:
                _check_per_pair(name, value, len(self), kind)

    @classmethod
    def concatenate(cls, results: Sequence[Self]) -> Self:
        """Results one after the other; a field that one of them lacks is None, and names that one lacks are empty."""
        if not results:
            raise ValueError("results must have at least one result, got none")
        tables = [result._tensors() for result in results]
        shared = [name for name in tables[0] if all(name in table for table in tables)]
        named = all(result.names for result in results)
        names = tuple(name for result in results for name in result.names if named)
        return cls(**{name: torch.cat([table[name] for table in tables]) for name in shared}, names=names)

    def __repr__(self) -> str:
        success = f"{int(self.fooled.sum())} of {len(self)} successful"
        passes = (
            f"{int(self.n_forward.sum())} forward and {counted(int(self.n_backward.sum()), 'backward pass')}"
        )
        return f"{super().__repr__()[:-1]}, {success}, {passes})"

    @property
    def fooled(self) -> Tensor:
        """(N,) bool, success after rounding to 8 bits, or success if that is not known."""
        return self.success if self.success_8bit is None else self.success_8bit

    @property
    def table(self) -> pd.DataFrame:
        """One row per image: label, target, success, success_8bit, `distances`, n_forward, n_backward, seed.

        For an `SSIM` budget, ssim_budget_spent or ssim_local_budget_spent precedes n_forward.
        """
        import pandas as pd

        def columns(**tensors: Tensor | None) -> pd.DataFrame:
            return pd.DataFrame({name: t.cpu().numpy() for name, t in tensors.items() if t is not None})

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


def _stored_names(metadata: Mapping[str, str] | None) -> tuple[str, ...]:
    """The names in the metadata of a file; none in a file of another tool."""
    try:
        names = json.loads((metadata or {}).get("weakspot", ""))["names"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _check_same_shape(clean: Tensor, adversarial: Tensor) -> None:
    if clean.shape != adversarial.shape:
        raise ValueError(
            f"adversarial must have the shape of clean, {tuple(clean.shape)}, got {tuple(adversarial.shape)}"
        )


def _check_per_pair(name: str, value: object, count: int, kind: str) -> None:
    """Raises ValueError unless `value` is a tensor (count,) of this kind of number."""
    if isinstance(value, Tensor):
        own = "a float" if value.is_floating_point() else "an integer"
        if value.shape == (count,) and kind == ("a bool" if value.dtype == torch.bool else own):
            return
    raise ValueError(
        f"{name} must be {kind} tensor of shape ({count},), one entry per pair, got {described(value)}"
    )
