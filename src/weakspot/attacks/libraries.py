"""Adapters for foolbox, torchattacks and ART, each of which runs one attack of its library."""

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

# Classes of ART that need targets, and classes that are given one image at a time.
ONLY_TARGETED = {"SaliencyMapMethod", "TargetedUniversalPerturbation"}
ONE_BY_ONE = {"SimBA", "ShadowAttack"}
PACKAGES = {"foolbox": "foolbox", "torchattacks": "torchattacks", "art": "adversarial-robustness-toolbox"}
NORMS: dict[type, float] = {Linf: math.inf, L2: 2, L1: 1}


@dataclass(frozen=True)
class Task:
    """One run of an attack of another library.

    Attributes:
        name: as the user gave it.
        attack: its class.
        problem: some images; with a region, one.
        eps: of the budget, or None.
        options: for the attack's class.
    """

    name: str
    attack: Any
    problem: Problem
    eps: float | None
    options: dict[str, object]

    @property
    def images(self) -> Tensor:
        """(N, C, H, W) in the memory order that all libraries can read."""
        return self.problem.clean.contiguous()

    @property
    def norm(self) -> float | None:
        """The order of the budget's norm."""
        return None if self.problem.budget is None else NORMS[type(self.problem.budget)]

    def classes(self) -> int:
        """How many classes the model has, for attacks that must know; costs a forward pass of one image."""
        problem = self.problem
        first = torch.zeros(1, dtype=torch.long, device=problem.clean.device)
        return problem.logits(problem.clean[:1], first)[1].shape[1]

    def make(self, *arguments: object, **defaults: object) -> Any:
        """The attack, with those of the defaults that its class takes and the user did not set."""
        parameters = _parameters(self.attack)
        fitting = {key: value for key, value in defaults.items() if key in parameters}
        return self.attack(*arguments, **fitting | self.options)

    def check_norm(self, *norms: float) -> None:
        """Raises ValueError unless the budget is of a norm that the attack searches in."""
        if self.norm is not None and self.norm not in norms:
            listed = " or ".join(f"L{norm:g}" for norm in norms)
            raise self.refuse(f"needs a budget in {listed}, got {self.problem.budget}")

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"attack {self.name} {reason}")


Library = Callable[[Task, nn.Module], Any]


def _foolbox(task: Task, model: nn.Module) -> Any:
    foolbox = importlib.import_module("foolbox")
    problem = task.problem
    # In foolbox an argument of the call, not of the attack's class.
    eps = task.options.pop("epsilons", task.eps)
    attack = task.make(distance=foolbox.distances.LpDistance(task.norm or 2))
    norm = getattr(getattr(attack, "distance", None), "p", None)
    if norm is not None:
        task.check_norm(norm)
    fixed = importlib.import_module("foolbox.attacks.base").FixedEpsilonAttack
    if eps is None and isinstance(attack, fixed):
        raise task.refuse("needs a budget, such as linf:4/255 (in Python Linf(4 / 255))")
    criterion = (
        foolbox.criteria.Misclassification(problem.labels)
        if problem.targets is None
        else foolbox.criteria.TargetedMisclassification(problem.targets)
    )
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device=problem.clean.device)
    # foolbox returns raw images, images clipped to the budget, and success.
    return attack(network, task.images, criterion, epsilons=eps)[1]


def _torchattacks(task: Task, model: nn.Module) -> Any:
    parameters = _parameters(task.attack)
    if task.eps is not None:
        if "eps" not in parameters:
            raise task.refuse("takes no budget")
        if "norm" in parameters:
            task.check_norm(math.inf, 2)
        else:
            task.check_norm(2 if "L2" in task.attack.__name__ else math.inf)
    # Defaults only: `make` leaves out what the class does not take and what the user set.
    given: dict[str, object] = {}
    if task.eps is not None:
        given |= {"eps": task.eps, "norm": {math.inf: "Linf", 2: "L2", 1: "L1", None: None}[task.norm]}
    if "n_classes" in parameters:
        given["n_classes"] = task.classes()
    attack = task.make(model, **given)
    attack.set_device(task.problem.clean.device)
    if task.problem.targets is None:
        return attack(task.images, task.problem.labels)
    if "targeted" not in attack.supported_mode:
        raise task.refuse("cannot aim at targets")
    attack.set_mode_targeted_by_label(quiet=True)
    return attack(task.images, task.problem.targets)


def _art(task: Task, model: nn.Module) -> Any:
    estimators = importlib.import_module("art.estimators.classification")
    problem, parameters = task.problem, _parameters(task.attack)
    if task.eps is not None:
        if "eps" not in parameters:
            raise task.refuse("takes no budget")
        several = (math.inf, 2) if task.attack.__name__ == "SquareAttack" else (math.inf, 2, 1)
        task.check_norm(*(several if "norm" in parameters else (math.inf,)))
    only_targeted = task.attack.__name__ in ONLY_TARGETED
    if problem.targets is not None and "targeted" not in parameters and not only_targeted:
        raise task.refuse("cannot aim at targets")
    if problem.targets is None and only_targeted:
        raise task.refuse("needs targets")
    classes = task.classes()
    estimator = estimators.PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(problem.clean.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if problem.clean.is_cuda else "cpu",
    )
    given: dict[str, object] = {"verbose": False, "batch_size": len(problem)}
    if task.eps is not None:
        # ART refuses steps longer than the budget, and its own default is longer than small budgets.
        given |= {"eps": task.eps, "eps_step": task.eps / 4, "norm": task.norm}
    given["targeted"] = problem.targets is not None  # some aim by default, and would then aim at the label
    wanted = problem.labels if problem.targets is None else problem.targets
    attack = task.make(estimator, **given)
    return attack.generate(task.images.cpu().numpy(), nn.functional.one_hot(wanted, classes).cpu().numpy())


LIBRARIES: dict[str, Library] = {"foolbox": _foolbox, "torchattacks": _torchattacks, "art": _art}


def find(name: str) -> tuple[Library, Any]:
    """The function that runs attacks of the library, and the attack's class."""
    library, _, attack = str(name).partition(":")
    if library not in LIBRARIES or not attack:
        raise ValueError(f"attack must be LIBRARY:CLASS of {', '.join(LIBRARIES)}, got {name!r}")
    classes = attacks_of(library)
    if classes is None:
        raise ValueError(f"attack {name} needs {library} (run: pip install {PACKAGES[library]})")
    if attack not in classes:
        raise ValueError(unknown_choice(f"the class of {library}", attack, classes))
    return LIBRARIES[library], classes[attack]


def takes_eps(attack: Any) -> bool:
    """Whether an attack's class takes an epsilon; if not, without a budget it looks for the smallest change."""
    return "eps" in _parameters(attack)


def installed() -> list[str]:
    """Names of all attacks of other libraries that are installed, as `external` takes them."""
    return [f"{library}:{attack}" for library in LIBRARIES for attack in sorted(attacks_of(library) or ())]


def attacks_of(library: str) -> Mapping[str, Any] | None:
    """Its attacks by the names of their classes, or None if it cannot be imported."""
    modules = {
        "foolbox": ("foolbox.attacks", "foolbox.attacks.base", "Attack"),
        "torchattacks": ("torchattacks", "torchattacks.attack", "Attack"),
        "art": ("art.attacks.evasion", "art.attacks", "EvasionAttack"),
    }
    place, base_module, base_name = modules[library]
    try:
        module = importlib.import_module(place)
        base = getattr(importlib.import_module(base_module), base_name)
    except (ImportError, RuntimeError, OSError):  # the last two: a package inside does not fit this torch
        return None
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and not inspect.isabstract(value)
    }


def _parameters(attack: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(attack).parameters


def eps_of(name: str, budget: Budget) -> float:
    """The budget's limit; raises ValueError if other libraries have no such budget."""
    if not isinstance(budget, Linf | L2 | L1):
        raise ValueError(f"budget must be Linf, L2 or L1 for {name}, got {budget}")
    return float(budget.eps)
