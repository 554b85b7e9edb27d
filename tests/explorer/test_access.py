"""Under which names and below which paths the explorer is reached, and where its link and its cookie lead."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from tests.explorer.benches import filled_bench
from weakspot.explorer.access import Access
from weakspot.explorer.application import Application
from weakspot.explorer.desk import Desk
from weakspot.explorer.service import Service

TOKEN = "a-token-for-tests-only"  # noqa: S105


@pytest.mark.parametrize(
    ("base_url", "start"),
    [
        ("", "http://127.0.0.1:PORT/?token="),
        ("/a/b", "http://127.0.0.1:PORT/a/b/?token="),
        ("https://hub.example.org/x/", "https://hub.example.org/x/?token="),
    ],
)
def test_the_link_leads_to_the_page(base_url: str, start: str) -> None:
    service = Service.prepare(Desk(filled_bench()), port=0, base_url=base_url)
    try:
        assert service.url.startswith(start.replace("PORT", str(service.access.port)))
        assert len(service.url.rpartition("=")[2]) >= 32
    finally:
        service.close()


@pytest.mark.parametrize(
    "base_url",
    [
        "notaurl",
        "a/b",
        "hub.example.org/x/",
        "javascript:alert(1)",
        "ftp://x.org/",
        "http://x.org:abc/",
        "http://x.org:/",
        "http:///x/",
        "http://",
        "http://me@x.org/",
        "http://[x]/",
        "//evil.example/",
        "/a b/",
        "/a?b",
        "https://x.org/a#b",
        "/a;domain=x",
        "/a\n",
        " /a",
    ],
)
def test_what_is_no_path_and_no_url_is_refused_before_a_port_is_taken(base_url: str) -> None:
    desk = Desk(filled_bench(1))
    try:
        with pytest.raises(
            ValueError, match="--base-url must be a path that begins with a slash, or a URL such as"
        ):
            Service.prepare(desk, port=0, base_url=base_url)
    finally:
        desk.close()


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "/",
        "/a/b",
        "/user/me@x.org/proxy/8765/",
        "http://x.org",
        "https://x.org:8443/a/",
        "http://[::1]:80/a",
        "http://a_b.x/",
    ],
)
def test_the_link_of_every_base_url_leads_to_the_page(base_url: str) -> None:
    desk = Desk(filled_bench(1))
    service = Service.prepare(desk, port=0, base_url=base_url)
    try:
        link = urlsplit(service.url)
        host = {"host": link.netloc}
        client = TestClient(Application(desk, service.access), base_url=f"{link.scheme}://{link.netloc}")
        assert (
            client.get(f"{link.path}?{link.query}", headers=host, follow_redirects=False).status_code == 200
        )
    finally:
        service.close()


def test_a_server_on_every_address_answers_to_addresses_and_its_own_name_only() -> None:
    access = Access(8765, "0.0.0.0", TOKEN)  # noqa: S104

    def refused(host: str, origin: str | None = None) -> bool:
        headers = {"host": host, "authorization": f"Bearer {TOKEN}"} | ({"origin": origin} if origin else {})
        return access.refusal(headers, "") is not None

    for host in ("10.1.2.3:8765", "[fe80::1]:8765", f"{socket.gethostname()}:8765", "localhost:8765"):
        assert not refused(host, f"http://{host.lower()}")
    for host in ("evil.example:8765", "10.1.2.3:80", "10.1.2.3", "10.1.2.3.evil.example:8765", ""):
        assert refused(host)
    assert refused("10.1.2.3:8765", "http://evil.example")
    assert refused("10.1.2.3:8765", "http://10.1.2.4:8765")
    alone = Access(8765, token=TOKEN)
    assert alone.refusal({"host": "10.1.2.3:8765", "authorization": f"Bearer {TOKEN}"}, "") is not None


def test_a_server_on_every_address_at_port_80_is_asked_without_a_port() -> None:
    access = Access(80, "0.0.0.0", TOKEN)  # noqa: S104
    for host in ("10.1.2.3", "[fe80::1]", socket.gethostname().lower(), "10.1.2.3:80"):
        headers = {"host": host, "authorization": f"Bearer {TOKEN}", "origin": f"http://{host}"}
        assert access.refusal(headers, "") is None
    for host in ("evil.example", "10.1.2.3:8765", "10.1.2.3.evil.example", "", ":80"):
        assert not access.knows(host)


def test_the_cookie_goes_to_no_other_server_behind_the_same_proxy() -> None:
    desk = Desk(filled_bench(1))
    try:
        access = Access(8765, token=TOKEN, base_url="https://hub.example.org/user/me/")
        client = TestClient(Application(desk, access), base_url="https://hub.example.org")
        cookie = client.get(f"/user/me/?token={TOKEN}").headers["set-cookie"].lower()
    finally:
        desk.close()
    assert "path=/user/me;" in cookie
    assert "; secure" in cookie
