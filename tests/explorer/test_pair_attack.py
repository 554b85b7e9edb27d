"""An attack inside a mask beside its control: results, steps, stop, and what is said about them."""

from __future__ import annotations

import base64
import threading

import pytest
import torch
from torch import Tensor, nn

from tests.explorer.benches import (
    SIZE,
    Events,
    filled_bench,
    network,
    photographs,
    picture_of,
    png,
    square,
    wait_for,
)
from tests.networks import untouched
from weakspot import attacks
from weakspot.attacks.context import Problem
from weakspot.attacks.observers import Observation
from weakspot.budgets import Linf
from weakspot.classifier import Classifier
from weakspot.explorer.attack_progress import NORMS, Progress
from weakspot.explorer.bench import Bench
from weakspot.explorer.desk import Desk
from weakspot.explorer.messages import Message, read_mask
from weakspot.explorer.pair_attack import SideOutcome, outcome_sentence
from weakspot.explorer.place_masks import control_of


def run(desk: Desk, **body: object) -> Message:
    events = Events(desk, "attack", {"image": 0, **body})
    last = events.last()
    assert last["event"] == "done", last
    return last


def side(event: Message, name: str) -> Message:
    told = event[name]
    assert isinstance(told, dict)
    return told


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd", {"steps": 4, "restarts": 2}),
        ("fmn", {"steps": 10}),
        ("few_pixel", {"population": 8, "generations": 2}),
    ],
)
def test_each_side_is_what_the_attack_gives_alone(desk: Desk, name: str, options: dict[str, int]) -> None:
    mask, exhibit = square(), desk.bench.exhibit(0)
    budget = {"budget": "linf:16/255"} if name == "pgd" else {}
    last = run(desk, mask=png(mask), attack=name, options=options, seed=5, **budget)
    control = control_of(mask, 5)
    assert control is not None
    pairs = {"attack": (mask, exhibit.pair), "control": (control, exhibit.control)}
    for key, (region, pair) in pairs.items():
        arguments = {"budget": Linf(16 / 255)} if budget else {}
        alone = attacks.find_attack(name)(
            desk.bench.classifier,
            exhibit.pixels,
            exhibit.label_tensor,
            region=region,
            seed=5,
            **arguments,
            **options,
        )
        assert pair is not None
        assert torch.equal(pair.adversarial, alone.adversarial)
        assert side(last, key)["success"] == bool(alone.success[0])
        assert side(last, key)["pixels"] == int((alone.perturbation != 0).any(1).sum())
        size = picture_of(side(last, key)["png"]).size
        assert size == SIZE[::-1]


def test_steps_are_told_for_both_sides_and_the_best_never_rises(desk: Desk) -> None:
    body: Message = {"image": 0, "mask": png(square()), "options": {"steps": 12}, "budget": "linf:8/255"}
    events = Events(desk, "attack", body)
    last = events.last()
    for name in ("attack", "control"):
        steps = [event for event in events.named("step") if event["side"] == name]
        margins = [margin for event in steps for margin in event["margins"]]  # type: ignore[attr-defined]
        assert len(margins) == 13  # each step, and the last point
        best = [event["best"] for event in steps]
        assert best == sorted(best, reverse=True)  # type: ignore[type-var]
        assert best[-1] == min(margins)
        # The image that the attack returns is the best one that was seen.
        assert side(last, name)["margin"] == pytest.approx(best[-1], abs=1e-4)


def test_the_whole_image_has_no_control(desk: Desk) -> None:
    for mask in (None, png(torch.ones(1, 1, *SIZE, dtype=torch.bool))):
        last = run(desk, mask=mask, options={"steps": 2})
        assert last["control"] is None
        assert "equal area" not in str(last["sentence"])
    events = Events(desk, "attack", {"image": 0, "options": {"steps": 1}})
    events.last()
    assert "no other place" in str(events.named("start")[0]["remark"])


def test_a_stopped_attack_ends_within_one_evaluation_and_keeps_the_best_so_far(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations: list[int] = []
    original, subscribed = Problem.loss_and_gradient, threading.Event()

    def counted(problem: Problem, *arguments: object, **named: object) -> object:
        evaluations.append(1)
        if len(evaluations) == 20:
            assert subscribed.wait(60)
            events.task.stop.set()
        return original(problem, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Problem, "loss_and_gradient", counted)
    events = Events(
        desk,
        "attack",
        {"image": 0, "mask": png(square()), "options": {"steps": 1_000_000}, "budget": "linf:16/255"},
    )
    subscribed.set()
    last = events.last()
    assert last["stopped"] is True
    assert len(evaluations) == 20
    assert str(last["sentence"]).startswith("Stopped early.")
    exhibit = desk.bench.exhibit(0)
    for name, pair in (("attack", exhibit.pair), ("control", exhibit.control)):
        steps = [event for event in events.named("step") if event["side"] == name]
        assert pair is not None
        assert side(last, name)["margin"] == pytest.approx(steps[-1]["best"], abs=1e-4)
        assert float(pair.perturbation.abs().max()) <= 16 / 255 + 1e-6
        outside = ~(square() if name == "attack" else control_of(square(), 0))  # type: ignore[operator]
        assert torch.equal(pair.adversarial.where(outside, 0), pair.clean.where(outside, 0))
    # Afterward the desk works as before.
    assert run(desk, options={"steps": 2})["stopped"] is False


def test_probes_are_answered_while_an_attack_runs(desk: Desk) -> None:
    events = Events(desk, "attack", {"image": 0, "options": {"steps": 1_000_000}})
    wait_for(lambda: bool(events.named("step")))
    answers = [desk.ask("probe", {"image": 1, "y": y, "x": 3, "size": 3}).result(60) for y in range(5)]
    assert all("margin" in answer for answer in answers)
    assert "pixels" in desk.ask("area", {"image": 0, "mask": png(square())}).result(60)
    assert not events.task.result.done()
    events.task.stop.set()
    events.last()


def test_a_stopped_search_for_the_smallest_change_keeps_the_smallest_that_fools(desk: Desk) -> None:
    events = Events(desk, "attack", {"image": 0, "attack": "fmn", "options": {"steps": 100_000}})
    wait_for(lambda: any(float(str(event["best"])) < 0 for event in events.named("step")))
    events.task.stop.set()
    last = events.last()
    assert side(last, "attack")["success"] is True
    pair = desk.bench.exhibit(0).pair
    assert pair is not None
    assert 0 < float(pair.perturbation.abs().max()) < 1


def test_the_smallest_of_all_images_that_fool_is_kept() -> None:
    progress = Progress(lambda _: None, lambda: None, torch.zeros(1, 2, 2), NORMS["linf"], 1)
    images = torch.linspace(1, 0.05, 20)[:, None, None, None].expand(20, 1, 2, 2)
    progress(Observation(torch.zeros(20, dtype=torch.long), torch.full((20,), -1.0), images.__getitem__))
    assert torch.equal(progress.best[0], images[19])


class Corner(nn.Module):
    """Looks at the 6 x 6 pixels in the upper left corner and at nothing else."""

    def forward(self, images: Tensor) -> Tensor:
        light = images[:, :, :6, :6].mean((1, 2, 3))
        return torch.stack([light - 0.5, 0.5 - light], 1) * 20


class Constant(nn.Module):
    """A network that nothing can change."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None] * torch.zeros(2) + torch.tensor([3.0, 0.0])


def bench_of(module: nn.Module) -> Bench:
    bench = Bench(Classifier.wrap(module.eval(), input_size=SIZE))
    bench.add(torch.full((1, 3, *SIZE), 0.51), ["flat"])
    return bench


def test_a_planted_weak_place_is_found_and_its_control_is_not() -> None:
    desk = Desk(bench_of(Corner()))
    try:
        corner = square(0, 0, 6)
        last = run(desk, mask=png(corner), options={"steps": 5}, budget="linf:8/255")
    finally:
        desk.close()
    assert side(last, "attack")["success"] is True
    assert side(last, "control")["success"] is False
    assert "Only the mask was enough; one other place is no test." in str(last["sentence"])


def test_a_network_that_nothing_changes_is_not_accused() -> None:
    desk = Desk(bench_of(Constant()))
    try:
        last = run(desk, mask=png(square()), options={"steps": 3}, budget="linf:64/255")
    finally:
        desk.close()
    assert side(last, "attack")["success"] is side(last, "control")["success"] is False
    none = "At neither place was a change found that is enough; this does not mean that none exists."
    assert str(last["sentence"]).endswith(none)
    # With zero gradients, that nothing was found says nothing: the person must be told.
    assert "Caution: the gradient of Constant is zero everywhere" in str(last["sentence"])


def test_a_misclassified_image_is_no_success_of_the_mask() -> None:
    bench = Bench(network())
    images = photographs()
    wrong = (bench.classifier(images).argmax(1) + 1) % 4
    bench.add(images, ["a", "b"], wrong)
    desk = Desk(bench)
    try:
        last = run(desk, mask=png(square()), options={"steps": 2})
    finally:
        desk.close()
    assert (
        last["sentence"] == "The image is misclassified without an attack, so that no place needs to change."
    )


def test_a_target_is_needed_unless_the_image_is_it_already(desk: Desk) -> None:
    predicted = int(desk.bench.exhibit(0).logits.argmax())
    target = (predicted + 1) % 4
    told = str(
        run(desk, mask=png(square()), options={"steps": 1}, budget="linf:1/255", target=target)["sentence"]
    )
    assert f"class of {target}" in told
    assert "without an attack" not in told
    desk.bench.exhibit(0).label = (predicted + 2) % 4
    told = str(run(desk, options={"steps": 1}, target=predicted)["sentence"])
    assert told.startswith(f"The image is classified as class of {predicted} without an attack")
    told = str(run(desk, options={"steps": 1}, target=target)["sentence"])
    assert "without an attack" not in told


def test_a_session_leaves_the_model_as_it_was() -> None:
    bench = filled_bench()
    with untouched(bench.classifier, *(exhibit.pixels for exhibit in bench.exhibits)):
        desk = Desk(bench)
        try:
            run(desk, mask=png(square()), options={"steps": 3}, budget="linf:16/255")
            for name, body in (
                ("probe", {"image": 0, "y": 3, "x": 3}),
                ("mask", {"image": 0, "kind": "cam"}),
                ("undo_place", {"image": 0, "mask": png(square(side=3))}),
                ("layers", {"image": 0}),
                ("provable", {"image": 0}),
            ):
                assert "state" in desk.ask(name, body).result(60)
            for job, body in (
                ("explain", {"image": 0, "analysis": "ssim"}),
                ("certify", {"image": 0, "mask": png(square(side=2))}),
            ):
                assert Events(desk, job, body).last()["event"] == "done"
            events = Events(desk, "attack", {"image": 1, "options": {"steps": 100_000}})
            wait_for(lambda: bool(events.named("step")))
            events.task.stop.set()
            events.last()
        finally:
            desk.close()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"attack": "pdg"}, "attack must be one of"),
        ({"attack": "foolbox:LinfPGD"}, "attack must be one of"),
        ({"budget": "linf:8"}, "eps must be between 0 and 1"),
        (
            {"attack": "few_pixel", "budget": "linf:4/255"},
            "few_pixel takes no budget",
        ),
        ({"attack": "weak_spots", "mask": png(square())}, "weak_spots takes no mask"),
        ({"options": {"stepz": 3}}, "options of pgd must be one of"),
        ({"options": {"steps": 0}}, "steps must be an integer of at least 1"),
        ({"attack": "few_pixel", "options": {"population": 10**12}}, "population must be between"),
        ({"target": 99}, "target must be an integer between 0 and 3"),
        (
            {"mask": png(square(size=(9, 9)))},
            "mask must be 24 x 20 (height x width) like the image, got 9 x 9",
        ),
        (
            {"mask": png(torch.zeros(1, 1, *SIZE, dtype=torch.bool))},
            "mask must have at least one pixel, got none",
        ),
        ({"image": 7}, "image must be between 0 and 1, got 7"),
        ({"seed": -1}, "seed must be an integer between 0 and"),
    ],
)
def test_a_request_that_cannot_be_done_is_told_in_a_sentence(
    desk: Desk, body: Message, sentence: str
) -> None:
    events = Events(desk, "attack", {"image": 0, **body})
    last = events.last()
    assert last["event"] == "error"
    assert sentence in str(last["error"])
    assert desk.bench.exhibit(0).pair is None


def test_the_label_is_no_target(desk: Desk) -> None:
    label = desk.bench.exhibit(0).label
    assert "another class than the label" in str(
        Events(desk, "attack", {"image": 0, "target": label}).last()["error"]
    )


def outcome(*, success: bool, size: float | None = None, eight: bool = True) -> SideOutcome:
    return SideOutcome(success, eight, "lynx", -1.0 if success else 2.0, size)


def said(
    mask: SideOutcome, control: SideOutcome | None, *, correct: bool = True, stopped: bool = False
) -> str:
    needless = "" if correct else "misclassified"
    return outcome_sentence(mask, control, area=0.1, needless=needless, stopped=stopped)


def test_places_that_share_much_are_not_compared(desk: Desk) -> None:
    for mask, shared in ((~square(side=4), True), (square(side=4), False)):
        sentence = str(run(desk, mask=png(mask), options={"steps": 3}, budget="linf:64/255")["sentence"])
        assert ("so comparing them says little" in sentence) == shared
        assert ("was enough" in sentence) != shared


def test_no_sentence_claims_more_than_the_pair_shows() -> None:
    yes, no = outcome(success=True), outcome(success=False)
    assert "nothing special" in said(yes, yes)
    assert "Only the mask" in said(yes, no)
    assert "Only the mask" not in said(no, yes)
    assert "does not mean that none exists" in said(no, no)
    assert "does not mean that none exists" in said(no, None)
    assert "nothing special" not in said(yes, None)
    assert "not once rounded" in said(outcome(success=True, eight=False), no)
    missed = SideOutcome(False, False, "lynx", -1.0, target="toaster")
    assert "toaster not reached, lynx" in said(missed, missed)
    assert "not fooled" not in said(missed, missed)  # it may be misclassified, only not as the target
    small, large = outcome(success=True, size=2 / 255), outcome(success=True, size=9 / 255)
    assert "The mask needed less" in said(small, large)
    assert "The other place needed less" in said(large, small)
    assert "2/255" in said(small, large)
    for mask in (yes, no):
        assert said(mask, no, stopped=True).startswith("Stopped early.")
        assert "fooled" not in said(mask, yes, correct=False)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_a_mask_comes_back_bit_for_bit(desk: Desk, mode: str) -> None:
    mask = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(3)) < 0.3
    desk.ask("area", {"image": 0, "mask": png(mask, mode)}).result(60)
    assert desk.bench.brushed is not None
    assert torch.equal(desk.bench.brushed, mask)
    events = Events(desk, "attack", {"image": 0, "mask": png(mask, mode), "options": {"steps": 1}})
    events.last()
    kept = desk.bench.exhibit(0).masks
    assert torch.equal(kept[0], mask)
    control = desk.ask("area", {"image": 0, "mask": png(mask)}).result(60)["control"]
    assert picture_of(control).mode == "1"
    returned = read_mask(base64.b64decode(str(control)), SIZE)
    expected = control_of(mask, 0)
    assert expected is not None
    assert torch.equal(returned, expected)
    assert int(returned.sum()) == int(mask.sum())
