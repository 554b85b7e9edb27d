"""The sequence of attacks on an undefended and a defended model, each on the images that withstood the earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weakspot._progress import Progress, part
from weakspot.attacks import bim, ensemble
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.eight_bit import fit, on_8bit_images
from weakspot.attacks.gradient import Search, random_start, shrinking_steps
from weakspot.attacks.losses import margin
from weakspot.attacks.square_search import square_search
from weakspot.budgets import Budget, Linf
from weakspot.classifier import Classifier, as_classifier, evaluating, predict
from weakspot.defenses.bpda import agreement, leads_on, straight_through_models
from weakspot.defenses.randomized import DrawnByImage, defender_model, expectation, is_random
from weakspot.defenses.verdicts import (
    MAX_LAST_DOUBLING,
    MIN_AGREEING,
    MIN_GAIN,
    ROUNDING,
    UNDEFENDED,
    AttackRow,
)
from weakspot.regions import cam
from weakspot.statistics import proportion_interval

RESTARTS = 2
FIRST_QUERIES = 500
MOST_DRAWS = 8  # times `Effort.draws`
TRIED = 8  # images that inner networks are looked for with
STREAMS = 10  # of random numbers that each attack has to itself


@dataclass(frozen=True)
class Effort:
    """How hard both models are attacked; `evaluate_defense` describes the fields."""

    budget: Budget
    steps: int
    fraction: float
    draws: int
    queries: int
    thorough: bool
    seed: int


@dataclass
class Side:
    """One of the two models, and which images it still classifies correctly.

    Attributes:
        judged: decides which images are correct.
        attacked: gives the gradients of attacks.
        queried: answers the square search.
        correct: bool (N,), all of them until the first row.
    """

    judged: Classifier
    attacked: Classifier
    queried: Classifier
    correct: Tensor

    @classmethod
    def of(cls, classifier: Classifier, random: bool, effort: Effort, correct: Tensor) -> Side:
        """A random defense is judged on the defender's draw and attacked on the attacker's."""
        if not random:
            return cls(classifier, classifier, classifier, correct)
        judged = defender_model(classifier, seed=effort.seed)
        attacked = expectation(classifier, effort.draws, seed=effort.seed)
        # Draws by the image can be queried until one errs; other draws are new at every query.
        by_image = any(isinstance(module, DrawnByImage) for module in classifier.modules())
        return cls(judged, attacked, judged if by_image else attacked, correct)


class AttackSequence:
    """Attacks in turn on both models, and the table row of each.

    Attributes:
        leads: of attacks on the defended model, by the name of the attack.
        ends: (N, C, H, W) where each gradient attack on the defended model ended, by its name.
        rows: of the table so far.
        transferred: (N, C, H, W) images attacked for the undefended model.
        on_attack: called with the rows after each attack.
        after_transfer: (N,) bool, whether the undefended model withstands them.
        undefended: the first side.
        defended: the second side.
    """

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        images: Tensor,
        labels: Tensor,
        effort: Effort,
        progress: Progress | None,
    ) -> None:
        model, defended = models
        self.images, self.labels = images, labels
        self.effort, self.progress = effort, progress
        # A random model without a defense is judged, and attacked, like a random defense.
        random = is_random(model, images, seed=effort.seed)
        self.random = random if defended is model else is_random(defended, images, seed=effort.seed)
        # Every step on a random defense costs `draws` passes, so it has fewer steps and one restart.
        steps = effort.steps if not self.random else -(-2 * effort.steps // 3)
        self.sizes = shrinking_steps(steps)
        self.restarts = 1 if self.random else RESTARTS
        own, undefended = as_classifier(defended), as_classifier(model)
        everything = torch.ones_like(labels, dtype=torch.bool)
        self.undefended = Side.of(undefended, random, effort, everything)
        self.defended = Side.of(own, self.random, effort, everything)
        self.leads = {AttackRow.OWN: own, AttackRow.UNDEFENDED_GRADIENTS: undefended}
        self.ends: dict[str, Tensor] = {}
        self.rows: list[dict[str, object]] = []
        self.transferred = images
        self.after_transfer = torch.zeros_like(labels, dtype=torch.bool)
        self.done = 0.0
        self.on_attack: Callable[[list[dict[str, object]]], None] = lambda _: None
        self.part = part(self.report, 0, 0.1)

    def run(self, substitute: nn.Module | None) -> None:
        """Run every attack, each on the images that are left."""
        images, labels = self.images, self.labels
        self._judge(AttackRow.CLEAN, images, images)
        everything = torch.arange(len(images), device=images.device)
        transferred = self._pgd(self.undefended, everything, stream=0, early=False)
        self.transferred = fit(transferred, images, self.effort.budget)
        self._judge(AttackRow.TRANSFERRED, self.transferred, self.transferred)
        self.after_transfer = self.undefended.correct
        self.report(0.1)
        if substitute is not None:
            moved = bim(
                on_8bit_images(as_classifier(substitute)), images, labels, budget=self.effort.budget,
                steps=len(self.sizes), momentum=1.0,
            ).adversarial  # fmt: skip
            self._judge(AttackRow.SUBSTITUTE, moved, moved)
        # From here on each attack gets only the images that withstood the attacks before it.
        self._attack_by_gradients(AttackRow.OWN, 1, until=0.2)
        if bool(self.defended.correct.any()):
            self._find_straight_lead()
        self._attack_by_gradients(AttackRow.STRAIGHT, 2, until=0.3)
        self._attack_by_gradients(AttackRow.UNDEFENDED_GRADIENTS, 3, until=0.4)
        left = bool((self.undefended.correct | self.defended.correct).any())
        looking = self.undefended.judged
        region = cam(looking, images, labels, fraction=self.effort.fraction) if left else None
        self._attack_by_gradients(AttackRow.REGION, 4, region=region, until=0.5)
        # Images may withstand by luck or because gradients mislead: more draws, then attacks without gradients.
        self._average_more_draws()
        if self.effort.thorough:
            self._attack(AttackRow.ENSEMBLE, self._ensemble, until=0.6)
        self._add_agreements()
        self._search_by_queries()

    def report(self, fraction: float) -> None:
        """Report the progress of the whole, which never decreases."""
        self.done = max(self.done, fraction)
        if self.progress is not None:
            self.progress(self.done)

    def _agreement(self, lead: Classifier) -> float:
        agreeing = agreement(
            self.leads[AttackRow.OWN],
            lead,
            self.images,
            self.labels,
            budget=self.effort.budget,
            seed=self.effort.seed,
        )
        return float(agreeing.float().mean())

    def _find_straight_lead(self) -> None:
        """Use the outermost inner network whose gradients agree, or else the one whose gradients agree best."""
        with evaluating(self.leads[AttackRow.OWN]) as defended:
            inner = straight_through_models(defended, self.images[:TRIED])
        best = -1.0
        for lead in inner:
            agreeing = self._agreement(lead) if len(inner) > 1 else 1.0
            if agreeing > best:
                best, self.leads[AttackRow.STRAIGHT] = agreeing, lead
            if agreeing >= MIN_AGREEING:
                break

    def _add_agreements(self) -> None:
        """Add agreement to the rows of gradient attacks, if images are left, so that the verdict needs it."""
        (left,) = self.defended.correct.nonzero(as_tuple=True)
        for row in self.rows if len(left) else ():
            # Rows of attacks without gradients have no lead.
            lead = self.leads.get(str(row["attack"]))
            if lead is not None:
                row["agreement"] = self._agreement(lead)
                ends, labels = self.ends[str(row["attack"])][left], self.labels[left]
                budget, seed = self.effort.budget, self.effort.seed
                leading = leads_on(self.leads[AttackRow.OWN], lead, ends, labels, budget=budget, seed=seed)
                row["agreement_at_end"] = float(leading.float().mean())

    def _average_more_draws(self) -> None:
        """Double the draws on a random defense that still gains, until a doubling takes next to nothing."""
        draws, stream = 2 * self.effort.draws, 5
        while self.random and draws <= MOST_DRAWS * self.effort.draws:
            undefended, defended = (
                float(side.correct.float().mean()) for side in (self.undefended, self.defended)
            )
            if defended - undefended <= MIN_GAIN:
                return  # no gain is left that more draws could take
            self.defended.attacked = expectation(self.leads[AttackRow.OWN], draws, seed=self.effort.seed)
            self._attack_by_gradients(AttackRow.DRAWS.format(draws), stream, until=0.5)
            if defended - float(self.defended.correct.float().mean()) <= MAX_LAST_DOUBLING + ROUNDING:
                return
            draws, stream = 2 * draws, stream + 1

    def _search_by_queries(self) -> None:
        """Square search with a growing number of queries, until a doubling takes next to nothing."""
        most = self.effort.queries
        count, stream = min(FIRST_QUERIES, most), 1000
        while True:
            before = int(self.defended.correct.sum())

            # New squares at every doubling (another stream), not the continuation of the shorter search.
            def search(side: Side, rows: Tensor, count: int = count, stream: int = stream) -> Tensor:
                with self._problem(side.queried, rows) as problem, problem.fused_model():
                    return square_search(problem, queries=count, stream=stream, progress=self.part)[0]

            self._attack(AttackRow.QUERIES.format(count), search, until=0.5 + 0.5 * count / most)
            fooled = before - int(self.defended.correct.sum())
            little = fooled <= MAX_LAST_DOUBLING * len(self.images) + ROUNDING
            if (count > FIRST_QUERIES and little) or 2 * count > most:
                return
            count, stream = 2 * count, 2 * stream

    def _attack_by_gradients(
        self, name: str, stream: int, *, region: Tensor | None = None, until: float
    ) -> None:
        """PGD on both sides; on the defended model along the lead of that name, if there is one."""

        def descend(side: Side, rows: Tensor) -> Tensor:
            defended = side is self.defended
            lead = self.leads.get(name) if defended and name != AttackRow.OWN else None
            if lead is not None and self.random:
                lead = expectation(lead, self.effort.draws, seed=self.effort.seed)
            best = self._pgd(side, rows, lead=lead, region=region, stream=stream)
            if defended:
                self.ends[name] = self.images.clone()
                self.ends[name][rows] = best
            return best

        self._attack(name, descend, until=until)

    def _problem(
        self, classifier: Classifier, rows: Tensor, region: Tensor | None = None
    ) -> AbstractContextManager[Problem]:
        """The attack problem of these images, which the classifier sees rounded to 8 bits."""
        region = None if region is None else region[rows]
        options = AttackOptions(self.effort.budget, region, seed=self.effort.seed)
        return attack_context(on_8bit_images(classifier), self.images[rows], self.labels[rows], options)

    def _pgd(
        self,
        side: Side,
        rows: Tensor,
        *,
        stream: int,
        lead: Classifier | None = None,
        region: Tensor | None = None,
        early: bool = True,
    ) -> Tensor:
        """The images of lowest margin that PGD passes.

        With `early`, an image that is fooled leaves the search, unless rounding could undo it: only whole levels of an
        L-infinity budget round to themselves.
        """
        early = early and not self.random and isinstance(self.effort.budget, Linf)
        with self._problem(side.attacked, rows, region) as own:
            # Gradients come from the lead; the side's own logits decide which image is fooled.
            problem = own if lead is None else replace(own, lead=on_8bit_images(lead))
            search = Search(problem, margin, stop_early=early)
            search.warned = True  # gradients of zero are what the agreement reports
            with problem.fused_model():
                for restart in range(self.restarts):
                    start = random_start(problem, STREAMS * stream + restart)
                    search.run(start, self.sizes, part(self.part, restart, restart + 1, self.restarts))
            return search.best

    def _ensemble(self, side: Side, rows: Tensor) -> Tensor:
        return ensemble(
            on_8bit_images(side.attacked),
            self.images[rows],
            self.labels[rows],
            budget=self.effort.budget,
            seed=self.effort.seed,
            progress=self.part,
        ).adversarial

    def _attack(self, name: str, attack: Callable[[Side, Tensor], Tensor], *, until: float) -> None:
        """Attack the images that each side still classifies correctly; `until` is the progress afterward."""
        # Each side gets half of the progress that is left up to `until`.
        attacked, half = [], max(0.0, until - self.done) / 2
        for side in (self.undefended, self.defended):
            start = self.done
            self.part = part(self.report, start, start + half)
            images, rows = self.images.clone(), side.correct.nonzero()[:, 0]
            if len(rows):
                images[rows] = fit(attack(side, rows), self.images[rows], self.effort.budget)
            attacked.append(images)
        self._judge(name, *attacked)
        self.report(until)

    def _judge(self, name: str, *attacked: Tensor) -> None:
        """Judge the images (N, C, H, W) attacked for each side, and add the table row."""
        for side, images in zip((self.undefended, self.defended), attacked, strict=True):
            # An image that an earlier attack fooled stays fooled: the row is the worst case so far.
            correct = side.correct.clone()
            rows = correct.nonzero()[:, 0]
            if len(rows):
                fitted = fit(images[rows], self.images[rows], self.effort.budget)
                correct[rows] = is_correct(side.judged, fitted, self.labels[rows])
            side.correct = correct
        self.rows.append(table_row(name, self.undefended.correct, self.defended.correct))
        self.on_attack(self.rows)


def is_correct(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool, whether the network classifies each image correctly."""
    with evaluating(network) as classifier:
        return predict(classifier, images).argmax(1) == labels


def table_row(name: str, undefended: Tensor, defended: Tensor) -> dict[str, object]:
    """A row of the table from the images (N,) that each model classifies correctly."""
    row: dict[str, object] = {"attack": name}
    for side, correct in ((UNDEFENDED, undefended), ("defended", defended)):
        bounds = proportion_interval(correct.cpu().numpy())
        row |= dict(zip((side, f"{side}_low", f"{side}_high"), bounds, strict=True))
    row["undefended_only"] = int((undefended & ~defended).sum())
    row["defended_only"] = int((defended & ~undefended).sum())
    row["agreement"] = row["agreement_at_end"] = float("nan")
    row["images"] = len(undefended)
    return row
