"""Foreign attacks: those of foolbox, torchattacks and ART, where installed, held to our contract."""

from __future__ import annotations

import importlib
import inspect
import math
import random
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from weakspot.attacks.problem import Problem, attacking
from weakspot.budgets import L1, L2, Budget, Linf
from weakspot.checks import ModelWarning, closest
from weakspot.pairs import AttackResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weakspot.attacks.gradient import Progress

# What the contract has no place for: other inputs than images, several models, other frameworks.
UNUSABLE = frozenset(
    [
        "ImperceptibleASR",
        "ImperceptibleASRPyTorch",
        "CarliniWagnerASR",
        "RobustDPatch",
        "DPatch",
        "SNAL",
        "DecisionTreeAttack",
        "MalwareGDTensorFlow",
        "HighConfidenceLowUncertainty",
        "LowProFool",
        "AdversarialPatchTensorFlowV2",
        "FeatureAdversariesTensorFlowV2",
        "ProjectedGradientDescentTensorFlowV2",
        "OverTheAirFlickeringPyTorch",
        "AdversarialTexturePyTorch",
        "OverloadPyTorch",
        "CompositeAdversarialAttackPyTorch",
        "MultiAttack",
        "LGV",
        "DatasetAttack",
    ]
)
ONLY_TARGETED = {"SaliencyMapMethod", "TargetedUniversalPerturbation"}
ONE_BY_ONE = {"SimBA", "ShadowAttack"}
PACKAGES = {"foolbox": "foolbox", "torchattacks": "torchattacks", "art": "adversarial-robustness-toolbox"}
NORMS: dict[type, float] = {Linf: math.inf, L2: 2, L1: 1}
ROUNDING = 1e-5  # of a budget, that a foreign attack may overspend before it is brought back


def external(
    name: str,
    /,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget | None = None,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AttackResult:
    """Run an attack of another library, verify what it made and count what it cost.

    What comes back is in [0, 1], inside the budget and untouched outside the region, whatever the attack did; success
    is ours, from a fresh forward pass. Every image that goes through the model is counted, for the sample that it is
    nearest to. Its random numbers are the global ones, which are seeded before and put back after.

    These attacks know no regions: with one, each image is attacked by itself, through a model that sees no change
    outside it, so that the search is confined and not only its outcome.

    Args:
        name: "foolbox:LinfPGD", "torchattacks:PGD" or "art:ProjectedGradientDescent": library and class.
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        budget: Linf, L2 or L1, handed over as the attack's own epsilon; where not given, that keeps its default.
        region: likewise.
        targets: likewise, for attacks that can aim.
        seed: likewise.
        batch_size: images that the attack is given at once.
        progress: likewise.
        options: further arguments of the attack's class, such as steps=20.

    Raises:
        ValueError: when the library is not installed, it has no such attack, that cannot do what is asked, or fails on
            every image.

    Warns:
        ModelWarning: when it fails on some images, which then stay clean.

    >>> external("foolbox:LinfPGD", model, images, labels, budget=Linf(4 / 255), steps=10)  # doctest: +SKIP
    """
    library, attack = _find(name)
    eps = None if budget is None else _eps(name, budget)
    with attacking(model, images, labels, region, targets, batch_size, seed) as problem:
        adversarial = problem.clean.clone()
        failures: list[ValueError] = []

        def run(rows: Tensor) -> None:
            """Attack these images; where that fails each by itself, so that one does not cost the others theirs."""
            part = problem.select(rows)
            if not bool(part.region.any()) or eps == 0:
                return
            try:
                adversarial[rows] = _run(library, Task(name, attack, part, budget, eps, dict(options)))
            except ValueError as error:
                if len(rows) == 1:
                    failures.append(error)
                    return
                for row in rows.split(1):
                    run(row)

        with problem.searching(), _without_parameter_gradients(problem.classifier):
            alone = not problem.whole or attack.__name__ in ONE_BY_ONE
            parts = problem.rows.split(1 if alone else problem.batch_size)
            for number, rows in enumerate(parts):
                run(rows)
                if progress is not None:
                    progress((number + 1) / len(parts))
        if len(failures) == len(problem):
            raise failures[0]
        if failures:
            warnings.warn(
                f"{len(failures)} of {len(problem)} images stay clean: {failures[0]}",
                ModelWarning,
                stacklevel=2,
            )
        return problem.result(_brought_back(problem, budget, adversarial))


@dataclass(frozen=True)
class Task:
    """What a foreign attack is asked to do.

    Attributes:
        name: as the user gave it.
        attack: its class.
        problem: some images; with a region, one.
        budget: as the user gave it.
        eps: of the budget.
        options: for the attack's class.
    """

    name: str
    attack: Any
    problem: Problem
    budget: Budget | None
    eps: float | None
    options: dict[str, Any]

    @property
    def images(self) -> Tensor:
        """(N, C, H, W) in the one memory order that all libraries can read."""
        return self.problem.clean.contiguous()

    def classes(self) -> int:
        """How many the model knows, for attacks that must be told; costs a forward pass of one image."""
        problem = self.problem
        first = torch.zeros(1, dtype=torch.long, device=problem.clean.device)
        return problem.logits(problem.clean[:1], first)[1].shape[1]

    def made(self, *arguments: Any, **defaults: Any) -> Any:
        """The attack, with those of the defaults that it knows and the user did not set."""
        known = _parameters(self.attack)
        fitting = {key: value for key, value in defaults.items() if key in known}
        return self.attack(*arguments, **fitting | self.options)

    def check_norm(self, *norms: float) -> None:
        """Raises ValueError unless the budget is of a norm that the attack searches in."""
        if self.budget is not None and NORMS[type(self.budget)] not in norms:
            known = " or ".join(f"L{norm:g}" for norm in norms)
            raise self.refuse(
                f"an attack in {known}, and budget is {self.budget}; give a budget of its own norm"
            )

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"attack is {self.name}, {what}")


class Watched(nn.Module):
    """The classifier as a foreign attack sees it: blind outside the region, every image counted on its way."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.classifier = problem.classifier
        self.problem = problem
        self.confined = not problem.whole
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        problem = self.problem
        images = images.to(problem.clean).clone(memory_format=torch.contiguous_format)
        if images.requires_grad:
            images.register_hook(torch.Tensor.contiguous)  # the fused form's gradient is channels last
        with torch.no_grad():
            owners = _nearest(images, problem.clean)
        if self.confined:
            images = torch.where(problem.region, images, problem.clean)
        logits: Tensor = self.classifier(images)
        problem.count_forwards(owners)
        if logits.requires_grad:
            logits.register_hook(lambda _: problem.count_backwards(owners))
        return logits

    def train(self, mode: bool = True) -> Watched:  # noqa: ARG002 - foreign attacks switch it; it stays in eval mode
        return self


def _nearest(images: Tensor, clean: Tensor) -> Tensor:
    """(M,) which of the clean images each of (M, C, H, W) is an attempt on."""
    rows = torch.arange(len(clean), device=clean.device)
    if len(clean) == 1 or len(images) == len(clean):
        return rows.expand(len(images))
    return torch.cdist(images.flatten(1), clean.flatten(1)).argmin(1)


def _run(library: Callable[[Task, Watched], Any], task: Task) -> Tensor:
    """Images (N, C, H, W) in [0, 1], from whatever the attack returned."""
    clean = task.problem.clean
    number = int(task.problem.keys[0]) % 2**32
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - foreign attacks draw from it
    random.seed(number)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # theirs, about their own insides
            found = library(task, Watched(task.problem))
    except ValueError as error:
        if str(error).startswith(f"attack is {task.name}"):
            raise
        raise task.refuse(f"which failed: {_sentence(error)}") from error
    except Exception as error:
        raise task.refuse(f"which failed: {type(error).__name__}: {_sentence(error)}") from error
    found = torch.as_tensor(found).detach().to(clean)
    if found.shape != clean.shape:
        raise task.refuse(f"which returned {tuple(found.shape)} for images of {tuple(clean.shape)}")
    return torch.where(found.isfinite(), found, clean).clamp(0, 1)


def _foolbox(task: Task, model: Watched) -> Any:
    foolbox = importlib.import_module("foolbox")
    problem = task.problem
    eps = task.options.pop("epsilons", task.eps)
    distance = foolbox.distances.LpDistance(_norm(task.budget) or 2)
    attack = task.made(distance=distance)
    norm = getattr(getattr(attack, "distance", None), "p", None)
    if norm is not None:
        task.check_norm(norm)
    fixed = importlib.import_module("foolbox.attacks.base").FixedEpsilonAttack
    if eps is None and isinstance(attack, fixed):
        raise task.refuse("which needs a budget, such as linf:4/255 (in Python Linf(4 / 255))")
    criterion = (
        foolbox.criteria.Misclassification(problem.labels)
        if problem.targets is None
        else foolbox.criteria.TargetedMisclassification(problem.targets)
    )
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device=problem.clean.device)
    return attack(network, task.images, criterion, epsilons=eps)[1]


def _torchattacks(task: Task, model: Watched) -> Any:
    known = _parameters(task.attack)
    if task.budget is not None:
        if "eps" not in known:
            raise task.refuse("which takes no budget")
        task.check_norm(
            *((math.inf, 2) if "norm" in known else (2,) if "L2" in task.attack.__name__ else (math.inf,))
        )
    named = {math.inf: "Linf", 2: "L2", 1: "L1", None: None}[_norm(task.budget)]
    given: dict[str, Any] = {} if task.eps is None else {"eps": task.eps, "norm": named}
    if "n_classes" in known:
        given["n_classes"] = task.classes()
    attack = task.made(model, **given)
    attack.set_device(task.problem.clean.device)
    if task.problem.targets is None:
        return attack(task.images, task.problem.labels)
    if "targeted" not in attack.supported_mode:
        raise task.refuse("which cannot aim at targets")
    attack.set_mode_targeted_by_label(quiet=True)
    return attack(task.images, task.problem.targets)


def _art(task: Task, model: Watched) -> Any:
    estimators = importlib.import_module("art.estimators.classification")
    problem, known = task.problem, _parameters(task.attack)
    if task.budget is not None:
        if "eps" not in known:
            raise task.refuse("which takes no budget")
        several = (math.inf, 2) if task.attack.__name__ == "SquareAttack" else (math.inf, 2, 1)
        task.check_norm(*(several if "norm" in known else (math.inf,)))
    only_targeted = task.attack.__name__ in ONLY_TARGETED
    if problem.targets is not None and "targeted" not in known and not only_targeted:
        raise task.refuse("which cannot aim at targets")
    if problem.targets is None and only_targeted:
        raise task.refuse("which needs targets")
    classes = task.classes()
    estimator = estimators.PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(problem.clean.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if problem.clean.is_cuda else "cpu",
    )
    given: dict[str, Any] = {"verbose": False, "batch_size": len(problem)}
    if task.eps is not None:
        # ART refuses steps longer than the budget, and its own default is one for large budgets.
        given |= {"eps": task.eps, "eps_step": task.eps / 4, "norm": _norm(task.budget)}
    given["targeted"] = problem.targets is not None  # some of them aim by default, and would at the label
    wanted = problem.labels if problem.targets is None else problem.targets
    return task.made(estimator, **given).generate(
        task.images.cpu().numpy(), nn.functional.one_hot(wanted, classes).cpu().numpy()
    )


LIBRARIES: dict[str, Callable[[Task, Watched], Any]] = {
    "foolbox": _foolbox,
    "torchattacks": _torchattacks,
    "art": _art,
}


def _find(name: str) -> tuple[Callable[[Task, Watched], Any], Any]:
    """How to run an attack of that library, and its class."""
    library, _, attack = str(name).partition(":")
    if library not in LIBRARIES or not attack:
        raise ValueError(f"attack is {name!r}; accepted is LIBRARY:CLASS of {', '.join(LIBRARIES)}")
    known = _attacks_of(library)
    if known is None:
        raise ValueError(f"attack {name} needs {library}; run: pip install {PACKAGES[library]}")
    if attack not in known:
        raise ValueError(f"attack is {name!r}, which {library} does not have; {closest(attack, known)}")
    return LIBRARIES[library], known[attack]


def installed() -> list[str]:
    """Names of all foreign attacks that can be run here, as `external` takes them."""
    return [f"{library}:{attack}" for library in LIBRARIES for attack in sorted(_attacks_of(library) or ())]


def _attacks_of(library: str) -> Mapping[str, Any] | None:
    """Its attacks by the names of their classes, or None where it cannot be imported."""
    try:
        if library == "foolbox":
            place = importlib.import_module("foolbox.attacks")
            base = importlib.import_module("foolbox.attacks.base").Attack
        elif library == "torchattacks":
            place = importlib.import_module("torchattacks")
            base = importlib.import_module("torchattacks.attack").Attack
        else:
            place = importlib.import_module("art.attacks.evasion")
            base = importlib.import_module("art.attacks").EvasionAttack
    except (ImportError, RuntimeError, OSError):  # the last two: a package in it that does not fit this torch
        return None
    return {
        name: value
        for name, value in vars(place).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and not inspect.isabstract(value)
        and name not in UNUSABLE
    }


def _parameters(attack: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(attack).parameters


def _norm(budget: Budget | None) -> float | None:
    return None if budget is None else NORMS[type(budget)]


def _eps(name: str, budget: Budget) -> float:
    if not isinstance(budget, Linf | L2 | L1):
        raise ValueError(f"budget is {budget}; accepted for {name} is Linf, L2 or L1, which it knows")
    return float(budget.eps)


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Nothing is left in the parameters' `.grad`, whatever an attack calls backward on."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _brought_back(problem: Problem, budget: Budget | None, images: Tensor) -> Tensor:
    """The images, untouched outside the region, and those that overspend the budget projected on it."""
    change = torch.where(problem.region, images - problem.clean, 0)
    inside = torch.where(problem.region, images, problem.clean)
    if budget is None:
        return inside
    over = budget.size(change, problem.clean) > _eps("", budget) * (1 + ROUNDING) + 1e-7
    projected = problem.apply(problem.project(budget, change))
    return torch.where(over[:, None, None, None], projected, inside)


def _sentence(error: Exception) -> str:
    return next((line for line in str(error).strip().splitlines() if line), type(error).__name__)[:200]
