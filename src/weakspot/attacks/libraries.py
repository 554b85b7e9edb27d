"""Libraries: how foolbox, torchattacks and ART are asked for one of their attacks, each in its own way."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weakspot._checks import unknown_choice
from weakspot.attacks.context import Problem
from weakspot.budgets import L1, L2, Budget, Linf

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


def _foolbox(task: Task, model: nn.Module) -> Any:
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


def _torchattacks(task: Task, model: nn.Module) -> Any:
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


def _art(task: Task, model: nn.Module) -> Any:
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


LIBRARIES: dict[str, Callable[[Task, nn.Module], Any]] = {
    "foolbox": _foolbox,
    "torchattacks": _torchattacks,
    "art": _art,
}


def find(name: str) -> tuple[Callable[[Task, nn.Module], Any], Any]:
    """How to run an attack of that library, and its class."""
    library, _, attack = str(name).partition(":")
    if library not in LIBRARIES or not attack:
        raise ValueError(f"attack is {name!r}; accepted is LIBRARY:CLASS of {', '.join(LIBRARIES)}")
    known = attacks_of(library)
    if known is None:
        raise ValueError(f"attack {name} needs {library}; run: pip install {PACKAGES[library]}")
    if attack not in known:
        raise ValueError(unknown_choice(f"attack of {library}", attack, known))
    return LIBRARIES[library], known[attack]


def minimizes(attack: Any) -> bool:
    """Whether an attack's class takes no epsilon of its own: without a budget it looks for the smallest change."""
    return "eps" not in _parameters(attack)


def installed() -> list[str]:
    """Names of all foreign attacks that can be run here, as `external` takes them."""
    return [f"{library}:{attack}" for library in LIBRARIES for attack in sorted(attacks_of(library) or ())]


def attacks_of(library: str) -> Mapping[str, Any] | None:
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


def eps_of(name: str, budget: Budget) -> float:
    """The budget's limit; raises ValueError where other libraries know no such budget."""
    if not isinstance(budget, Linf | L2 | L1):
        raise ValueError(f"budget is {budget}; accepted for {name} is Linf, L2 or L1, which it knows")
    return float(budget.eps)
