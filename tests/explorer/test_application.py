"""The explorer's application: who may connect, under which URLs, and how much it takes."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.explorer.benches import filled_bench, picture_of, png, square
from weakspot.explorer.access import Access
from weakspot.explorer.application import Application
from weakspot.explorer.desk import Desk
from weakspot.images import read_images

TOKEN = "a-token-for-tests-only"  # noqa: S105
HOST = "http://127.0.0.1:8765"
SOCKET = "ws://127.0.0.1:8765/api/ws"
COOKIE = {"weakspot_8765": TOKEN}


def visitor(desk: Desk, *, base_url: str = "", cookies: dict[str, str] | None = None) -> TestClient:
    app = Application(desk, Access(8765, token=TOKEN, base_url=base_url))
    return TestClient(app, base_url=HOST, cookies=cookies, raise_server_exceptions=True)


@pytest.fixture
def client(desk: Desk) -> TestClient:
    return visitor(desk, cookies=COOKIE)


def test_the_link_sets_a_cookie_that_scripts_cannot_read_and_other_sites_do_not_send(desk: Desk) -> None:
    stranger = visitor(desk)
    assert stranger.get("/").status_code == 403
    first = stranger.get(f"/?token={TOKEN}")
    assert first.status_code == 200
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert stranger.post("/api/hello", json={}).status_code == 200  # by the cookie


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + "x", "%00", "é", "a" * 5000])
def test_a_wrong_token_is_refused_everywhere(desk: Desk, token: str) -> None:
    stranger = visitor(desk)
    for path in ("/", "/static/index.html", "/api/ws", "/nothing"):
        assert stranger.get(f"{path}?token={token}").status_code == 403
    answer = stranger.post(f"/api/hello?token={token}", json={})
    assert answer.status_code == 403
    assert TOKEN not in answer.text
    header = {"cookie": f"weakspot_8765={token.encode('ascii', 'ignore').decode()}"}
    assert stranger.post("/api/hello", json={}, headers=header).status_code == 403
    with (
        pytest.raises(WebSocketDisconnect),
        stranger.websocket_connect(f"{SOCKET}?token={token}"),
    ):
        pass


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1",
        "127.0.0.1:80",
        "localhost:8766",
        "127.0.0.1.evil:8765",
    ],
)
def test_a_foreign_host_name_is_refused_even_with_the_token(client: TestClient, host: str) -> None:
    """A page at a name that resolves to 127.0.0.1 is same-origin with itself: only the name gives it away."""
    assert client.post("/api/hello", json={}, headers={"host": host}).status_code == 403
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(SOCKET, headers={"host": host}):
        pass


@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "https://127.0.0.1:8765", "http://127.0.0.1:9", ""]
)
def test_a_foreign_origin_is_refused_even_with_the_token(client: TestClient, origin: str) -> None:
    assert client.post("/api/hello", json={}, headers={"origin": origin}).status_code == 403
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(SOCKET, headers={"origin": origin}):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "[::1]:8765", "LOCALHOST:8765"])
def test_our_own_names_are_answered(client: TestClient, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    assert client.post("/api/hello", json={}, headers=headers).status_code == 200


def test_every_answer_has_the_policy_and_allows_no_other_site(client: TestClient, desk: Desk) -> None:
    answers = [
        client.get("/"),
        client.get("/static/nothing.js"),
        client.post("/api/hello", json={}),
        client.post("/api/nothing", json={}),
        client.get("/api/hello"),
        client.options("/api/hello", headers={"origin": HOST, "access-control-request-method": "POST"}),
        visitor(desk).get("/"),
    ]
    for answer in answers:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "name",
    [
        "../bench.py",
        "..%2Fbench.py",
        "%2e%2e/desk.py",
        "/etc/passwd",
        "..\\desk.py",
        ".js",
        "x\0.js",
    ],
)
def test_only_files_of_the_page_are_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/static/{name}".replace("\0", "%00"))
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_the_page_finds_its_modules_and_those_of_the_report(client: TestClient) -> None:
    assert client.get("/static/index.html").headers["content-type"].startswith("text/html")
    assert client.get("/static/colors.js").headers["content-type"].startswith("text/javascript")


def test_a_proxy_may_strip_its_path_or_not(desk: Desk) -> None:
    behind = visitor(desk, base_url="/user/me/proxy/8765/", cookies=COOKIE)
    for prefix in ("", "/user/me/proxy/8765"):
        assert behind.get(f"{prefix}/").status_code == 200
        assert behind.get(f"{prefix}/static/index.html").status_code == 200
        assert behind.post(f"{prefix}/api/hello", json={}).status_code == 200
        with behind.websocket_connect(f"ws://127.0.0.1:8765{prefix}/api/ws") as socket:
            socket.send_json({"id": 1, "name": "nothing"})
            assert socket.receive_json()["event"] == "error"
    assert behind.get("/user/me/proxy/87650/", follow_redirects=False).status_code == 404


def test_the_last_slash_is_added_by_a_relative_redirect(desk: Desk) -> None:
    behind = visitor(desk, base_url="/a/b", cookies=COOKIE)
    answer = behind.get(f"/a/b?token={TOKEN}", follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"] == f"b/?token={TOKEN}"
    assert behind.get(f"/a/b?token={TOKEN}").status_code == 200


def test_the_name_of_a_public_proxy_is_allowed_if_it_is_given(desk: Desk) -> None:
    headers = {"host": "hub.example.org", "origin": "https://hub.example.org"}
    assert visitor(desk, cookies=COOKIE).post("/api/hello", json={}, headers=headers).status_code == 403
    behind = visitor(desk, base_url="https://hub.example.org/proxy/8765/", cookies=COOKIE)
    assert behind.post("/proxy/8765/api/hello", json={}, headers=headers).status_code == 200
    headers["origin"] = "http://hub.example.org"
    assert behind.post("/proxy/8765/api/hello", json={}, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "3", "null", '"text"', "[" * 100_000, '{"image": NaN}', "9" * 5000]
)
def test_requests_that_are_no_json_object_are_told_so(client: TestClient, body: str) -> None:
    answer = client.post("/api/image", content=body)
    assert answer.status_code == (200 if body == "" else 400)
    if body:
        assert set(answer.json()) == {"error"}


def test_large_requests_are_refused_before_they_are_read_to_the_end(client: TestClient) -> None:
    assert client.post("/api/image", content=b"x" * (5 * 2**20)).status_code == 413
    assert client.post("/api/upload", content=b"x" * (30 * 2**20)).status_code == 413


def bomb() -> bytes:
    """A PNG header of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_an_upload_is_bounded_in_pixels_and_in_formats(client: TestClient, desk: Desk) -> None:
    def sent(content: bytes, name: str = "cat.png") -> tuple[int, dict[str, object]]:
        body = {"name": name, "file": base64.b64encode(content).decode()}
        answer = client.post("/api/upload", json=body)
        return answer.status_code, answer.json()

    status, told = sent(bomb())
    assert status == 413
    assert told == {"error": "file must have at most 40 million pixels"}
    for content in (b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"\x89PNG\r\n\x1a\n"):
        assert sent(content)[0] == 400
    whole = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(whole, "JPEG")
    assert sent(whole.getvalue()[:200])[0] == 400  # truncated
    status, told = sent(whole.getvalue(), "../../<b>cat</b>.jpg")
    assert status == 200
    assert told["image"] == 2
    assert str(told["name"]) == ".._.._<b>cat<_b>.jpg".replace("<", "_").replace(">", "_")
    assert desk.bench.exhibit(2).pixels.shape == (1, 3, 24, 20)
    shown = client.post("/api/image", json={"image": 2}).json()
    assert picture_of(shown["png"]).size == (20, 24)


def test_an_upload_has_the_pixels_that_a_named_file_has(
    client: TestClient, desk: Desk, tmp_path: Path
) -> None:

    picture = Image.fromarray((torch.rand(50, 31, 4) * 255).byte().numpy(), "RGBA")
    path = tmp_path / "transparent.png"
    picture.save(path)
    body = {"name": path.name, "file": base64.b64encode(path.read_bytes()).decode()}
    index = client.post("/api/upload", json=body).json()["image"]
    assert torch.equal(desk.bench.exhibit(index).pixels, read_images(path, size=(24, 20))[0])


def test_the_answer_of_an_image_is_what_the_model_says(client: TestClient, desk: Desk) -> None:
    answer = client.post("/api/image", json={"image": 1}).json()
    exhibit = desk.bench.exhibit(1)
    with torch.no_grad():
        logits = desk.bench.classifier(exhibit.pixels)[0]
    assert [one["index"] for one in answer["top"]] == logits.argsort(descending=True).tolist()
    told = torch.tensor([one["logit"] for one in answer["top"]])
    expected = logits.sort(descending=True).values
    assert torch.allclose(told, expected, rtol=0, atol=1e-4 * float(logits.max() - logits.min()))


def test_two_pages_work_at_once_and_do_not_see_each_others_events(desk: Desk) -> None:
    app = Application(desk, Access(8765, token=TOKEN))
    one, two = (TestClient(app, base_url=HOST, cookies=COOKIE) for _ in range(2))
    body = {"mask": png(square()), "budget": "linf:16/255", "options": {"steps": 3}}
    with one.websocket_connect(SOCKET) as first, two.websocket_connect(SOCKET) as second:
        first.send_json({"id": 7, "name": "attack", "body": {"image": 0, **body}})
        second.send_json({"id": 9, "name": "attack", "body": {"image": 1, **body}})
        ended = []
        for socket, number in ((first, 7), (second, 9)):
            events = [socket.receive_json()]
            while events[-1]["event"] not in {"done", "error"}:
                events.append(socket.receive_json())
            assert {event["id"] for event in events} == {number}
            assert [event["event"] for event in events].count("start") == 1
            assert {event["side"] for event in events if event["event"] == "step"} == {"attack", "control"}
            ended.append(events[-1])
        assert one.post("/api/probe", json={"image": 0, "y": 1, "x": 1}).json()["box"] == [1, 1, 1, 1]
    assert [event["event"] for event in ended] == ["done", "done"]
    assert all(event["attack"]["pixels"] <= 36 for event in ended)


def test_a_page_that_leaves_stops_its_jobs(client: TestClient, desk: Desk) -> None:
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"id": 1, "name": "attack", "body": {"image": 0, "options": {"steps": 100_000}}})
        while socket.receive_json()["event"] != "step":
            pass
    # The worker is free again: a short job that waits behind the attack is answered.
    assert "pixels" in desk.ask("mask", {"image": 0, "kind": "border"}).result(60)
    assert desk.bench.exhibit(0).how.endswith("stopped early")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "nonsense", '{"id": "x"}', '{"id": true}', '{"id": 1e999}', "[" * 50_000, '{"id": 1}'],
)
def test_odd_messages_are_told_and_do_not_close_the_socket(client: TestClient, text: str) -> None:
    with client.websocket_connect(SOCKET) as socket:
        socket.send_text(text)
        assert socket.receive_json()["event"] == "error"
        socket.send_json({"id": 2, "name": "heat", "body": {"image": 0, "grid": 2}})
        assert socket.receive_json()["id"] == 2


def test_a_page_has_at_most_eight_jobs(client: TestClient) -> None:
    with client.websocket_connect(SOCKET) as socket:
        for number in range(12):
            body = {"image": 0, "options": {"steps": 100_000}}
            socket.send_json({"id": number, "name": "attack", "body": body})
        refused: list[object] = []
        while len(refused) < 4:
            event = socket.receive_json()
            refused += [event["id"]] if event["event"] == "error" else []
        assert refused == [8, 9, 10, 11]


def test_a_second_job_under_the_number_of_a_running_one_is_refused(client: TestClient) -> None:
    job = {"id": 3, "name": "attack", "body": {"image": 0, "options": {"steps": 100_000}}}
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json(job)
        while socket.receive_json()["event"] != "step":
            pass
        socket.send_json(job)
        events = [socket.receive_json()]
        while events[-1]["id"] == 3:
            events.append(socket.receive_json())
        assert events[-1]["event"] == "error"
        socket.send_json({"id": 3, "stop": True})
        while events[-1]["event"] != "done":
            events.append(socket.receive_json())
        assert events[-1]["stopped"] is True


def test_errors_hold_no_path_and_no_traceback(client: TestClient) -> None:
    for name, body in (
        ("image", {"image": 99}),
        ("mask", {"image": 0, "kind": "/etc/passwd"}),
        ("mask", {"image": 0, "kind": "weakest", "budget": "linf:-1"}),
        ("provable", {"image": 99}),
        ("area", {"image": 0, "mask": "AAAA"}),
        ("command", {"image": 0, "attack": "pgd", "options": {"momentum": "x", "steps": -3}}),
    ):
        answer = client.post(f"/api/{name}", json=body)
        told = json.dumps(answer.json())
        assert answer.status_code in {200, 400}
        assert "Traceback" not in told
        assert "site-packages" not in told
        assert "/src/" not in told


def test_a_gray_bench_of_two_classes_answers_everything() -> None:
    desk = Desk(filled_bench(1, channels=1, classes=2))
    try:
        client = visitor(desk, cookies=COOKIE)
        shown = client.post("/api/image", json={"image": 0}).json()
        assert shown["channels"] == 1
        assert len(shown["top"]) == 2
        probed = client.post(
            "/api/probe", json={"image": 0, "y": 23, "x": 19, "size": 5, "color": [255, 255, 0]}
        )
        assert probed.json()["box"] == [19, 15, 5, 5]
    finally:
        desk.close()
