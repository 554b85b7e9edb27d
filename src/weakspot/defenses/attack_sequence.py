"""The sequence of attacks on an undefended and a defended model, each on the images that withstood those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from weakspot.attacks import bim, ensemble
from weakspot.attacks.context import AttackOptions, Progress, attack_context, part_of
from weakspot.attacks.eight_bit import fit, on_8bit_images
from weakspot.attacks.gradient import Search, random_start, shrinking_steps
from weakspot.attacks.losses import margin
from weakspot.attacks.square_search import square_search
from weakspot.budgets import Budget, Linf
from weakspot.classifier import Classifier, as_classifier, evaluating, predict
from weakspot.defenses.bpda import agreement, leads_on, straight_through_models
from weakspot.defenses.randomized import DrawnByImage, defender_model, expectation, is_random
from weakspot.defenses.verdicts import (
    AGREEING,
    CLEAN,
    DRAWS,
    ENSEMBLE,
    GAIN,
    OWN,
    QUERIES,
    REGION,
    RISING,
    ROUNDING,
    STRAIGHT,
    SUBSTITUTE,
    TRANSFERRED,
    UNDEFENDED,
    UNDEFENDED_GRADIENTS,
)
from weakspot.regions import cam
from weakspot.statistics import proportion_interval

RESTARTS = 2
FIRST_QUERIES = 500
MOST_DRAWS = 8  # times `draws`
FEW = 8  # images that inner networks are looked for with
STREAMS = 10  # of random numbers that each attack has to itself


@dataclass
class Side:
    """One of the two models, and which images it still classifies correctly.

    Attributes:
        judged: decides what is correct.
        attacked: what attacks by gradients are made on.
        queried: what the search without gradients asks.
        standing: bool (N,).
    """

    judged: Classifier
    attacked: Classifier
    queried: Classifier
    standing: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


class AttackSequence:
    """Attacks in turn on both sides, and the row that each leaves behind.

    Attributes:
        leads: on the defended model, by name of their attack.
        ends: (N, C, H, W) where each attack by gradients on the defended model ended.
        rows: of the table so far.
        transferred: (N, C, H, W) images attacked for the undefended model.
        after_transfer: (N,) bool, where the undefended model withstands those.
        sides: undefended, defended.
    """

    def __init__(
        self,
        model: nn.Module,
        defended: nn.Module,
        images: Tensor,
        labels: Tensor,
        budget: Budget,
        steps: int,
        draws: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.images, self.labels, self.budget, self.seed = images, labels, budget, seed
        self.model, self.progress = model, progress
        self.random = defended is not model and is_random(defended, images, seed=seed)
        self.sizes = shrinking_steps(steps if not self.random else -(-2 * steps // 3))
        self.restarts = 1 if self.random else RESTARTS
        undefended, shielded = as_classifier(model), as_classifier(defended)
        self.sides = (_side(undefended, False, draws, seed), _side(shielded, self.random, draws, seed))
        self.draws = draws
        self.leads = {OWN: shielded, UNDEFENDED_GRADIENTS: undefended}
        self.ends: dict[str, Tensor] = {}
        self.rows: list[dict[str, object]] = []
        self.transferred = images
        self.after_transfer = torch.zeros_like(labels, dtype=torch.bool)
        self.done = 0.0
        self.part: Progress = lambda share: self.report(0.1 * share)

    def _agreement(self, lead: Classifier) -> float:
        agree = agreement(self.leads[OWN], lead, self.images, self.labels, budget=self.budget, seed=self.seed)
        return float(agree.float().mean())

    def _find_straight_lead(self) -> None:
        """Of the networks inside, the outermost whose gradients agree, or else the one whose agree best."""
        with evaluating(self.leads[OWN]) as defended:
            inner = straight_through_models(defended, self.images[:FEW])
        best = -1.0
        for lead in inner:
            agree = self._agreement(lead) if len(inner) > 1 else 1.0
            if agree > best:
                best, self.leads[STRAIGHT] = agree, lead
            if agree >= AGREEING:
                break

    def run(self, *, fraction: float, queries: int, substitute: nn.Module | None, thorough: bool) -> None:
        """Every attack, each on what is left."""
        images, labels = self.images, self.labels
        self._stand(CLEAN, [images, images])
        transferred = self._descended(self.sides[0], images, labels, None, None, 0, early=False)
        self.transferred = fit(transferred, images, self.budget)
        self._stand(TRANSFERRED, [self.transferred] * 2)
        self.after_transfer = self.sides[0].standing
        self.report(0.1)
        if substitute is not None:
            moved = bim(
                on_8bit_images(as_classifier(substitute)), images, labels, budget=self.budget,
                steps=len(self.sizes), momentum=1.0,
            ).adversarial  # fmt: skip
            self._stand(SUBSTITUTE, [moved] * 2)
        self._descend(OWN, None, 1, until=0.2)
        if bool(self.sides[1].standing.any()):
            self._find_straight_lead()
        self._descend(STRAIGHT, None, 2, until=0.3)
        self._descend(UNDEFENDED_GRADIENTS, None, 3, until=0.4)
        left = any(bool(side.standing.any()) for side in self.sides)
        self._descend(
            REGION, cam(self.model, images, labels, fraction=fraction) if left else None, 4, until=0.5
        )
        self._average_more()
        if thorough:
            self._attack(ENSEMBLE, self._ensemble, until=0.6)
        self._add_agreements()
        self._search(queries)

    def _add_agreements(self) -> None:
        """To the rows of gradients, where images are left for a verdict to need them."""
        (here,) = self.sides[1].standing.nonzero(as_tuple=True)
        for row in self.rows if len(here) else ():
            lead = self.leads.get(str(row["attack"]))
            if lead is not None:
                row["agreement"] = self._agreement(lead)
                ends = self.ends[str(row["attack"])][here]
                led = leads_on(
                    self.leads[OWN], lead, ends, self.labels[here], budget=self.budget, seed=self.seed
                )
                row["agreement_at_end"] = float(led.float().mean())

    def _average_more(self) -> None:
        """On a random defense that gains so far: twice as many draws, until that takes next to nothing more."""
        draws, number = 2 * self.draws, 5
        while self.random and draws <= MOST_DRAWS * self.draws:
            undefended, defended = (float(side.standing.float().mean()) for side in self.sides)
            if defended - undefended <= GAIN:
                return
            side = self.sides[1]
            side.attacked = expectation(self.leads[OWN], draws, seed=self.seed)
            self._descend(DRAWS.format(draws), None, number, until=0.5)
            if defended - float(side.standing.float().mean()) <= RISING + ROUNDING:
                return
            draws, number = 2 * draws, number + 1

    def _search(self, cap: int) -> None:
        """Square search with a growing number of queries, until a doubling takes next to nothing more."""
        count, stream = min(FIRST_QUERIES, cap), 1000
        while True:
            before = int(self.sides[1].standing.sum())

            def squares(side: Side, here: Tensor, count: int = count, stream: int = stream) -> Tensor:
                network = on_8bit_images(side.queried)
                options = AttackOptions(self.budget, seed=self.seed)
                with (
                    attack_context(network, self.images[here], self.labels[here], options) as problem,
                    problem.fused_model(),
                ):
                    return square_search(problem, queries=count, stream=stream, progress=self.part)[0]

            self._attack(QUERIES.format(count), squares, until=0.5 + 0.5 * count / cap)
            fallen = before - int(self.sides[1].standing.sum())
            if (count > FIRST_QUERIES and fallen <= RISING * len(self.images) + ROUNDING) or 2 * count > cap:
                return
            count, stream = 2 * count, 2 * stream

    def _descend(self, name: str, region: Tensor | None, number: int, *, until: float) -> None:
        def descent(side: Side, here: Tensor) -> Tensor:
            where = None if region is None else region[here]
            defended = side is self.sides[1]
            lead = self.leads.get(name) if defended and name != OWN else None
            if lead is not None and self.random:
                lead = expectation(lead, self.draws, seed=self.seed)
            best = self._descended(side, self.images[here], self.labels[here], lead, where, number)
            if defended:
                self.ends[name] = self.images.clone()
                self.ends[name][here] = best
            return best

        self._attack(name, descent, until=until)

    def _descended(
        self,
        side: Side,
        images: Tensor,
        labels: Tensor,
        lead: Classifier | None,
        region: Tensor | None,
        number: int,
        early: bool = True,
    ) -> Tensor:
        """PGD judged by the side's answers; images leave it at once where what fools cannot change afterward."""
        early = early and not self.random and isinstance(self.budget, Linf)
        network = on_8bit_images(side.attacked)
        options = AttackOptions(self.budget, region, seed=self.seed)
        with attack_context(network, images, labels, options) as own:
            problem = own if lead is None else replace(own, lead=on_8bit_images(lead))
            search = Search(problem, margin, stop_early=early)
            search.warned = True  # gradients of zero are what the agreement reports
            with problem.fused_model():
                for restart in range(self.restarts):
                    start = random_start(problem, STREAMS * number + restart)
                    search.run(start, self.sizes, part_of(self.part, restart, self.restarts))
            return search.best

    def _ensemble(self, side: Side, here: Tensor) -> Tensor:
        network = on_8bit_images(side.attacked)
        return ensemble(
            network,
            self.images[here],
            self.labels[here],
            budget=self.budget,
            seed=self.seed,
            progress=self.part,
        ).adversarial

    def _attack(self, name: str, made: Callable[[Side, Tensor], Tensor], *, until: float) -> None:
        """An attack made for each side, on the images that are still correct there; `until` is the progress then."""
        shown, half = [], max(0.0, until - self.done) / 2
        for side in self.sides:
            start = self.done
            self.part = lambda share, start=start: self.report(start + half * share)  # type: ignore[misc]
            attacked, here = self.images.clone(), side.standing.nonzero()[:, 0]
            if len(here):
                attacked[here] = fit(made(side, here), self.images[here], self.budget)
            shown.append(attacked)
        self._stand(name, shown)
        self.report(until)

    def _stand(self, name: str, shown: Sequence[Tensor]) -> None:
        """Judge what is shown to each side, and add the row."""
        for side, attacked in zip(self.sides, shown, strict=True):
            here = torch.ones_like(self.labels, dtype=torch.bool) if name == CLEAN else side.standing
            left = here.clone()
            rows = here.nonzero()[:, 0]
            if len(rows):
                fitted = fit(attacked[rows], self.images[rows], self.budget)
                left[rows] = correct(side.judged, fitted, self.labels[rows])
            side.standing = left
        row = table_row(name, *(side.standing for side in self.sides))
        self.rows.append(row)

    def report(self, fraction: float) -> None:
        """Progress of the whole, which never goes back."""
        self.done = max(self.done, fraction)
        if self.progress is not None:
            self.progress(self.done)


def _side(classifier: Classifier, random: bool, draws: int, seed: int) -> Side:
    if not random:
        return Side(classifier, classifier, classifier)
    judged, attacked = defender_model(classifier, seed=seed), expectation(classifier, draws, seed=seed)
    # Draws that are a function of the image can be asked for until one errs; others are new at every query.
    by_image = any(isinstance(module, DrawnByImage) for module in classifier.modules())
    return Side(judged, attacked, judged if by_image else attacked)


def correct(network: nn.Module, shown: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool."""
    with evaluating(network) as classifier:
        return predict(classifier, shown).argmax(1) == labels


def table_row(name: str, undefended: Tensor, defended: Tensor) -> dict[str, object]:
    """A row of the table from which images (N,) are correct on either side."""
    row: dict[str, object] = {"attack": name}
    for side, standing in ((UNDEFENDED, undefended), ("defended", defended)):
        bounds = proportion_interval(standing.cpu().numpy())
        row |= dict(zip((side, f"{side}_low", f"{side}_high"), bounds, strict=True))
    row["undefended_only"] = int((undefended & ~defended).sum())
    row["defended_only"] = int((defended & ~undefended).sum())
    row["agreement"] = row["agreement_at_end"] = float("nan")
    row["images"] = len(undefended)
    return row
