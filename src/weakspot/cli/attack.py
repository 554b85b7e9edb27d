"""`weakspot attack`: attack images, and store the pairs and the cost of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from weakspot.attacks import available_attacks, find_attack, stored
from weakspot.attacks.eight_bit import rounded
from weakspot.attacks.libraries import LIBRARIES, PACKAGES, installed
from weakspot.budgets import Budget
from weakspot.budgets.parse import BUDGETS
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.cli.app import Failure, command
from weakspot.cli.attack_choice import (
    Aim,
    AimOptions,
    AttackChoice,
    Attacked,
    attack_images,
    find_aim,
)
from weakspot.cli.options import (
    ATTACK,
    QUICK_IMAGES,
    EveryOption,
    ImagesArgument,
    LimitOption,
    ModelOptions,
    OutputOptions,
    QuickOption,
    SamplesOption,
    SeedOption,
    flag,
    option,
    refuse,
    refuse_fraction,
    trial_sentence,
)
from weakspot.cli.output import (
    add_row,
    earlier_texts,
    first_rows,
    json_rows,
    make_table,
    outcome_sentence,
    print_choices,
    print_table,
    print_text,
    remove_stale,
    shorten_name,
)
from weakspot.cli.session import check_output, check_sources, draw_rows, open_session
from weakspot.pairs import AttackResult
from weakspot.regions.spec import REGIONS
from weakspot.statistics.number_format import size_of_change

if TYPE_CHECKING:
    import pandas as pd

FILES = ("clean", "adversarial", "overview.png", "scores.csv", "pairs.safetensors", "run.json")


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
    choice: AttackChoice,
    network: ModelOptions,
    output: OutputOptions,
    images: ImagesArgument = None,
    samples: SamplesOption = False,
    batch_size: Annotated[
        str,
        option(
            "N",
            "Images attacked at once, or auto: as many as fit in memory. Does not change results.",
            panel=ATTACK,
        ),
    ] = "auto",
    limit: LimitOption = None,
    quick: QuickOption = False,
    seed: SeedOption = 0,
    every: EveryOption = False,
    out: Annotated[Path, option("FOLDER", f"Folder for {', '.join(FILES)}.")] = Path("weakspot-attack"),
    list_all: Annotated[
        bool, flag("--list", "List attacks, their arguments, budgets and regions, and exit.")
    ] = False,
) -> None:
    """Attack images; write the adversarial images and a table of outcomes, sizes and costs.

    Success is verified by a fresh forward pass on the adversarial images and on their
    PNG files. `weakspot explain --pair OUT/pairs.safetensors` explains the pairs.
    """
    if list_all:
        print_choices(list_choices(), as_json=output.as_json)
        return
    sources = list(images or [])
    check_sources(sources, samples=samples)
    check_output(out, sources, folders=FILES[:2], files=FILES[2:3])
    refuse_fraction(context, [aims.region])
    if quick:
        refuse(context, ["limit", "steps"], "with --quick, which sets its own (leave out one or the other)")
        limit = QUICK_IMAGES
    chosen = choice.choose(context, quick=quick)
    batch = parse_batch_size(batch_size)
    with open_session(context, network, output, out, FILES) as session:
        classifier = session.classifier
        aim, source = find_aim(session, session.read_images(sources, samples=samples), aims)
        # Labels first: folders stand for classes in the order of all of them.
        aim = aim.subset(draw_rows(len(aim.names), limit, seed))
        session.make_folder()

        def write(done: Attacked) -> pd.DataFrame:
            about = {"attack": done.how, "labels": source, **session.provenance(seed)}
            return _write(out, classifier, done.result, done.aim, chosen.budget, about)

        done = attack_images(session, aim, aims, chosen, seed=seed, batch_size=batch, keep=write)
        session.display.step("writing")
        scores = write(done)
    session.report(
        lambda: {
            "scores": json_rows(scores),
            "skipped": session.skipped,
            "folder": str(out.resolve()),
        },
        lambda: _print(
            scores,
            session.ending(),
            out,
            every=every,
            trial=trial_sentence(chosen.settings.get("steps")) if quick else "",
            target=None if done.aim.targets is None else classifier.class_name(int(done.aim.targets[0])),
        ),
    )


def parse_batch_size(text: str) -> int | None:
    """The batch size, None for auto."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise Failure(f"--batch-size must be auto or an integer of at least 1, got {text!r}")
    return int(text)


def _write(
    out: Path,
    classifier: Classifier,
    result: AttackResult,
    aim: Aim,
    spent: Budget | None,
    about: Mapping[str, str],
) -> pd.DataFrame:
    """Write all files; returns the table of scores.csv."""
    from weakspot.audit.store.run import write_pngs, write_scores
    from weakspot.report.figures import contact_sheet

    with evaluating(classifier):
        reached = predict(classifier, result.adversarial).argmax(1).tolist()
    scores, names = result.table, aim.names
    scores.insert(0, "image", list(names))
    scores.insert(2, "correct", aim.correct.tolist())
    scores.insert(3, "before", [classifier.class_name(index) for index in aim.predicted.tolist()])
    scores.insert(4, "after", [classifier.class_name(index) for index in reached])
    images, _ = stored(result.adversarial, result.clean, spent)
    change = (images - rounded(result.clean)).abs().amax(1).flatten(1)
    scores["linf_8bit"], scores["pixels_8bit"] = change.amax(1).tolist(), (change > 0).sum(1).tolist()
    earlier = [png.removeprefix("adversarial/") for png in earlier_texts(out / "scores.csv", "png")]
    files = write_pngs(images, names, out / "adversarial")
    write_pngs(result.clean, names, out / "clean")
    for folder in ("adversarial", "clean"):
        remove_stale(out / folder, earlier, files)
    scores["png"] = [f"adversarial/{file}" for file in files]
    missed = " (not found)" if aim.targets is None else " (not the target)"

    def remark(row: pd.Series) -> str:
        if not row["correct"]:
            return " (misclassified without an attack)"
        return "" if row["success_8bit"] else " (only before rounding)" if row["success"] else missed

    captions = [
        f"{row['image']}: {row['before']} → {row['after']}{remark(row)}" for _, row in scores.iterrows()
    ]
    contact_sheet(result, captions, out / "overview.png")
    result.named(names).save(out / "pairs.safetensors")
    write_scores(scores, {**about, "images": list(names)}, out)
    return scores


def _print(
    scores: pd.DataFrame,
    ending: str,
    out: Path,
    *,
    every: bool,
    trial: str,
    target: str | None,
) -> None:
    """What the attack achieved, a row for each image, and what was left out of a trial."""
    done = "fooled" if target is None else f"changed to {target}"
    print_text(outcome_sentence(scores, scores["correct"].tolist(), done, ending))
    wrong = int((~scores["correct"]).sum())
    if 0 < wrong < len(scores):
        print_text(f"Misclassified without an attack: {wrong} of the {len(scores)} images.")
    spent = [name for name in ("ssim_budget_spent", "ssim_local_budget_spent") if name in scores]
    # A targeted attack that ends in a third class has fooled the network, and is no success.
    flags = {
        "fooled" if target is None else "on target": "success_8bit",
        **({"unrounded": "success"} if every else {}),
    }
    # Without --all, of the files, as "fooled" is.
    numbers = ["linf", "l2", "ssim_windowed", "ssim_windowed_min", *spent] if every else ["linf_8bit"]
    counts = ["pixels", "n_forward", "n_backward"] if every else ["pixels_8bit", "n_forward"]
    texts = ("image", "before → after")
    # In plain words, or, where every column is shown, under the names of scores.csv.
    words = {"linf_8bit": "largest\nchange", "pixels_8bit": "pixels\nchanged", "n_forward": "passes"}
    headings = [*texts, *flags, *(name if every else words[name] for name in (*numbers, *counts))]
    table = make_table(headings, fold=texts)
    rows, more = first_rows([row for _, row in scores.iterrows()], every=every)
    for row in rows:
        right = row["correct"]
        add_row(
            table,
            str(row["image"]) if every else shorten_name(str(row["image"])),
            f"{row['before']} → {row['after']}",
            *(
                Text("no" if right else "wrong before", style="yellow") if not (row[key] and right) else "yes"
                for key in flags.values()
            ),
            *(f"{row[key]:.3g}" if every else size_of_change(row[key], "linf") for key in numbers),
            *(str(row[key]) for key in counts),
        )
    print_text("")
    print_table(table, whole=every)
    if more:
        print_text(f"... and {more} more (show them with --all; all scores are in scores.csv)", style="dim")
    if trial:
        print_text(f"\n{trial}", style="dim")
    print_text(f"\nWritten to {out.resolve()} (look at overview.png; all scores are in scores.csv)")


def list_choices() -> list[dict[str, str]]:
    """Attacks with their arguments, budgets and regions, one row each."""

    def row(kind: str, name: str, summary: str, settable: str = "") -> dict[str, str]:
        return {"kind": kind, "name": name, "what": summary, "--set": settable}

    rows = []
    for name, summary in available_attacks().items():
        try:
            settable = ", ".join(find_attack(name).parameters)
        except ValueError:  # it cannot be loaded, as its summary says
            settable = ""
        rows.append(row("attack", name, summary, settable))
    names = installed()
    for library in LIBRARIES:
        classes = ", ".join(name.partition(":")[2] for name in names if name.startswith(f"{library}:"))
        summary = classes or f"not installed; run: pip install {PACKAGES[library]}"
        rows.append(row("attack", f"{library}:CLASS", summary, "the arguments of the class"))
    rows += [
        row("budget", f"{name}:EPS", f"{kind.summary}, as in {kind.example}")
        for name, kind in BUDGETS.items()
    ]
    rows += [row("region", name, kind.summary) for name, kind in REGIONS.items()]
    return [
        *rows,
        row("region", "FILE", "the white part of a mask image, or what is painted on a transparent ground"),
    ]
