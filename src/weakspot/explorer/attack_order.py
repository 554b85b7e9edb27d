"""The order of an attack: read from a request, and copied as a command and as Python that reproduce it elsewhere."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from torch import Tensor

from weakspot import attacks
from weakspot._checks import unknown_choice
from weakspot.attacks import Attack, available_attacks, find_attack
from weakspot.budgets import Budget, read_budget
from weakspot.datasets.labels import ClassIndex
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError, mask_text
from weakspot.explorer.place_masks import control_of
from weakspot.statistics.number_format import counted

LINE = 76  # characters of base64 on a line
Settings = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, eq=False)
class Order:
    """What to attack, where, and how.

    Attributes:
        number: of the image.
        mask: bool (1, 1, H, W); None for the whole image.
        attack: by name.
        budget: None for an attack that has none.
        settings: arguments of the attack's own.
        target: the class to reach, or None.
        seed: of everything random, the control's place included.
    """

    number: int
    mask: Tensor | None
    attack: Attack
    budget: Budget | None
    budget_text: str | None
    settings: Settings
    target: int | None
    seed: int

    @staticmethod
    def read(bench: Bench, request: Request) -> Order:
        """Check a request before anything runs.

        Raises:
            ValueError: if a part of it is not valid, in one sentence.
        """
        number = request.whole("image", 0, 10**6, 0)
        exhibit = bench.exhibit(number)
        attack = find_attack(own_attack(request))
        text = request.text("budget", "linf:4/255") if _takes_budget(attack, request) else None
        settings = request.settings("options")
        for name in settings:
            if not attack.takes(name):
                raise RequestError(
                    unknown_choice(f"options of {attack.name}", name, sorted(attack.parameters))
                )
        classes = exhibit.logits.shape[1]
        target = request.whole("target", 0, classes - 1) if request.has("target") else None
        if target == exhibit.label:
            raise RequestError(
                f"target must be another class than the label, {bench.classifier.class_name(target)}"
            )
        if target is not None and "targets" not in attack.accepts:
            raise RequestError(f"{attack.name} takes no target")
        mask = request.mask("mask", exhibit.size)
        # A mask of everything leaves no other place, so it is treated as none.
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None and "region" not in attack.accepts:
            raise RequestError(f"{attack.name} takes no mask: it always acts on the whole image")
        return Order(
            number,
            mask,
            attack,
            None if text is None else read_budget(text),
            text,
            settings,
            target,
            request.whole("seed", 0, 2**53, 0),
        )

    def describe(self, bench: Bench) -> str:
        """The attack in one line."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        budget = [] if self.budget_text is None else [self.budget_text]
        toward = [] if self.target is None else [f"toward {bench.classifier.class_name(self.target)}"]
        where = "whole image" if self.mask is None else counted(int(self.mask.sum()), "brushed pixel")
        return ", ".join([self.attack.name, *settings, *budget, where, *toward, f"seed {self.seed}"])


def own_attack(request: Request) -> str:
    """The name of an attack that is installed with weakspot or a plug-in, not one of another library."""
    return request.choice("attack", list(available_attacks()), "pgd")


def _takes_budget(attack: Attack, request: Request) -> bool:
    if request.has("budget") and not attack.takes_budget:
        raise RequestError(f"{attack.name} takes no budget")
    return attack.takes_budget and (attack.default_budget or request.has("budget"))


# ---------------------------------------------------------------- copies


def copy_command(bench: Bench, request: Request) -> Message:
    """The attack of a request, at its mask and at its control, as shell commands and as Python."""
    order = Order.read(bench, request)
    exhibit = bench.exhibit(order.number)
    control = None if order.mask is None else control_of(order.mask, order.seed)
    masks = {
        name: mask_text(one) for name, one in (("mask", order.mask), ("control", control)) if one is not None
    }
    remarks = []
    if exhibit.uploaded:
        remarks.append(f"Save the picture that you dropped as {_file_name(exhibit)} first.")
    command, target = None, _target_text(bench, order, exhibit)
    if bench.origin.model is None:
        remarks.append(
            "A model from Python has no command; the Python code uses your variables model and images."
        )
    elif order.target is not None and target is None:
        remarks.append(
            f"There is no command for class {order.target} as the target: other classes have its name and its number "
            "as their names."
        )
    else:
        command = _shell(bench, order, exhibit, masks, target)
        if bench.origin.samples and not exhibit.uploaded:
            remarks.append(
                "The command attacks all four sample photographs; the Python code attacks this one."
            )
    return {
        "command": command,
        "python": _python(bench, order, exhibit, masks),
        "remark": " ".join(remarks) or None,
    }


def _file_name(exhibit: Exhibit) -> str:
    return PurePath(exhibit.name).name or "picture.png"


def _target_text(bench: Bench, order: Order, exhibit: Exhibit) -> str | None:
    """The target as the command line reads it, where names come before numbers; None if no text means it."""
    if order.target is None:
        return None
    classes = ClassIndex(tuple(bench.classifier.class_names), exhibit.logits.shape[1])
    texts = (bench.classifier.class_name(order.target), str(order.target), f"class {order.target}")
    return next((text for text in texts if classes.find(text) == order.target), None)


def _shell(bench: Bench, order: Order, exhibit: Exhibit, masks: Mapping[str, str], target: str | None) -> str:
    """Shell commands: for the mask and its control, one that writes it and one that attacks inside it."""
    parts = ["weakspot", "attack"]
    if exhibit.path is None and not exhibit.uploaded:
        parts.append("--samples")
    else:
        path = _file_name(exhibit) if exhibit.path is None else exhibit.path
        # A name that begins with a dash would be read as an option.
        parts.append(shlex.quote(f"./{path}" if path.startswith("-") else path))
    parts += [*(bench.origin.model or ()), "--attack", shlex.quote(order.attack.name)]
    if order.budget_text is not None:
        parts += ["--budget", shlex.quote(order.budget_text)]
    for name, value in order.settings.items():
        parts += ["--set", shlex.quote(f"{name}={_json_text(value)}")]
    if target is not None:
        parts += ["--target", shlex.quote(target)]
    if bench.origin.labels is not None and not exhibit.uploaded:
        parts += ["--labels", shlex.quote(bench.origin.labels)]
    # One image at a time goes through the model, as on the bench.
    parts += ["--seed", str(order.seed), "--batch-size", "1"]
    attack = " ".join(parts)
    if not masks:
        return f"{attack} --out weakspot-attack\n"
    return "".join(
        f"base64 -d > {name}.png <<'END'\n{_wrapped(mask)}\nEND\n"
        f"{attack} --region {name}.png --out weakspot-attack/{name}\n"
        for name, mask in masks.items()
    )


def _json_text(value: str | float | bool | None) -> str:
    """A value as --set takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _python(bench: Bench, order: Order, exhibit: Exhibit, masks: Mapping[str, str]) -> str:
    """A script that attacks at the mask and at its control and prints what came of each."""
    lines = ["import base64", "from pathlib import Path", "", "import torch", "import weakspot", ""]
    if not masks:
        # Only masks need the first two imports.
        lines = lines[3:]
    lines += _inputs(bench, exhibit, order.number)
    lines.append(
        f"label = torch.tensor([{exhibit.label}], device=image.device)  # {_comment(bench, exhibit)}"
    )
    lines.append("places = {}" if masks else 'places = {"whole image": None}')
    for name, mask in masks.items():
        text = textwrap.indent("\n".join(f'"{line}"' for line in _wrapped(mask).splitlines()), "    ")
        lines += [
            f'Path("{name}.png").write_bytes(base64.b64decode(',
            text,
            "))",
            f'places["{name}"] = weakspot.regions.from_file("{name}.png", image)',
        ]
    lines += [
        "for place, region in places.items():",
        f"    result = {_call(order)}",
        "    with torch.no_grad():",
        "        logits = model(result.adversarial)[0]",
        "    others = logits.clone()",
        "    others[label] = -torch.inf",
        "    fooled, margin = bool(result.success), float(logits[label] - others.max())",
        '    print(f"{place}: fooled {fooled}, {model.class_name(int(logits.argmax()))}, margin {margin:.4f}")',
    ]
    return "\n".join(lines) + "\n"


def _inputs(bench: Bench, exhibit: Exhibit, number: int) -> list[str]:
    """The lines that make `model` and `image`."""
    load, origin = bench.origin.load, bench.origin
    lines = ["# model: the one that you gave to weakspot.explore" if load is None else f"model = {load}"]
    if load is None:
        lines += [
            "if not isinstance(model, weakspot.Classifier):",
            "    model = weakspot.Classifier.wrap(model)",
        ]
    if exhibit.uploaded or exhibit.path is not None:
        path = _file_name(exhibit) if exhibit.path is None else exhibit.path
        lines.append(
            f"images, _ = weakspot.read_images({path!r}, size=model.input_size, channels=model.channels)"
        )
        return [*lines, "image = images.to(model.mean.device)"]
    if origin.samples:
        lines.append("images, _ = weakspot.sample_images(model.input_size)")
        if bench.classifier.channels == 1:
            lines += ["from weakspot.similarity import luma", "images = luma(images)"]
    else:
        lines.append("# images: the ones that you gave to weakspot.explore")
    return [*lines, f"image = images[[{number}]].to(model.mean.device)"]


def _call(order: Order) -> str:
    """The call of the attack, on one line."""
    function = f"weakspot.attacks.{order.attack.name}"
    if order.attack.name not in attacks.__all__:
        function = f"weakspot.attacks.find_attack({order.attack.name!r})"
    arguments = ["model", "image", "label"]
    if order.budget_text is not None:
        arguments.append(f"budget=weakspot.read_budget({order.budget_text!r})")
    if "region" in order.attack.accepts:
        arguments.append("region=region")
    if order.target is not None:
        arguments.append(f"targets=torch.tensor([{order.target}], device=image.device)")
    if "seed" in order.attack.accepts:
        arguments.append(f"seed={order.seed}")
    arguments += [f"{name}={value!r}" for name, value in order.settings.items()]
    return f"{function}({', '.join(arguments)})"


def _comment(bench: Bench, exhibit: Exhibit) -> str:
    # On one line, because it follows a # in the script.
    return " ".join(bench.classifier.class_name(exhibit.label).split())


def _wrapped(text: str) -> str:
    return "\n".join(text[start : start + LINE] for start in range(0, len(text), LINE))
