"""Copies: the state of the bench as a command and as Python, which reproduce it outside the explorer."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import PurePath

from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, mask_text
from weakspot.explorer.pair_attack import Order
from weakspot.explorer.place_masks import control_of

LINE = 76  # characters of base64 on a line


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
    if bench.origin.model is None:
        remarks.append(
            "A model from Python has no command; the Python code uses your variables model and images."
        )
    elif bench.origin.samples and not exhibit.uploaded:
        remarks.append("The command attacks all four sample photographs; the Python code attacks this one.")
    command = None if bench.origin.model is None else _shell(bench, order, exhibit, masks)
    return {
        "command": command,
        "python": _python(bench, order, exhibit, masks),
        "remark": " ".join(remarks) or None,
    }


def _file_name(exhibit: Exhibit) -> str:
    return PurePath(exhibit.name).name or "picture.png"


def _shell(bench: Bench, order: Order, exhibit: Exhibit, masks: Mapping[str, str]) -> str:
    """Shell commands: for the mask and its control, one that writes it and one that attacks inside it."""
    parts = ["weakspot", "attack"]
    if exhibit.path is None and not exhibit.uploaded:
        parts.append("--samples")
    else:
        parts.append(shlex.quote(_file_name(exhibit) if exhibit.path is None else exhibit.path))
    parts += [*(bench.origin.model or ()), "--attack", shlex.quote(order.attack.name)]
    if order.budget_text is not None:
        parts += ["--budget", shlex.quote(order.budget_text)]
    for name, value in order.settings.items():
        parts += ["--set", shlex.quote(f"{name}={_json_text(value)}")]
    if order.target is not None:
        parts += ["--target", str(order.target)]
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
    from weakspot import attacks

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
