"""`weakspot attack`: attack images, and store the pairs and the cost of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from weakspot.cli.aims import AimOptions, find_aim, find_region
from weakspot.cli.app import Failure, command
from weakspot.cli.options import (
    ATTACK,
    BatchSizeOption,
    BudgetOption,
    ImagesArgument,
    ModelOptions,
    OutputOptions,
    SamplesOption,
    SeedOption,
    SetOption,
    flag,
    given,
    option,
    parse_batch_size,
    parse_settings,
    refuse_fraction,
)
from weakspot.cli.output import json_rows, make_table, print_rows, print_table, print_text
from weakspot.cli.session import check_output, check_sources, open_session

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.budgets import Budget
    from weakspot.classifier import Classifier
    from weakspot.pairs import AttackResult

FILES = ("clean", "adversarial", "overview.png", "scores.csv", "pairs.safetensors", "run.json")
COMMON = {"model", "images", "labels", "budget", "region", "targets", "seed", "batch_size", "progress"}
BUDGETS = {
    "linf": "largest change of any channel of any pixel, as in linf:4/255",
    "l2": "Euclidean norm of the change, as in l2:1.5",
    "l1": "sum of all absolute changes, as in l1:20",
    "ssim": "loss of structural similarity, mean over patches (ssim_budget_spent), as in ssim:0.01",
    "ssim-local": "loss of structural similarity in any patch (ssim_local_budget_spent), as in ssim-local:0.05",
}
REGIONS = {
    "none": "anywhere",
    "cam": "the --fraction of the image with the most evidence for the label",
    "background": "outside the object (a threshold on gray images, GrabCut on color)",
    "border": "a frame of 8 pixels, or border:WIDTH",
    "support": "most evidence for the label or the target, each the --fraction of the image; needs --target",
}


@dataclass(frozen=True)
class Arguments:
    """What an attack takes.

    Attributes:
        attack: its name.
        parameters: by name, without `**options`.
        takes_any: whether it has `**options`.
    """

    attack: str
    parameters: Mapping[str, inspect.Parameter]
    takes_any: bool

    @classmethod
    def of(cls, attack: str, run: Callable[..., AttackResult]) -> Arguments:
        """What the function takes."""
        parameters = inspect.signature(run).parameters
        own = {key: p for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        return cls(attack, own, len(own) < len(parameters))

    @property
    def settable(self) -> list[str]:
        """Names that --set takes."""
        return [key for key in self.parameters if key not in COMMON]

    def find_budget(self, text: str, *, given: bool) -> Budget | None:
        """The budget, or None if the attack takes none, or needs none and none was given."""
        from weakspot.budgets import read_budget

        parameter = self.parameters.get("budget")
        if parameter is None and not self.takes_any:
            if given:
                raise Failure(f"{self.attack} searches for the smallest change and takes no --budget")
            return None
        needed = parameter is not None and parameter.default is not None
        return read_budget(text) if given or needed else None

    def read_settings(self, settings: Sequence[str] | None) -> dict[str, object]:
        """The arguments of --set."""
        from weakspot._checks import unknown_choice

        values = parse_settings(settings)
        for key in values:
            if key in COMMON or (key not in self.settable and not self.takes_any):
                raise Failure(unknown_choice(f"--set of {self.attack}", key, sorted(self.settable)))
        return dict(values)

    def select(self, common: Mapping[str, object]) -> dict[str, object]:
        """The common arguments that the attack takes.

        Raises:
            Failure: if it does not take one that decides the result.
        """
        names = {"region": "--region", "targets": "--target", "batch_size": "--batch-size"}
        for key, name in names.items():
            if common[key] is not None and key not in self.parameters and not self.takes_any:
                raise Failure(f"{self.attack} takes no {name}")
        return {key: value for key, value in common.items() if self.takes_any or key in self.parameters}


@command(
    "weakspot attack cat.jpg dog.jpg",
    "weakspot attack photos/ --budget ssim:0.01 --region background --out runs/ssim",
    "weakspot attack photos/ --attack few_pixel --set method=guided --set count=3",
    "weakspot attack photos/ --attack foolbox:L2CarliniWagnerAttack --region '~cam'",
    "weakspot attack --list",
)
def attack(
    context: typer.Context,
    aims: AimOptions,
    network: ModelOptions,
    output: OutputOptions,
    images: ImagesArgument = None,
    samples: SamplesOption = False,
    name: Annotated[
        str,
        option(
            "--attack -a NAME",
            "A name from --list, or foolbox:CLASS, torchattacks:CLASS, art:CLASS.",
            panel=ATTACK,
        ),
    ] = "pgd",
    budget: BudgetOption = "linf:4/255",
    settings: SetOption = None,
    batch_size: BatchSizeOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[Path, option("FOLDER", f"Folder for {', '.join(FILES)}.")] = Path("weakspot-attack"),
    list_all: Annotated[
        bool, flag("--list", "List attacks, their arguments, budgets and regions, and exit.")
    ] = False,
) -> None:
    """Attack images; write the adversarial images, and what each cost.

    Success is checked by a fresh forward pass, also of the
    PNG files. `weakspot explain --pair OUT/pairs.safetensors` explains the pairs.
    """
    if list_all:
        print_rows(list_choices(), as_json=output.as_json)
        return
    sources = list(images or [])
    check_sources(sources, samples=samples)
    check_output(out, sources, folders=FILES[:2], files=FILES[2:3])
    with open_session(context, network, output, out, FILES) as session:
        from weakspot.attacks import find_attack

        refuse_fraction(context, [aims.region])
        run = find_attack(name)
        takes = Arguments.of(name, run)
        spent = takes.find_budget(budget, given=bool(given(context, ["budget"])))
        own = takes.read_settings(settings)
        batch = parse_batch_size(batch_size)
        aim, source = find_aim(session.classifier, session.read_images(sources, samples=samples), aims)
        session.make_folder()
        mask, where = find_region(aims, session.classifier, aim, seed)
        common = {
            "region": mask,
            "targets": aim.targets,
            "batch_size": batch,
            "seed": seed,
            "progress": session.progress("attacking", 0.1, 0.9),
        }
        own |= takes.select(common) | ({} if spent is None else {"budget": spent})
        result = _run(name, partial(run, session.classifier, aim.images, aim.labels, **own))
        session.advance("writing", 0.92)
        about = {
            "attack": ", ".join([name, *(settings or []), *([str(spent)] if spent else []), where]),
            "labels": source,
            **session.provenance(seed),
        }
        scores = _write(out, session.classifier, result, aim.names, spent, about)
    session.report(
        lambda: {
            "scores": json_rows(scores),
            "skipped": session.skipped,
            "folder": str(out.resolve()),
        },
        lambda: _print(scores, session.ending(), out),
    )


def _run(name: str, run: Callable[[], AttackResult]) -> AttackResult:
    from weakspot.pairs import AttackResult

    try:
        result = run()
    except TypeError as error:
        raise Failure(f"{name} failed with these arguments: {error}") from error
    if not isinstance(result, AttackResult):
        raise Failure(f"{name} must return an AttackResult, got {type(result).__name__}")
    return result


def _write(
    out: Path,
    classifier: Classifier,
    result: AttackResult,
    names: Sequence[str],
    spent: Budget | None,
    about: Mapping[str, str],
) -> pd.DataFrame:
    """Write all files; returns the table of scores.csv."""
    from weakspot.attacks import stored
    from weakspot.audit.store.run import write_scores
    from weakspot.audit.work.shard_images import write_pngs
    from weakspot.classifier import evaluating, predict
    from weakspot.report.figures import overview

    with evaluating(classifier):
        reached = predict(classifier, result.adversarial).argmax(1).tolist()
    scores = result.table
    scores.insert(0, "image", list(names))
    scores.insert(2, "before", [classifier.class_name(label) for label in result.labels.tolist()])
    scores.insert(3, "after", [classifier.class_name(label) for label in reached])
    files = write_pngs(stored(result.adversarial, result.clean, spent)[0], names, out / "adversarial")
    write_pngs(result.clean, names, out / "clean")
    scores["png"] = [f"adversarial/{file}" for file in files]
    captions = [
        f"{row['image']}: {row['before']} → {row['after']}{'' if fooled else ' (failed)'}"
        for (_, row), fooled in zip(scores.iterrows(), result.fooled.tolist(), strict=True)
    ]
    overview(result, captions, out / "overview.png")
    result.save(out / "pairs.safetensors")
    write_scores(scores, {**about, "images": list(names)}, out)
    return scores


def _print(scores: pd.DataFrame, ending: str, out: Path) -> None:
    """A row for each image: classes before and after, distances, and what the attack cost."""
    spent = [name for name in ("ssim_budget_spent", "ssim_local_budget_spent") if name in scores]
    similarities = ["ssim_windowed", "ssim_windowed_min"]
    headings = (
        "image",
        "before → after",
        "fooled",
        "unrounded",
        "linf",
        "l2",
        "pixels",
        *similarities,
        *spent,
    )
    table = make_table([*headings, "n_forward", "n_backward"])
    for _, row in scores.iterrows():
        table.add_row(
            escape(str(row["image"])),
            escape(f"{row['before']} → {row['after']}"),
            *("yes" if row[key] else "[yellow]no[/yellow]" for key in ("success_8bit", "success")),
            *(f"{row[key]:.3g}" for key in ("linf", "l2")),
            str(row["pixels"]),
            *(f"{row[key]:.3f}" for key in similarities),
            *(f"{row[key]:.3g}" for key in spent),
            *(str(row[key]) for key in ("n_forward", "n_backward")),
        )
    print_table(table)
    stored, floats = (int(scores[key].sum()) for key in ("success_8bit", "success"))
    print_text(
        f"\n{stored} of {len(scores)} images fooled as 8-bit files ({floats} before rounding){ending}",
        style="dim",
    )
    print_text(f"\nWritten to {out.resolve()} (look at overview.png)")


def list_choices() -> list[dict[str, str]]:
    """Attacks with their arguments, budgets and regions, one row each."""
    from weakspot.attacks import available_attacks, find_attack
    from weakspot.attacks.libraries import LIBRARIES, PACKAGES, installed
    from weakspot.budgets.parse import MAKERS
    from weakspot.regions.spec import NAMES

    def row(kind: str, name: str, summary: str, settable: str = "") -> dict[str, str]:
        return {"kind": kind, "name": name, "what": summary, "--set": settable}

    rows = []
    for name, summary in available_attacks().items():
        try:
            settable = ", ".join(Arguments.of(name, find_attack(name)).settable)
        except ValueError:  # it cannot be loaded, as its summary says
            settable = ""
        rows.append(row("attack", name, summary, settable))
    names = installed()
    for library in LIBRARIES:
        classes = ", ".join(name.partition(":")[2] for name in names if name.startswith(f"{library}:"))
        summary = classes or f"not installed; run: pip install {PACKAGES[library]}"
        rows.append(row("attack", f"{library}:CLASS", summary, "the arguments of the class"))
    rows += [row("budget", f"{kind}:EPS", BUDGETS[kind]) for kind in MAKERS]
    rows += [row("region", kind, REGIONS[kind]) for kind in NAMES]
    return [*rows, row("region", "FILE", "the white part of a mask image")]
