"""`weakspot attack`: attack pictures and keep what was made, with what it cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weakspot.cli.app import UNREADABLE, USAGE, Failure, app, notes_for_people, progress_bar, watch
from weakspot.cli.explain import Aim, find_aim, find_region
from weakspot.cli.inputs import (
    check_existing,
    check_sources,
    load_classifier,
    read_pictures,
    setting_value,
)
from weakspot.cli.options import (
    ClassesOption,
    DebugOption,
    DeviceOption,
    FractionOption,
    MeanOption,
    ModelOption,
    QuietOption,
    RegionOption,
    SamplesOption,
    SeedOption,
    SizeOption,
    StdOption,
    TargetOption,
    WeightsOption,
    refuse_fraction,
)
from weakspot.cli.output import (
    check_folder,
    describe_run,
    make_folder,
    print_attack,
    print_rows,
)

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.attacks import Attack, AttackOptions
    from weakspot.budgets import Budget
    from weakspot.classifier import Classifier
    from weakspot.pairs import AttackResult

FILES = ("clean", "adversarial", "overview.png", "scores.csv", "pairs.safetensors", "run.json")
DEFAULT_BUDGET = "linf:4/255"
EXAMPLES = """

[bold]Examples[/bold]

weakspot attack cat.jpg dog.jpg

weakspot attack photos/ --attack pgd --budget ssim:0.01 --region background --out runs/background

weakspot attack photos/ --attack pixels --set method=guided --set count=3

weakspot attack photos/ --attack foolbox:L2CarliniWagnerAttack --region '~cam'

weakspot attack --list
"""


@app.command(epilog=EXAMPLES)
def attack(
    context: typer.Context,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Pictures or folders of pictures.", show_default=False)
    ] = None,
    samples: SamplesOption = False,
    name: Annotated[
        str,
        typer.Option(
            "--attack", "-a", help="One of --list, or foolbox:CLASS, torchattacks:CLASS, art:CLASS."
        ),
    ] = "pgd",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="How much may change: linf:4/255, l2:1.5, l1:20, ssim:0.01, ssim-local:0.05; linf:4/255 where "
            "the attack takes a budget and none is given.",
            show_default=False,
        ),
    ] = None,
    region: RegionOption = "none",
    fraction: FractionOption = 0.3,
    target: TargetOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NAME=VALUE of the attack's own arguments: --set steps=50.", show_default=False
        ),
    ] = None,
    model: ModelOption = "efficientnet_lite0",
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for clean/, adversarial/, overview.png, scores.csv, pairs.safetensors, run.json."
        ),
    ] = Path("weakspot-attack"),
    seed: SeedOption = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Images through the model at once; measured by default.", min=1)
    ] = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON.")] = False,
    quiet: QuietOption = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="List attacks, their arguments, budgets and regions, and stop.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Attack pictures; write the pairs, PNG files and what each cost.

    Labels are the model's own predictions on the clean pictures. Success is judged by a fresh forward pass, also of the
    PNG files. `weakspot explain --pair OUT/pairs.safetensors` then explains them.
    """
    del debug
    if list_all:
        print_rows(_everything(), as_json)
        return
    started = time.perf_counter()
    sources = list(images or [])
    check_sources(sources, pair=False, samples=samples)
    watch(context, out, FILES)
    check_folder(out)
    _check_apart(out, sources)
    check_existing(sources)
    with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(quiet or as_json) as advance:
        from weakspot.attacks import AttackOptions, find_attack

        refuse_fraction(context, [region])
        attack = find_attack(name)
        spent, own = _budget(attack, budget), _settings(attack, settings or [])
        advance("loading the model", 0.0)
        classifier = load_classifier(model, weights, mean, std, classes, size, device)
        batch, names, skipped, unread = read_pictures(classifier, sources, samples=samples)
        make_folder(out)
        aim = find_aim(classifier, batch, names, target)
        mask, where = find_region(region, fraction, classifier, aim, seed)
        options = AttackOptions(
            spent, mask, aim.targets, seed, batch_size, lambda done: advance("attacking", 0.1 + 0.8 * done)
        )
        result = _run(attack, classifier, aim, options, own)
        advance("writing", 0.92)
        about = {
            "attack": ", ".join([name, *(settings or [])]) + (f", {spent}" if spent else "") + f", {where}",
            "labels": "the model's own predictions on the clean images",
            **describe_run(classifier, model, seed, skipped),
        }
        scores = _write(out, classifier, result, aim, spent, about)
    seconds = time.perf_counter() - started
    if as_json:
        rows = json.loads(scores.to_json(orient="records", double_precision=9))
        typer.echo(json.dumps({"scores": rows, "skipped": skipped, "folder": str(out.resolve())}, indent=2))
    elif not quiet:
        print_attack(scores, seconds, len(skipped))
        typer.echo(f"\nWritten to {out.resolve()}; look at overview.png")
    if unread:
        raise typer.Exit(UNREADABLE)


def _check_apart(out: Path, sources: list[Path]) -> None:
    """Raises Failure where pictures would be written over those that are read, or be read in the next run."""
    written = [out.resolve() / part for part in ("clean", "adversarial", "overview.png")]
    for part in written[:2]:
        if part.exists() and not part.is_dir():
            raise Failure(f"out is {out}, where {part.name} is a file; give another folder", USAGE)
    if written[2].is_dir():
        raise Failure(f"out is {out}, where overview.png is a folder; give another folder", USAGE)
    for source in (source.resolve() for source in sources):
        inside = any(part == source or part in source.parents for part in [*written, out.resolve()])
        as_wrapped_classifier = source.is_dir() and source in written[0].parents
        if inside or (as_wrapped_classifier and out.exists() and any(part.exists() for part in written)):
            raise Failure(
                f"out is {out}, where pictures lie that are to be attacked; give another folder", USAGE
            )


def _run(
    attack: Attack, classifier: Classifier, aim: Aim, options: AttackOptions, own: Mapping[str, object]
) -> AttackResult:
    """The attack with as many of the shared options as it takes; an error if one that matters is not taken."""
    for name, option in (("region", "--region"), ("targets", "--target"), ("batch_size", "--batch-size")):
        if getattr(options, name) is not None and name not in attack.accepts:
            raise Failure(f"{attack.name} takes no {option}", USAGE)
    try:
        return attack.run(classifier, aim.images, aim.labels, options, own)
    except TypeError as error:
        raise Failure(f"{attack.name} cannot work with these arguments: {error}", USAGE) from error


def _settings(attack: Attack, settings: list[str]) -> dict[str, object]:
    """The attack's own arguments, from texts NAME=VALUE."""
    from weakspot._checks import unknown_choice

    values: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise Failure(f"--set must be NAME=VALUE, got {setting!r}", USAGE)
        if not attack.takes(key):
            raise Failure(unknown_choice(f"--set of {attack.name}", key, sorted(attack.parameters)), USAGE)
        values[key] = setting_value(value)
    return values


def _budget(attack: Attack, budget: str | None) -> Budget | None:
    """The budget that the option states, or the default one for an attack that must have one."""
    from weakspot.budgets import read_budget

    if budget is None:
        return read_budget(DEFAULT_BUDGET) if attack.takes_budget and attack.default_budget else None
    if not attack.takes_budget:
        raise Failure(f"{attack.name} looks for the smallest change and takes no --budget", USAGE)
    return read_budget(budget)


def _write(
    out: Path,
    classifier: Classifier,
    result: AttackResult,
    aim: Aim,
    spent: Budget | None,
    about: Mapping[str, Any],
) -> pd.DataFrame:
    """All files; returns what scores.csv holds."""
    from weakspot.attacks import stored
    from weakspot.audit.store.run import write_scores
    from weakspot.audit.work.shard_images import write_pngs
    from weakspot.classifier import evaluating, predict
    from weakspot.report.figures import overview

    with evaluating(classifier):
        adversarial_class = predict(classifier, result.adversarial).argmax(1).tolist()
    scores = result.table
    scores.insert(0, "image", aim.names)
    scores.insert(2, "before", [classifier.class_name(label) for label in result.labels.tolist()])
    scores.insert(3, "after", [classifier.class_name(label) for label in adversarial_class])
    files = write_pngs(stored(result.adversarial, result.clean, spent)[0], aim.names, out / "adversarial")
    write_pngs(result.clean, aim.names, out / "clean")
    scores["png"] = [f"adversarial/{file}" for file in files]
    captions = [
        f"{row['image']}: {row['before']} → {row['after']}{'' if fooled else ' (failed)'}"
        for (_, row), fooled in zip(scores.iterrows(), result.fooled.tolist(), strict=True)
    ]
    overview(result, captions, out / "overview.png")
    result.save(out / "pairs.safetensors")
    write_scores(scores, {**about, "images": list(aim.names)}, out)
    return scores


def _everything() -> list[dict[str, str]]:
    from weakspot.attacks import available_attacks, find_attack
    from weakspot.attacks.libraries import LIBRARIES, PACKAGES, installed
    from weakspot.budgets.parse import MAKERS
    from weakspot.regions.spec import NAMES

    rows = []
    for name, summary in available_attacks().items():
        try:
            own = ", ".join(find_attack(name).parameters)
        except ValueError:  # it cannot be loaded, as its summary says
            own = ""
        rows.append({"kind": "attack", "name": name, "what": summary, "--set": own})
    foreign = installed()
    for library in LIBRARIES:
        known = [name.partition(":")[2] for name in foreign if name.startswith(f"{library}:")]
        what = ", ".join(known) or f"not installed; pip install {PACKAGES[library]}"
        rows.append(
            {"kind": "attack", "name": f"{library}:CLASS", "what": what, "--set": "as the class has them"}
        )
    rows += [
        {"kind": "budget", "name": f"{kind}:AMOUNT", "what": BUDGETS[kind], "--set": ""} for kind in MAKERS
    ]
    rows += [{"kind": "region", "name": kind, "what": REGIONS[kind], "--set": ""} for kind in NAMES]
    rows.append(
        {"kind": "region", "name": "PICTURE", "what": "the white part of a mask picture", "--set": ""}
    )
    return rows


BUDGETS = {
    "linf": "largest change of any channel of any pixel, as in linf:4/255",
    "l2": "Euclidean length of the whole change, as in l2:1.5",
    "l1": "sum of all absolute changes, as in l1:20",
    "ssim": "structural similarity lost on the mean over patches (ssim_budget_spent), as in ssim:0.01",
    "ssim-local": "structural similarity lost in every patch (ssim_local_budget_spent), as in ssim-local:0.05",
}
REGIONS = {
    "none": "anywhere",
    "cam": "where the model gathers most evidence for the label, the share --fraction of the image",
    "background": "outside the object (threshold on gray pictures, GrabCut on color)",
    "border": "a frame, 8 pixels wide or border:WIDTH",
    "support": "most evidence for label or target, each the share --fraction of the image; needs --target",
}
