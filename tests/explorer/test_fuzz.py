"""Whatever a page sends is answered by JSON: never an internal error, a traceback or a path."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.explorer.benches import filled_bench, png, square
from tests.explorer.test_application import COOKIE, HOST, SOCKET, TOKEN
from weakspot.explorer.access import Access
from weakspot.explorer.application import Application
from weakspot.explorer.desk import QUESTIONS, SUBSCRIPTIONS, Desk

LEAK = re.compile(r"Traceback|site-packages|/src/|/tmp/|\.py\b|object at 0x")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 30)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["cam", "pgd", "linf:4/255", "l2:1", "ssim:0.1", "0", "attack", "control", "\ud800", "../../x"]
    )
    | st.sampled_from(
        [png(square()), png(square(), "RGBA"), png(square(size=(5, 7))), "AAAA", "iVBORw0KGgo="]
    )
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)
fields = [
    "image", "y", "x", "size", "mask", "color", "n", "page", "kind", "fraction", "count", "seed", "attack", "budget",
    "options", "target", "analysis", "layer", "unit", "text", "name", "file", "side", "grid", "verify",
    "pair",
]  # fmt: skip
plausible = {
    "image": st.integers(0, 1),
    "y": st.integers(0, 23),
    "x": st.integers(0, 19),
    "kind": st.sampled_from(["border", "cam", "superpixel"]),
    "options": st.fixed_dictionaries(
        {}, optional={"steps": st.integers(0, 4), "momentum": scalars, "loss": scalars}
    ),
}
bodies = st.dictionaries(st.sampled_from(fields), values, max_size=6).flatmap(
    lambda odd: st.fixed_dictionaries({}, optional=plausible).map(lambda plain: {**plain, **odd})
)
often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    desk = Desk(filled_bench())
    yield TestClient(
        Application(desk, Access(8765, token=TOKEN)),
        base_url=HOST,
        cookies=COOKIE,
        raise_server_exceptions=True,
    )
    desk.close()


@often
@given(name=st.sampled_from(sorted({*QUESTIONS, "probe"})), body=bodies)
def test_every_request_is_answered_by_json_in_plain_words(
    client: TestClient, name: str, body: dict[str, object]
) -> None:
    answer = client.post(f"/api/{name}", content=json.dumps(body))
    assert answer.status_code in {200, 400, 413}, answer.text
    told = answer.json()
    assert isinstance(told, dict)
    if answer.status_code != 200:
        assert set(told) == {"error"}
        assert "\n" not in told["error"]
    assert not LEAK.search(str(told.get("error", "")))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + 400 * "0"])
def test_a_number_that_no_answer_can_repeat_is_told_to_be_the_request_s(
    client: TestClient, number: str
) -> None:
    answer = client.post("/api/hello", content=f'{{"n": {number}}}')
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("n must be a number between -1e+15 and 1e+15, got ")


@often
@given(name=st.text(max_size=20), content=st.binary(max_size=60))
def test_names_and_contents_from_anywhere_are_refused(client: TestClient, name: str, content: bytes) -> None:
    path = "".join(f"%{byte:02x}" for byte in name.encode("utf-8", "surrogatepass"))
    answer = client.post(f"/api/{path}", content=content)
    assert answer.status_code < 500
    assert not LEAK.search(answer.text)


messages = st.text(max_size=30) | st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(-3, 3) | scalars,
        "name": st.sampled_from(sorted(SUBSCRIPTIONS)) | scalars,
        "body": bodies | values,
        "stop": st.booleans() | scalars,
    },
).map(json.dumps)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(messages, max_size=6))
def test_the_socket_survives_every_message(client: TestClient, sent: list[str]) -> None:
    with client.websocket_connect(SOCKET) as socket:
        for text in sent:
            socket.send_text(text)
        for number in range(-3, 4):
            socket.send_json({"id": number, "stop": True})
        socket.send_json({"id": 77, "name": "nothing"})
        while True:
            event = socket.receive_json()
            if event["event"] == "error":
                assert not LEAK.search(event["error"])
                assert "\n" not in event["error"]
            if event["id"] == 77:
                break
