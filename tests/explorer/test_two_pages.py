"""Two pages on one picture: what a page asks about its own attack is not answered about that of the other page."""

from __future__ import annotations

import pytest

from tests.explorer.benches import Events, png, square
from weakspot.explorer.desk import SUBSCRIPTIONS, Desk
from weakspot.explorer.messages import Message

REQUESTS: list[tuple[str, Message]] = [
    ("undo_place", {"mask": png(square())}),
    ("layers", {}),
    ("layer", {"layer": "3"}),
    ("unit", {"layer": "3", "unit": 1}),
    ("explain", {"analysis": "ssim"}),
]


def attack(desk: Desk) -> Message:
    return Events(desk, "attack", {"image": 0, "options": {"steps": 2}}).last()


def refusal(desk: Desk, name: str, body: Message) -> str | None:
    """Why a request or a job is refused; None if it is not."""
    if name in SUBSCRIPTIONS:
        error = Events(desk, name, body).last().get("error")
    else:
        error = desk.ask(name, body).exception(60)
    return None if error is None else str(error)


@pytest.mark.parametrize(("name", "body"), REQUESTS)
def test_a_page_is_told_that_another_one_has_attacked_its_picture(
    desk: Desk, name: str, body: Message
) -> None:
    mine: Message = {"image": 0, **body, "pair": attack(desk)["pair"]}
    assert refusal(desk, name, mine) is None
    theirs: Message = {**mine, "pair": attack(desk)["pair"]}
    assert refusal(desk, name, mine) == "another page has attacked this picture since (attack it again)"
    assert refusal(desk, name, theirs) is None
    assert refusal(desk, name, {"image": 0, **body}) is None  # the last pair, whichever it is


def test_a_page_that_opens_a_picture_gets_its_pair_with_the_number(desk: Desk) -> None:
    number = attack(desk)["pair"]
    shown = desk.ask("image", {"image": 0}).result(60)["pair"]
    assert isinstance(shown, dict)
    assert shown["pair"] == number
    assert refusal(desk, "layers", {"image": 0, "pair": "x"}) == (
        f"pair must be an integer between 0 and {2**53}, got 'x'"
    )
