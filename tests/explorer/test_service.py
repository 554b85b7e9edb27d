"""The service: its port, its link, how it ends, and the view from Python."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.audit.fixtures import Audited, audited, networks, pictures, small_plan
from tests.explorer.benches import filled_bench, network, photographs, png, square
from tests.networks import untouched
from weakspot import explore
from weakspot._progress import Display
from weakspot.audit import AttackPlan
from weakspot.cli.explore import Address, run_desk
from weakspot.cli.options import ModelOptions
from weakspot.explorer.access import Access
from weakspot.explorer.desk import Desk
from weakspot.explorer.gallery_desk import RecordDesk
from weakspot.explorer.service import forwarding_hint, has_display, open_port

__all__ = ["audited", "networks", "pictures"]  # fixtures
ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-tests-only"  # noqa: S105


def asked(url: str, name: str, body: dict[str, object]) -> dict[str, object]:
    """The answer to a request, as a page with the link gets it."""
    place, _, token = url.partition("?token=")
    request = urllib.request.Request(  # noqa: S310 - an address of this machine
        f"{place}api/{name}", json.dumps(body).encode(), {"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        told: dict[str, object] = json.load(answer)
    return told


def test_a_port_that_is_taken_is_followed_by_the_next_free_one() -> None:
    first = open_port("127.0.0.1", 0)
    port = first.getsockname()[1]
    try:
        second = open_port("127.0.0.1", port)
        assert port < second.getsockname()[1] <= port + 50
        second.close()
    finally:
        first.close()


def test_answers_do_not_wait_for_acknowledgments() -> None:
    async def accepted_without_delay() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        listener = open_port("127.0.0.1", 0)
        async with await asyncio.start_server(serve, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await told
            writer.close()
        return found

    assert asyncio.run(accepted_without_delay())


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="host must be"):
        open_port("192.0.2.1", 0)
    with pytest.raises(ValueError, match="host must be"):
        open_port("no such host", 0)


def test_every_session_has_a_token_of_its_own() -> None:
    assert len({Access(1).token for _ in range(20)}) == 20


def test_over_ssh_the_tunnel_is_told_and_no_browser_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.2 50000 10.0.0.7 22")
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("DISPLAY", ":0")
    assert forwarding_hint(8765) == "ssh -L 8765:127.0.0.1:8765 me@10.0.0.7"
    assert not has_display()
    monkeypatch.delenv("SSH_CONNECTION")
    assert forwarding_hint(8765) is None
    assert has_display()


@pytest.mark.parametrize(
    ("host", "open_to_others", "tunnel"),
    [("127.0.0.1", False, "127.0.0.1"), ("127.0.0.2", False, "127.0.0.2"), ("localhost", False, "localhost"),
     ("0.0.0.0", True, "127.0.0.1")],  # noqa: S104
)  # fmt: skip
def test_what_is_printed_fits_the_address(
    host: str,
    open_to_others: bool,
    tunnel: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.2 50000 10.0.0.7 22")
    address = Address(host, 0, "", None, browser=False, quiet=False)
    service = address.service(Desk(filled_bench()))
    port = service.access.port
    try:
        address.announce(service)
        printed = capsys.readouterr().out
        assert ("Other machines can connect" in printed) == open_to_others
        # A tunnel leads where the service listens.
        assert f"ssh -L {port}:{tunnel}:{port} " in printed
        assert "not free" not in printed  # any port was asked for
        replace(address, port=port - 1).announce(service)
        assert f"Port {port - 1} is not free; {port} is used." in capsys.readouterr().out
    finally:
        service.close()


def test_the_model_that_cannot_be_loaded_is_the_one_that_is_named(audited: Audited, pictures: Path) -> None:
    run = audited("service", small_plan(pictures), pictures.parent / "run")
    folder = Path(run.folder)
    with run_desk([folder], ModelOptions(model="nowhere:build"), Display()) as desk:
        assert isinstance(desk, RecordDesk)
        assert desk.reason.startswith("The model that was named, nowhere:build, cannot be loaded: ")
        assert "--model" not in desk.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weakspot.audit.execution.preparation.load_planned", failing)
        with run_desk([folder], ModelOptions(), Display()) as desk:
            assert isinstance(desk, RecordDesk)
            assert desk.reason.startswith(
                f"The model of the run, {run.plan.model.spec}, cannot be loaded: gone"
            )
            assert desk.reason.endswith("(name it with --model).")


def failing(*_: object) -> None:
    raise ValueError("gone")


def test_the_view_from_python_serves_and_gives_back_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    model, images = network(), photographs(3)
    labels = torch.tensor([0, 1, 2])
    with untouched(model, images, labels), explore(model, images, labels=labels, port=0) as view:
        assert view.mask is None
        assert view.pairs is None
        assert asked(view.url, "image", {"image": 1})["name"] == "image 1"
        asked(view.url, "area", {"image": 1, "mask": png(square())})
        mask = view.mask
        assert mask is not None
        assert torch.equal(mask, square())
        order = {"image": 1, "mask": png(square()), "options": {"steps": 2}}
        task = view.desk.subscribe("attack", order, lambda _: None)
        task.result.result(60)
        pairs = view.pairs
        assert pairs is not None
        assert pairs.names == ("image 1",)
        assert pairs.labels.tolist() == [1]
        assert torch.equal(pairs.clean, images[1:2])
        url = view.url
    with pytest.raises(OSError, match=r"refused|reset|closed|urlopen"):
        asked(url, "hello", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, "labels must be an integer tensor of shape"),
        ({"labels": torch.tensor([0, 1, 9])}, "labels must be classes between 0 and 3, got 9"),
        ({"names": ["one"]}, "names must have one entry for each of 3 images, got 1"),
        ({"port": "x"}, "port must be an integer"),
    ],
)
def test_arguments_that_do_not_fit_are_told(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explore(network(), photographs(3), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images must"):
        explore(network(), torch.zeros(0, 3, 24, 20))


def command(*arguments: str, modules: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "weakspot", "explore", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{modules}", "OMP_NUM_THREADS": "1"},
        # A test run in the background ignores interrupts, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_ends_it_with_a_page_and_a_stream_open() -> None:
    from websockets.sync.client import connect

    taken = open_port("127.0.0.1", 0)
    port = taken.getsockname()[1]
    process = command("--samples", "--no-browser", "--token", TOKEN, "--port", str(port))
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"Port {port} is not free;")
        link = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert link is not None
        page = socket.create_connection(("127.0.0.1", int(link[1])))  # a page that keeps its connection
        with connect(f"ws://127.0.0.1:{link[1]}/api/ws?token={TOKEN}") as stream:
            order = {"image": 0, "attack": "carlini_wagner", "options": {"steps": 1000}}
            stream.send(json.dumps({"id": 1, "name": "attack", "body": order}))
            while json.loads(stream.recv(60))["event"] != "step":
                pass
            process.send_signal(signal.SIGINT)
            code = process.wait(60)  # benchmarks/explorer.py measures how soon
        page.close()
    finally:
        process.kill()
        taken.close()
    assert code == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_the_records_of_audits_are_served_until_ctrl_c(audited: Audited, pictures: Path) -> None:
    folder = pictures.parent
    plan = small_plan(pictures, attacks=(AttackPlan("fgsm"),), analyses=())
    for name, own in (("first", plan), ("second", replace(plan, seed=1))):
        audited(name, own, folder / name)
    for runs in (["first"], ["first", "second"]):
        process = command(*runs, "--no-browser", "--port", "0", modules=folder)
        try:
            assert process.stdout is not None
            link = re.search(r"http://\S+", process.stdout.readline())
            assert link is not None
            records = asked(link[0], "records", {})["records"]
            assert isinstance(records, list)
            assert len(records) == 28
            assert asked(link[0], "open", {"id": records[0]["id"]})["image"] == 0
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0
        assert "Traceback" not in told


@pytest.mark.slow
def test_what_cannot_be_served_is_refused_in_one_sentence() -> None:
    for arguments, message in (
        (["--samples", "--token", "short"], "--token must be at least 16"),
        (["--samples", "--json"], "--json has no effect on explore, which opens a page"),
        ([], "no images were named"),
        (["--samples", "--host", "192.0.2.1"], "host must be"),
    ):
        process = command(*arguments)
        _, told = process.communicate(timeout=120)
        assert process.returncode == 2
        assert message in told
        assert "Traceback" not in told


def test_a_missing_extra_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    original = importlib.util.find_spec

    def find(name: str, *arguments: str) -> object:
        return None if name == "uvicorn" else original(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ValueError, match=re.escape("needs uvicorn: pip install 'weakspot[explore]'")):
        explore(network(), photographs(1))
