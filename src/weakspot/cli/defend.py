"""`weakspot defend`: what a defense is worth against attackers who know it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import Tensor, nn

from weakspot._checks import NotFiniteError, check_fraction
from weakspot._interrupts import INTERRUPTED
from weakspot._io.files import write_atomic
from weakspot.attacks.eight_bit import rounded, whole_levels
from weakspot.budgets import Budget, read_budget
from weakspot.classifier import Classifier, check_images, predict
from weakspot.cli.app import USAGE, Failure, command, note
from weakspot.cli.defense_choice import find_defense
from weakspot.cli.labeled_images import distinct_rows, find_labels
from weakspot.cli.options import (
    ATTACK,
    QUICK_IMAGES,
    QUICK_STEPS,
    BudgetOption,
    EveryOption,
    FractionOption,
    ImagesArgument,
    LabelsOption,
    LimitOption,
    ModelOptions,
    OutputOptions,
    SamplesOption,
    SeedOption,
    SetOption,
    StepsOption,
    flag,
    option,
    refuse,
)
from weakspot.cli.output import MOST_ROWS, add_row, json_rows, make_table, print_table, print_text
from weakspot.cli.session import (
    Session,
    check_output,
    check_sources,
    draw_rows,
    load_classifier,
    open_session,
    shorten_paths,
)
from weakspot.defenses import evaluate_defense, oracle_neutralized, verdict
from weakspot.defenses.evaluation import check_network
from weakspot.defenses.randomized import is_random
from weakspot.defenses.verdicts import AttackRow, Verdict, unfinished
from weakspot.statistics.number_format import counted, percent

if TYPE_CHECKING:
    import pandas as pd
FILES = ("defense.csv", "defense.json", "defense.png", "run.json")
QUICK = {"limit": QUICK_IMAGES, "steps": QUICK_STEPS, "queries": 500}
QUICK_SUMMARY = "At most {limit} images, {steps} steps and {queries} queries".format(**QUICK)


@command(
    "weakspot defend photos/ --defense neutralize",
    "weakspot defend photos/ --set fraction=0.1 --set fill=blur --budget linf:2/255 --labels folders",
    "weakspot defend photos/ --set randomness=0.5 --draws 10",
    "weakspot defend photos/ --defense mask_units --set layer=_blocks.5 --set units=3,17 --labels labels.csv",
    "weakspot defend photos/ --defense my_package.defenses:jpeg --set quality=75 --limit 100",
)
def defend(
    context: typer.Context,
    network: ModelOptions,
    output: OutputOptions,
    images: ImagesArgument = None,
    samples: SamplesOption = False,
    labels: LabelsOption = None,
    limit: LimitOption = None,
    defense: Annotated[
        str,
        option(
            "--defense -D NAME",
            "neutralize, mask_units, or package.module:factory, a function that takes the undefended model "
            "(images in [0, 1] to logits) and returns the defended one.",
        ),
    ] = "neutralize",
    settings: SetOption = None,
    budget: BudgetOption = "linf:4/255",
    steps: StepsOption = 30,
    fraction: FractionOption = 0.3,
    draws: Annotated[
        int, option("N", "Draws of a random defense that attacks average over.", least=1, panel=ATTACK)
    ] = 4,
    queries: Annotated[
        int,
        option(
            "N",
            "Maximum queries of the square search; it starts with 500 and doubles them while they help.",
            least=1,
            panel=ATTACK,
        ),
    ] = 4000,
    substitute: Annotated[
        str | None, option("MODEL", "Another model, for one more transferred attack.", panel=ATTACK)
    ] = None,
    oracle: Annotated[
        bool,
        flag(
            "--oracle",
            "With neutralize: add a row with the region taken from the clean image, which no real defender has.",
            panel=ATTACK,
        ),
    ] = False,
    thorough: Annotated[
        bool, flag("--thorough", "Add the ensemble of attacks (slow).", panel=ATTACK)
    ] = False,
    quick: Annotated[
        bool,
        flag("--quick", f"{QUICK_SUMMARY}: too few to say that a defense protects."),
    ] = False,
    seed: SeedOption = 0,
    every: EveryOption = False,
    out: Annotated[Path, option("FOLDER", f"Folder for {', '.join(FILES)}.")] = Path("weakspot-defend"),
) -> None:
    """Evaluate a defense against attackers who know it.

    Prints a verdict (protects, no protection, or cannot be judged) and a table: the accuracy of the undefended and of
    the defended model under the same attacks, each tried on the images that withstood the attacks before it.

    --set takes fraction, fill, randomness and seed of neutralize, and layer and units of mask_units.
    """
    sources = list(images or [])
    check_sources(sources, samples=samples)
    check_output(out, [source for source in sources if source.is_dir()], files=["defense.png"])
    if oracle and defense != "neutralize":
        raise Failure(f"--oracle needs --defense neutralize, got {defense}")
    if quick:
        refuse(context, list(QUICK), "with --quick, which sets its own (leave out one or the other)")
        limit, steps, queries = QUICK.values()
    asked = read_budget(budget)
    check_fraction(fraction)
    with open_session(context, network, output, out, FILES) as session:
        spent = _whole_levels(asked)
        classifier = session.classifier
        defended = find_defense(defense, settings, classifier)
        other = None if substitute is None else _load_substitute(session, substitute)
        read = session.read_images(sources, samples=samples)
        # As they are attacked, so that predictions that serve as labels are of the same images.
        read = replace(read, pixels=rounded(read.pixels))
        # Before --limit, so that a table must list every image whatever the limit.
        labeled = find_labels(labels, session, read)
        labeled = labeled.subset(distinct_rows(labeled.images))
        random = _is_random(classifier, defended, labeled.images.pixels, f"--defense {defense}", seed)
        if not random:
            refuse(context, ["draws"], f"with {defense}, which is not random")
        read, truth, _, where = labeled.subset(draw_rows(len(labeled.labels), limit, seed))
        session.make_folder()

        def write(table: pd.DataFrame, result: Verdict) -> dict[str, object]:
            about: dict[str, object] = {
                "defense": ", ".join([defense, *(settings or [])]),
                "status": result.status,
                "verdict": result.sentence,
                "attacks": f"{spent}, {counted(steps, 'step')}"
                + (f" (two thirds on the random defense, on {counted(draws, 'draw')})" if random else "")
                + f", at most {counted(queries, 'query')}, region of importance {percent(fraction)}",
                "substitute": substitute or "none",
                "labels": where,
                **session.provenance(seed),
                "images": read.paths if samples else shorten_paths(read.paths),
            }
            document = {
                **{key: about[key] for key in ("status", "verdict", "defense", "labels")},
                "images": len(truth),
                "attacks": json_rows(table),
            }
            title = f"{classifier.name}, {about['defense']}, {counted(len(truth))}, {spent}"
            _write(out, table, document, about, title=f"{result.sentence} {title}")
            return document

        finished: list[pd.DataFrame] = []

        def keep(table: pd.DataFrame) -> None:
            finished.append(table)
            write(table, unfinished(table))

        try:
            table = evaluate_defense(
                classifier, defended, read.pixels, truth, budget=spent, steps=steps, fraction=fraction, draws=draws,
                queries=queries, substitute=other, thorough=thorough, seed=seed,
                oracle=_oracle(classifier, defended) if oracle else None,
                progress=session.display.step("attacking", total=len(truth), counted=False),
                on_attack=keep,
            )  # fmt: skip
        except (KeyboardInterrupt, NotFiniteError) as error:
            if not finished:
                raise
            # Again, because it may have been the writing that was interrupted.
            write(finished[-1], unfinished(finished[-1]))
            raise _stopped(error, out, finished[-1]) from None
        session.display.step("writing")
        document = write(table, result := verdict(table))

    def show() -> None:
        _print(table, result.sentence, where, _meanings(substitute, table), every=every)
        print_text(f"\n{counted(len(truth))}{session.ending()}", style="dim")
        if quick:
            print_text(f"--quick: {QUICK_SUMMARY}: too few to say that a defense protects.")
        print_text(f"\nWritten to {out.resolve()} (look at defense.png)")

    session.report(lambda: {**document, "skipped": session.skipped, "folder": str(out.resolve())}, show)


def _stopped(error: BaseException, out: Path, table: pd.DataFrame) -> Failure:
    """What an interrupt, or a model that returned NaN, left."""
    kept = f"{out / 'defense.csv'} holds the attacks that had finished on all images, and no verdict"
    reason, code = ("interrupted", INTERRUPTED) if isinstance(error, KeyboardInterrupt) else (error, USAGE)
    return Failure(f"{reason}; {kept}: {', '.join(table['attack'])}", code)


def _is_random(classifier: Classifier, defended: nn.Module, pixels: Tensor, name: str, seed: int) -> bool:
    """Whether the defense is random.

    Raises:
        ValueError: if the defense does not take the images.
    """
    images = check_images(pixels, classifier)
    check_network(name, defended, images[:2], predict(classifier, images[:1]).shape[1])
    return is_random(defended, images, seed=seed)


def _whole_levels(budget: Budget) -> Budget:
    """The budget that is spent on 8-bit images, with a note if it is smaller."""
    spent = whole_levels(budget)
    if str(spent) != str(budget):
        note(f"attacked images are rounded to 8 bits, so {budget} is cut to {spent}")
    return spent


def _load_substitute(session: Session, model: str) -> Classifier:
    """The model of --substitute, with weights and normalization of its own, for images of the same size."""
    size = "x".join(map(str, session.classifier.input_size))
    options = ModelOptions(model, size=size, device=session.network.device)
    return load_classifier(
        options, remedy="let it return weakspot.Classifier.wrap(network, mean=..., std=...)"
    )


def _oracle(classifier: Classifier, defended: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The same defense with the region of the clean image."""
    own = {name: getattr(defended.network, name) for name in ("fraction", "fill")}
    return partial(oracle_neutralized, classifier, **own)


def _write(
    out: Path, table: pd.DataFrame, document: Mapping[str, object], about: Mapping[str, object], title: str
) -> None:
    """Write all files, run.json last."""
    from weakspot.audit.store.run import write_scores
    from weakspot.report.figures import accuracy_figure

    text = json.dumps(document, indent=2) + "\n"
    write_atomic(out / "defense.json", lambda draft: draft.write_text(text, "utf-8"))
    figure = accuracy_figure(table, title)
    write_atomic(out / "defense.png", lambda draft: figure.savefig(draft, dpi=120, format="png"))
    write_scores(table, about, out, name="defense.csv")


def _meanings(substitute: str | None, table: pd.DataFrame) -> dict[str, str]:
    """What each row of the table is."""
    own = "PGD with the defended model's gradients"
    inside = "PGD with the gradients of the network inside the defended model"
    measured = table.set_index("attack")["agreement"].dropna()
    if measured.empty:  # no image was left to measure with
        inside += ", if it calls one"
    elif AttackRow.STRAIGHT not in measured:
        inside = f"{own} from other starts, because no network was found inside it"
    meanings = {
        AttackRow.CLEAN: "no attack",
        AttackRow.TRANSFERRED: "PGD on the undefended model (the naive evaluation)",
        AttackRow.SUBSTITUTE: f"momentum iterations on {substitute}",
        AttackRow.OWN: own,
        AttackRow.STRAIGHT: inside,
        AttackRow.UNDEFENDED_GRADIENTS: "PGD with the gradients of the undefended model",
        AttackRow.REGION: f"{own}, in the region of importance",
        AttackRow.ENSEMBLE: "Auto-PGD on two losses, targeted, square search",
        AttackRow.ORACLE: "the transferred attack alone; the region is taken from the clean image, which no real "
        "defender has; not part of the verdict",
    }
    families = {
        AttackRow.DRAWS: f"{own}, averaged over more draws",
        AttackRow.QUERIES: "random squares, without gradients",
    }
    for name in table["attack"]:
        for pattern, meaning in families.items():
            if name.startswith(pattern.partition("{")[0]):
                meanings.setdefault(name, meaning)
    return {name: meanings[name] for name in table["attack"]}


def _print(
    table: pd.DataFrame, sentence: str, where: str, meanings: Mapping[str, str], *, every: bool
) -> None:
    print_text(f"{sentence}\n", style="bold")
    headings = ("accuracy after", "undefended", "95%", "defended", "95%")
    shown = make_table(headings, fold=(), right=("undefended", "defended"))
    rows, idle = [row for _, row in table.iterrows()], 0
    if not every and len(rows) > MOST_ROWS:
        rows = _decisive(rows)
        idle = len(table) - len(rows)
    for row in rows:
        cells = [
            cell
            for side in ("undefended", "defended")
            for cell in (
                percent(row[side]),
                f"{percent(row[f'{side}_low'])}-{percent(row[f'{side}_high'])}",
            )
        ]
        add_row(shown, str(row["attack"]), *cells)
    print_table(shown, whole=every)
    if idle:
        attacks = counted(idle, "attack")
        print_text(f"... and {attacks} that fooled no further image (show them with --all)", style="dim")
    lines = [f"{row['attack']}: {meanings[str(row['attack'])]}" for row in rows]
    print_text("\n" + "\n".join(lines), style="dim")
    print_text(
        "\nEach attack is tried on the images that withstood those above it; attacked images are rounded to 8 bits."
    )
    print_text(f"Labels: {where}.")
    if where.startswith("the model's"):
        print_text(
            "So the undefended model's clean accuracy is 100% by definition; --labels shows what a defense costs."
        )


def _decisive(rows: Sequence[pd.Series]) -> list[pd.Series]:
    """The first row, the oracle's, and those on which the accuracy of a side is below that of every row before."""
    shown = [rows[0]]
    for row in rows[1:]:
        if row["attack"] == AttackRow.ORACLE or any(
            row[side] < min(other[side] for other in shown) for side in ("undefended", "defended")
        ):
            shown.append(row)
    return shown
