"""The plan of an audit on the command line: options, and a plan.toml that they override."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from weakspot._checks import unknown_choice
from weakspot._io.urls import is_url
from weakspot.attacks import Attack, find_attack
from weakspot.cli.app import Failure
from weakspot.cli.attack_choice import quick_steps
from weakspot.cli.options import (
    ATTACK,
    QUICK_IMAGES,
    AnalysesOption,
    BudgetOption,
    FractionOption,
    LimitOption,
    ModelOptions,
    SeedOption,
    flag,
    given,
    option,
    parse_numbers,
    parse_settings,
    parse_size,
    read_class_names,
)
from weakspot.cli.session import check_existing
from weakspot.datasets.labels import LABEL_FILE


@dataclass(frozen=True)
class PlanOptions:
    """The options that a plan.toml may hold as well. What is given on the command line takes precedence."""

    attacks: Annotated[
        str,
        option(
            "--attacks -a NAMES", "Attacks, separated by commas; see weakspot attack --list.", panel=ATTACK
        ),
    ] = "pgd"
    budget: BudgetOption = "linf:4/255"
    settings: Annotated[
        list[str] | None,
        option(
            "--set SETTING",
            "ATTACK.NAME=VALUE, an argument of an attack, such as pgd.steps=50. Repeat for several.",
            panel=ATTACK,
        ),
    ] = None
    steps: Annotated[
        int | None,
        option(
            "N", "Steps of each attack that takes steps.", default="the attacks' own", least=1, panel=ATTACK
        ),
    ] = None
    regions: Annotated[
        str,
        option(
            "REGIONS",
            "Regions, separated by commas, such as none,cam,~cam; see weakspot attack --list.",
            panel=ATTACK,
        ),
    ] = "none"
    fraction: FractionOption = 0.3
    controls: Annotated[
        bool,
        flag(
            "--controls/--no-controls",
            "Attack in controls of equal area beside every region: the region of --control-images other images, "
            "and the region shifted. Separates a weak region from a large or central one; costs about 7 times as much.",
            panel=ATTACK,
        ),
    ] = False
    control_images: Annotated[
        int,
        option(
            "N",
            "Number of other images whose regions serve as controls; fewer give less statistical power.",
            panel=ATTACK,
        ),
    ] = 5
    analyses: AnalysesOption = "overlap,promotion,propagation"
    labels: Annotated[
        str,
        option(
            "SOURCE",
            f"folders (named after classes), {LABEL_FILE}, predictions (the model's), or auto: the labels of an "
            "array, else folders if all match, else predictions.",
        ),
    ] = "auto"
    limit: LimitOption = None
    seed: SeedOption = 0
    maps: Annotated[bool, flag("--maps/--no-maps", "Store maps and images.")] = True


@dataclass(frozen=True)
class EngineOptions:
    """How the audit is executed. None of these changes the results."""

    engine: Annotated[
        str, option("NAME", "local, or ray: several workers, on this machine or a cluster.")
    ] = "local"
    workers: Annotated[
        int | None, option("N", "Workers of --engine ray.", default="one for each CPU, or GPU if used")
    ] = None
    ray_address: Annotated[
        str | None,
        option("ADDRESS", "Address of a Ray cluster.", default="RAY_ADDRESS, else a new local cluster"),
    ] = None


def given_options(context: typer.Context, plan: PlanOptions, network: ModelOptions) -> dict[str, object]:
    """The plan options that were given, as `Plan.from_mapping` takes them."""
    # Only what was given: a default must not override a plan.toml.
    names = [field.name for field in fields(plan) if field.name not in {"settings", "steps"}]
    chosen = given(context, names)
    values: dict[str, object] = {name: getattr(plan, name) for name in chosen}
    parsed = {
        "spec": network.model,
        "weights": str(network.weights),
        "mean": parse_numbers("--mean", network.mean),
        "std": parse_numbers("--std", network.std),
        "size": parse_size(network.size),
        "classes": read_class_names(network.classes),
        "device": network.device,
    }
    chosen = given(context, [field.name for field in fields(network)])
    keys = ["spec" if name == "model" else name for name in chosen]
    return values | ({"model": {key: parsed[key] for key in keys}} if keys else {})


def plan_table(
    sources: list[str], overrides: dict[str, object], settings: Sequence[str] | None, out: str | None
) -> tuple[dict[str, object], str]:
    """The plan as a mapping, and the folder of the run."""
    from weakspot.audit.plan.plan import read_plan

    table: dict[str, object] = {"images": sources}
    if len(sources) == 1 and Path(sources[0]).suffix == ".toml" and not is_url(sources[0]):
        path = Path(sources[0])
        table = dict(read_plan(path))
        out = out or cast("str | None", table.pop("out", None))
    if not table.get("images"):
        raise Failure("no images were named (give files, folders, arrays, a plan.toml, or --resume RUN)")
    if out is None:
        raise Failure("no output folder was named (give --out FOLDER)")
    model = table.get("model", {})
    model = {"spec": model} if isinstance(model, str) else model
    if isinstance(model, dict):
        model = model | overrides.pop("model", {})  # type: ignore[operator]  # made by given_options
        # In a plan.toml, the names of classes may be the path of a file that holds them.
        if isinstance(model.get("classes"), str):
            model["classes"] = read_class_names(Path(model["classes"]))
    if "budget" in overrides and "attacks" not in overrides:
        table["attacks"] = _without_budgets(table.get("attacks", "pgd"))
    table |= {**overrides, "model": model}
    if settings:
        table["attacks"] = _with_settings(table.get("attacks", "pgd"), settings)
    images = table["images"]
    check_existing([images] if isinstance(images, str) else images)  # type: ignore[arg-type]  # a list of texts
    return table, out


def _without_budgets(attacks: object) -> object:
    """The attacks of a plan without the budgets that they state themselves, which those of --budget replace."""
    if not isinstance(attacks, list):
        return attacks
    plain = [
        {key: value for key, value in attack.items() if key != "budget"}
        if isinstance(attack, dict)
        else attack
        for attack in attacks
    ]
    # Attacks that differed by their budgets alone are one now.
    return [attack for number, attack in enumerate(plain) if attack not in plain[:number]]


def with_steps(table: dict[str, object], steps: int) -> dict[str, object]:
    """The plan with so many steps of every attack that takes steps.

    Raises:
        Failure: if no attack takes steps.
    """
    attacks, takers = _takers_of_steps(table.get("attacks", "pgd"))
    if attacks and isinstance(attacks, list) and not takers:
        names = " and ".join(str(entry.get("name")) for entry in attacks)
        raise Failure(
            f"{names} {'take' if len(attacks) > 1 else 'takes'} no --steps (see weakspot attack --list)"
        )
    for entry, own, _ in takers:
        entry["settings"] = {**own, "steps": steps}
    return {**table, "attacks": attacks}


def quick_plan(table: dict[str, object]) -> dict[str, object]:
    """The plan of a trial: fewer images, and fewer steps of every attack that takes steps, unless it states less.

    A limit of a wrong type stays as it is, for `Plan.from_mapping` to refuse.
    """
    limit = table.get("limit", QUICK_IMAGES)
    attacks, takers = _takers_of_steps(table.get("attacks", "pgd"))
    for entry, own, attack in takers:
        steps = quick_steps(attack)
        if steps is not None:
            stated = own.get("steps", steps)
            fewer = min(stated, steps) if isinstance(stated, int) else stated
            entry["settings"] = {**own, "steps": fewer}
    fewest = min(limit, QUICK_IMAGES) if isinstance(limit, int) else limit
    return {**table, "limit": fewest, "attacks": attacks}


def _takers_of_steps(attacks: object) -> tuple[object, list[tuple[dict[str, Any], dict[str, Any], Attack]]]:
    """The attacks as tables, and of each that takes steps its table, its settings and the attack.

    What has a wrong type stays as it is, for `Plan.from_mapping` to refuse.
    """
    if not isinstance(attacks, str | list) or not all(isinstance(attack, str | dict) for attack in attacks):
        return attacks, []
    tables = _with_settings(attacks, ())
    named = [(table, table.get("settings", {}), table.get("name")) for table in tables]
    known = [(table, own, find_attack(name)) for table, own, name in named if isinstance(name, str)]
    return tables, [entry for entry in known if isinstance(entry[1], dict) and entry[2].takes("steps")]


def _with_settings(attacks: object, settings: Sequence[str]) -> list[dict[str, Any]]:
    """The attacks as tables, with the settings of --set."""
    entries = attacks.split(",") if isinstance(attacks, str) else attacks
    tables: list[dict[str, Any]] = [
        {"name": entry.strip()} if isinstance(entry, str) else dict(entry)
        for entry in entries  # type: ignore[attr-defined]  # Plan.from_mapping checks it
    ]
    names = [str(table.get("name")) for table in tables]
    form = "ATTACK.NAME=VALUE such as pgd.steps=50"
    for place, value in parse_settings(settings, form=form).items():
        name, _, key = place.rpartition(".")
        if not (name and key):
            raise Failure(f"--set must be {form}, got {place!r}")
        if name not in names:
            raise Failure(unknown_choice("the attack in --set", name, names))
        for table in tables:
            if table.get("name") == name:
                table["settings"] = {**table.get("settings", {}), key: value}
    return tables
